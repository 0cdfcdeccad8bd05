"""The closed form at full size: every projection of SD 1.5 or SDXL solved from synthetic moments of
their true shapes.

    python benchmarks/solver_scale.py --family sdxl --threads 2

Moments of rank `--tokens` plus the rest of the spectrum stand for a sweep's; random weights are not
needed, since `target` solves from moments alone. Prints seconds of the factorisations and
truncations (fp64, on the CPU), and the bytes a calibration keeps on the host and at most on the
device.
"""

from __future__ import annotations

import argparse
import json
import resource
import time

import torch
from diffusers import UNet2DConditionModel
from tqdm import tqdm

from cntlora_core.calibration.closed_form import cholesky
from cntlora_core.calibration.constraints import Metric, make_constraint
from cntlora_core.calibration.moments import ON_DEVICE, Moments, RunningMean, moment_bytes
from cntlora_core.calibration.ranks import MAX_RANK_FACTOR, budget_of, data_ranks
from cntlora_core.lora.targets import find_projections
from cntlora_core.model.families import config_of


def synthetic(size: int, tokens: int, diagonal: bool, generator: torch.Generator) -> RunningMean:
    """A second moment with a falling spectrum: `tokens` random rows over a tenth of white noise."""
    rows = torch.randn(tokens, size, generator=generator) * torch.linspace(1, 0.05, size)
    moment = (
        rows.square().mean(0) + 0.1 if diagonal else rows.T @ rows / tokens + 0.1 * torch.eye(size)
    )
    return RunningMean(moment, tokens)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--family", choices=("sd1", "sd2", "sdxl"), default="sdxl")
    parser.add_argument("--targets", choices=("attention", "attention+ff"), default="attention")
    parser.add_argument("--rank", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(config_of(args.family)["unet"])
    projections = find_projections(unet, args.targets)
    generator = torch.Generator().manual_seed(0)
    constraint, metric = make_constraint("target", 0.5), Metric(0.5)
    like, scores = torch.zeros((), dtype=torch.float64), {}
    seconds, held = 0.0, ("", like)
    inputs: dict[str, RunningMean] = {}
    for p in tqdm(sorted(projections, key=lambda p: p.input_key)):
        if p.input_key not in inputs:
            inputs = {p.input_key: synthetic(p.in_features, args.tokens, p.diagonal_in, generator)}
        moments = Moments(
            inputs,
            {p.name: synthetic(p.out_features, args.tokens, p.diagonal_out, generator)},
            {
                p.name: RunningMean(
                    torch.randn(p.out_features, p.in_features, generator=generator), args.tokens
                )
            },
        )
        started = time.perf_counter()
        if p.input_key != held[0]:
            held = p.input_key, cholesky(metric.K(p, moments, like))
        parts = constraint.components(
            p, like, moments, held[1], MAX_RANK_FACTOR * args.rank, generator
        )
        seconds += time.perf_counter() - started
        scores[p.name] = parts.score
    started = time.perf_counter()
    data_ranks(
        projections, scores, budget_of(projections, args.rank), max_rank=MAX_RANK_FACTOR * args.rank
    )
    seconds += time.perf_counter() - started
    kept = moment_bytes(projections)
    cross = 4 * sum(p.in_features * p.out_features for p in projections)
    largest = 4 * max(p.in_features * p.out_features for p in projections)
    report = {
        "family": args.family,
        "targets": args.targets,
        "projections": len(projections),
        "threads": args.threads,
        "second_moments": len({p.input_key for p in projections}),
        "seconds": round(seconds, 1),
        "host_gib": round((kept + cross) / 2**30, 2),
        # a sweep's products pass through one at a time; a refinement's C and S stay there if they
        # are small enough, twice for a moment
        "device_gib_above_a_step": round((largest if kept > ON_DEVICE else 2 * kept) / 2**30, 2),
        "peak_rss_gib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2),
    }
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
