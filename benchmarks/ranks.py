"""Do the ranks follow the subject? The rule's against shuffles of them, and against equal ones.

    python benchmarks/ranks.py --output ranks.jsonl --subjects subjects/* --rank 4

A shuffle gives the same ranks to other layers of the same shape, so that the file stays as large.
`equal` is one rank for all layers, the largest that fits the budget; what is left goes, one rank
each, to the layers that come first. Every contestant is a whole calibration, nothing else differs;
losses are held-out, shares of the untouched model's, at the best of four strengths. Every run is a
line of the results file, and none is made twice.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from strengths import strongest
from subject_folders import read_halves

from cntlora_core.calibration.calibrate import calibrate
from cntlora_core.calibration.ranks import data_ranks, shared_budget
from cntlora_core.config import CalibrationConfig
from cntlora_core.defaults import MINI_SD
from cntlora_core.lora.targets import Projection, find_projections, targets_for
from cntlora_core.model.loader import StableDiffusion, load_checkpoint
from cntlora_core.training.validation import validation_loss

SHUFFLES = 5
# Of the 95 % interval, from 1 degree of freedom on.
STUDENT = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179)

Ranks = dict[str, int]


def shuffled(ranks: Mapping[str, int], projections: Sequence[Projection], seed: int) -> Ranks:
    """The same ranks, given to other layers of the same shape."""
    dice, shapes = random.Random(seed), {}
    for p in projections:
        shapes.setdefault((p.out_features, p.in_features), []).append(p.name)
    changed = {}
    for names in shapes.values():
        values = [ranks[name] for name in names]
        dice.shuffle(values)
        changed |= dict(zip(names, values, strict=True))
    return changed


def equal(projections: Sequence[Projection], rank: int) -> Ranks:
    """What the rule gives where every next rank of a layer is worth less than all before it."""
    falling = {p.name: p.parameters_per_rank / torch.arange(1.0, 1025) for p in projections}
    return data_ranks(projections, falling, shared_budget(projections, rank), max_rank=1024)


def contestants(
    projections: Sequence[Projection], rank: int, found: Mapping[str, int]
) -> dict[str, Ranks]:
    found = {p.name: found.get(p.name, 0) for p in projections}
    others = {f"shuffle {n}": shuffled(found, projections, n) for n in range(SHUFFLES)}
    return {"equal": equal(projections, rank)} | others


def interval(ratios: Sequence[float]) -> tuple[float, float]:
    """Mean and half the 95 % interval, Student's."""
    if len(ratios) < 2:
        return statistics.mean(ratios), math.inf
    spread = statistics.stdev(ratios) / len(ratios) ** 0.5
    return statistics.mean(ratios), STUDENT[min(len(ratios) - 1, len(STUDENT)) - 1] * spread


def report(rows: Sequence[Mapping[str, Any]], rank: int) -> str:
    """Markdown: each subject, then the rule's loss as a share of the others'."""
    found: dict[str, dict[str, list[float]]] = {}
    for row in rows:
        if row["rank"] == rank:
            kind = row["ranks"].split()[0]
            found.setdefault(row["subject"], {}).setdefault(kind, []).append(row["loss"])
    lines = [f"| rank {rank} | rule | {SHUFFLES} shuffles | equal |", "|---|---|---|---|"]
    shares: dict[str, list[float]] = {"shuffle": [], "equal": []}
    for subject, losses in found.items():
        rule = statistics.mean(losses["data"])
        others = {kind: statistics.mean(losses[kind]) for kind in shares}
        for kind, loss in others.items():
            shares[kind].append(rule / loss)
        shuffles = losses["shuffle"]
        lines.append(
            f"| {subject} | {rule:.3f} | {others['shuffle']:.3f} "
            f"({min(shuffles):.3f}-{max(shuffles):.3f}) | {others['equal']:.3f} |"
        )
    cells = [f"{m:.3f} +- {half:.3f}" for m, half in map(interval, shares.values())]
    return "\n".join([*lines, "| rule / other | | " + " | ".join(cells) + " |"])


class Runs:
    """Calibrations on one subject, and the results file that they end in."""

    def __init__(self, model: StableDiffusion, folder: Path, output: Path) -> None:
        self.model, self.name, self.output = model, folder.name, output
        self.subject, held_out = read_halves(model, folder)
        self.validate = validation_loss(model, held_out, 8)
        self.base = self.validate()

    def once(self, name: str, config: CalibrationConfig, ranks: Ranks | None = None) -> Ranks:
        """The ranks of the LoRA, whose held-out loss is in the file afterwards."""
        key = {"rank": config.rank, "subject": self.name, "seed": config.seed, "ranks": name}
        for row in read(self.output):
            if key.items() <= row.items():
                return row["chosen"]
        start = calibrate(self.model, self.subject, config, ranks=ranks)
        strength, loss = strongest(self.model, start.lora, self.validate)
        told = {
            "loss": round(loss / self.base, 5),
            "strength": strength,
            "chosen": start.report.ranks,
        }
        with self.output.open("a", encoding="utf-8") as file:
            file.write(json.dumps(key | told) + "\n")
        return start.report.ranks


def read(path: Path) -> list[dict[str, Any]]:
    lines = path.read_text("utf-8").splitlines() if path.is_file() else []
    return [json.loads(line) for line in lines]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--subjects", nargs="+", type=Path, default=[], metavar="DIR")
    parser.add_argument("--rank", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args()
    torch.set_num_threads(1)
    model = load_checkpoint(MINI_SD)
    config = CalibrationConfig(rank=args.rank, seed=args.seed)
    projections = find_projections(model.unet, targets_for(config))
    for folder in args.subjects:
        runs = Runs(model, folder, args.output)
        found = runs.once("data", config)
        for name, ranks in contestants(projections, args.rank, found).items():
            runs.once(name, config, ranks)
    print(report(read(args.output), args.rank))


if __name__ == "__main__":
    main()
