"""The closed form at full size: every projection of SD 1.5 or SDXL solved from synthetic rows of
their true shapes.

    python benchmarks/solver_scale.py --family sdxl --threads 2

Rows with a falling spectrum stand for a sweep's; random weights are not needed, since `target`
solves from moments alone. Prints the seconds of taking the rows in and of the truncations (fp32, on
the CPU), and the bytes that a calibration keeps on the device: sketches of the gradients until the
layers are solved, and the moments.
"""

from __future__ import annotations

import argparse
import json
import resource
import time

import torch
from diffusers import UNet2DConditionModel

from cntlora_core.calibration.constraints import Metric, Target
from cntlora_core.calibration.moments import Moments, alike, moment_bytes, shape_of
from cntlora_core.calibration.ranks import MAX_RANK_FACTOR, budget_of, data_ranks
from cntlora_core.calibration.recording import input_key, output_key
from cntlora_core.calibration.seen import ROWS, Seen
from cntlora_core.calibration.sketch import Sketches, sketch_bytes, sketch_width
from cntlora_core.lora.targets import ALL, Projection, find_projections
from cntlora_core.model.families import config_of


def synthetic(size: int, generator: torch.Generator) -> torch.Tensor:
    """Rows with a falling spectrum, over a tenth of white noise."""
    rows = torch.randn(ROWS, size, generator=generator) * torch.linspace(1, 0.05, size)
    return rows + 0.1 * torch.randn(ROWS, size, generator=generator)


def unread(_: Projection) -> torch.Tensor:
    """A weight: `target` needs none."""
    raise NotImplementedError


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--family", choices=("sd1", "sd2", "sdxl"), default="sdxl")
    parser.add_argument(
        "--targets", choices=("attention", "attention+ff", ALL), default="attention"
    )
    parser.add_argument("--rank", type=int, default=4)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(config_of(args.family)["unet"])
    projections = find_projections(unet, args.targets)
    generator = torch.Generator().manual_seed(0)
    constraint = Target(Metric(0.5))
    seconds, scores = 0.0, {}
    for _, group in alike(projections, shape_of):
        seen, sketches = Seen(), Sketches(sketch_width(args.rank))
        moments = Moments(gradients=sketches)
        for p in group:
            x, delta = (synthetic(n, generator)[None] for n in (p.in_features, p.out_features))
            if input_key(p) not in seen.rows:
                seen.add(input_key(p), x, ROWS, p.diagonal_in, 1.0)
            seen.add(output_key(p), delta, ROWS, p.diagonal_out, 1.0)
            sketches.add(p.name, delta, x)
        started = time.perf_counter()
        moments.take_in(seen)
        solved = constraint.components(
            group, unread, moments, MAX_RANK_FACTOR * args.rank, generator
        )
        seconds += time.perf_counter() - started
        scores |= {p.name: parts.score for p, parts in zip(group, solved, strict=True)}
    started = time.perf_counter()
    data_ranks(
        projections, scores, budget_of(projections, args.rank), max_rank=MAX_RANK_FACTOR * args.rank
    )
    seconds += time.perf_counter() - started
    report = {
        "family": args.family,
        "targets": args.targets,
        "projections": len(projections),
        "threads": args.threads,
        "second_moments": len({p.input_key for p in projections}),
        "seconds": round(seconds, 1),
        "sketch_gib": round(sketch_bytes(projections, sketch_width(args.rank)) / 2**30, 2),
        "moments_gib": round(moment_bytes(projections) / 2**30, 2),
        "peak_rss_gib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2),
    }
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
