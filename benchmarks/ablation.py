"""What each part of a calibration is worth: held-out loss without it, at the same number of passes.

    python benchmarks/ablation.py --output ablation.jsonl --subjects subjects/*

Every variant is a whole calibration of the default length in which one thing differs. `whole
matrices` keeps every row of every layer, metrics of full rank, and brings them up to date in every
step: what the light form stands for. Losses are shares of the untouched model's. Every run is a
line of the results file, and none is made twice.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from ranks import interval, read
from subject_folders import read_halves

from cntlora_core.calibration import constraints, natural, recording, refine, second_moment
from cntlora_core.calibration.calibrate import calibrate
from cntlora_core.config import EFFORTS, CalibrationConfig
from cntlora_core.data import importance
from cntlora_core.defaults import MINI_SD
from cntlora_core.lora.adapter import attached_lora
from cntlora_core.lora.averaging import RunningAverage
from cntlora_core.model.loader import StableDiffusion, load_checkpoint
from cntlora_core.training.validation import validation_loss

EVERY = 100_000  # more than any layer has of rows or dimensions


@dataclass(frozen=True)
class Variant:
    """Constants of modules by `module.NAME`, and the batches of sweep and refinement."""

    constants: Mapping[str, Any] = field(default_factory=dict)
    batches: tuple[int, int] = EFFORTS["balanced"]
    batch_size: int = 2

    @contextmanager
    def applied(self) -> Iterator[None]:
        modules = (constraints, importance, natural, recording, refine, second_moment)
        by_name = {module.__name__.rsplit(".", 1)[1]: module for module in modules}
        with ExitStack() as stack:
            stack.enter_context(patch.dict(EFFORTS, balanced=self.batches))
            for place, value in self.constants.items():
                module, name = place.split(".")
                stack.enter_context(patch.object(by_name[module], name, value))
            yield


AS_IT_IS = "as it is"
WHOLE = {"second_moment.RANK": EVERY, "recording.ROWS": EVERY, "natural.REFRESH": 1}
VARIANTS = {
    AS_IT_IS: Variant(),
    "timesteps drawn evenly": Variant({"importance.UNIFORM_SHARE": 1.0}),
    "batches of 1": Variant(batches=(8, 96), batch_size=1),
    "batches of 1, slower fall of the steps": Variant({"natural.LASTING": 64}, (8, 96), 1),
    "batches of 4": Variant(batches=(2, 24), batch_size=4),
    "the last weights": Variant({"refine.RunningAverage": partial(RunningAverage, decay=0.0)}),
    "steps not held": Variant({"natural.UNUSUAL": float("inf")}),
    "metrics of rank 8": Variant({"second_moment.RANK": 8, "second_moment.WIDE_RANK": 8}),
    "metrics of rank 32": Variant({"second_moment.WIDE_RANK": 32}),
    "metrics of rank 64": Variant({"second_moment.RANK": 64}),
    "damping of wide layers by their mean": Variant({"constraints.WIDEST": EVERY}),
    "damping as of 64 channels": Variant({"constraints.WIDEST": 64}),
    "16 rows": Variant({"recording.ROWS": 16}),
    "every row": Variant({"recording.ROWS": EVERY}),
    "metric new in every step": Variant({"natural.REFRESH": 1}),
    "metric kept for 16 steps": Variant({"natural.REFRESH": 16}),
    "whole matrices": Variant(WHOLE),
}


def run(
    model: StableDiffusion, folder: Path, variant: Variant, rank: int, seed: int
) -> tuple[float, float]:
    """The held-out loss, as a share of the untouched model's, and the seconds it took."""
    subject, held_out = read_halves(model, folder)
    validate = validation_loss(model, held_out, 8)
    base = validate()
    with variant.applied():
        config = CalibrationConfig(rank=rank, seed=seed, batch_size=variant.batch_size)
        start = calibrate(model, subject, config)
    with attached_lora(model.unet, start.lora):
        return validate() / base, start.report.seconds


def report(rows: Sequence[Mapping[str, Any]], rank: int) -> str:
    """Markdown: means over the seeds by subject; then each variant's share of what is, with the 95
    % interval over the subjects."""
    losses: dict[str, dict[str, list[float]]] = {}
    for row in rows:
        if row["rank"] == rank:
            losses.setdefault(row["variant"], {}).setdefault(row["subject"], []).append(row["loss"])
    means = {v: {s: statistics.mean(x) for s, x in own.items()} for v, own in losses.items()}
    usual = means[AS_IT_IS]
    lines = [f"| rank {rank} | {' | '.join(usual)} | share of what is |"]
    lines.append("|---" * (len(usual) + 2) + "|")
    for variant, own in means.items():
        cells = [f"{own[s]:.3f}" if s in own else "-" for s in usual]
        share, half = interval([own[s] / usual[s] for s in usual if s in own])
        told = "" if variant == AS_IT_IS else f"{share:.3f} +- {half:.3f}"
        lines.append(f"| {variant} | {' | '.join(cells)} | {told} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--subjects", nargs="+", type=Path, default=[], metavar="DIR")
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=list(VARIANTS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--rank", type=int, default=4)
    parser.add_argument("--model", default=MINI_SD)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args()
    torch.set_num_threads(1)
    model = load_checkpoint(args.model, device=args.device)
    for seed in args.seeds:
        for folder in args.subjects:
            for name in args.variants:
                key = {"rank": args.rank, "subject": folder.name, "seed": seed, "variant": name}
                key["model"] = model.name
                if any(key.items() <= row.items() for row in read(args.output)):
                    continue
                loss, seconds = run(model, folder, VARIANTS[name], args.rank, seed)
                row = key | {"loss": round(loss, 5), "seconds": round(seconds, 2)}
                with args.output.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(row) + "\n")
    print(report([r for r in read(args.output) if r.get("model") == model.name], args.rank))


if __name__ == "__main__":
    main()
