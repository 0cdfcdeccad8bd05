"""Ours against the strongest ordinary LoRA: held-out loss at equal cost, nothing of ours tuned.

    python benchmarks/opponents.py --output runs.jsonl --subjects subjects/*

An ordinary LoRA gets every choice that a good trainer would make: attention alone or with
feed-forward layers (in the same number of parameters), batches of 1, 2 and 4, AdamW with betas
(0.9, 0.99) or Prodigy, weights averaged over the steps, timesteps by importance as a row of its
own, and of every row the learning rate that is best on that very subject. Ours runs as it comes.

A subject is a folder with `train/` and `heldout/` (benchmarks/mini_sd/prepare_data.py makes them).
The cost counts every pass: three forward passes are what a forward and a backward pass cost, and 4
pictures are a step. Losses are shares of the untouched model's. Every run is a line of the results
file, and no run is made twice; several processes may share it.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from subject_folders import read_halves

from cntlora_core.calibration.calibrate import calibrate
from cntlora_core.config import CalibrationConfig, TrainConfig
from cntlora_core.data.encoded import EncodedImages
from cntlora_core.data.importance import Importance
from cntlora_core.defaults import MINI_SD
from cntlora_core.events import Event, Validation
from cntlora_core.model.loader import StableDiffusion, load_checkpoint
from cntlora_core.run.runs import run_training
from cntlora_core.training.validation import validation_loss

COSTS = (10, 15, 20, 30, 45, 60, 90, 120)
STEP = 4  # pictures that are one step of cost


@dataclass(frozen=True)
class Method:
    """A start, a batch and an optimiser; `rates` are tried one by one (one for ours: none is)."""

    start: CalibrationConfig
    batch: int = 2
    optimizer: str = "adamw"
    rates: tuple[float, ...] = (1.5e-3, 3e-3, 6e-3)
    importance: bool = False


ATTENTION = CalibrationConfig(init="gaussian", targets="attention")
WIDE = CalibrationConfig(init="gaussian", targets="attention+ff")
OURS = CalibrationConfig(effort="quick")  # the steps after it are those of a longer effort
ORDINARY = {
    "attention, 4": Method(ATTENTION, 4, rates=(3e-3, 6e-3, 1.2e-2)),
    "attention, 2": Method(ATTENTION, 2, rates=(3e-3, 6e-3, 1.2e-2)),
    "with feed-forward, 4": Method(WIDE, 4, rates=(3e-3, 6e-3, 1.2e-2)),
    "with feed-forward, 2": Method(WIDE, 2),
    "with feed-forward, 1": Method(WIDE, 1),
    "with feed-forward, 2, Prodigy": Method(WIDE, 2, "prodigy", rates=(1.0,)),
}
BESIDE = {
    "with feed-forward, 2, importance": Method(WIDE, 2, importance=True),
    "ours": Method(OURS, optimizer="natural", rates=(0.0,)),
    "ours, then AdamW": Method(OURS, rates=(7.5e-4, 1.5e-3, 3e-3)),
}
METHODS = ORDINARY | BESIDE
Curve = list[tuple[float, float]]


def cost_of(forward: int, backward: int) -> float:
    """Of passes of single pictures; a backward pass counts as two forward ones."""
    return (forward + 2 * backward) / 3 / STEP


def rank_of(method: Method, rank: int) -> int:
    """So that all methods have the same number of parameters: with feed-forward layers an ordinary
    LoRA has twice as many."""
    return rank // 2 if method.start is WIDE else rank


def run(
    model: StableDiffusion,
    subject: EncodedImages,
    validate: Callable[[], float],
    method: Method,
    rate: float,
    rank: int,
    seed: int,
) -> dict[str, Any]:
    """The curve of held-out losses over the cost, and the seconds it took without them."""
    base, away, began = validate(), [0.0], time.perf_counter()
    curve: Curve = [(0.0, 1.0)]

    def look() -> float:
        started = time.perf_counter()
        loss = validate() / base
        away[0] += time.perf_counter() - started
        return loss

    config = replace(method.start, rank=rank_of(method, rank), seed=seed)
    start = calibrate(model, subject, config)
    if method.importance:
        start = replace(start, importance=Importance.usual())
    spent = cost_of(start.report.forward_passes, start.report.backward_passes)
    steps = round((COSTS[-1] - spent) * STEP / method.batch)
    training = TrainConfig(
        steps=steps,
        learning_rate=rate or 1e-3,
        batch_size=method.batch,
        optimizer=method.optimizer,
        seed=seed,
        validate_every=max(1, round(5 * STEP / method.batch)),
        keep_best=False,
        patience=0,
    )

    def note(event: Event) -> None:
        if isinstance(event, Validation):
            curve.append((spent + event.step * method.batch / STEP, event.loss))

    run_training(model, subject, config, training, start=start, validate=look, observer=note)
    seconds = time.perf_counter() - began - away[0]
    return {"curve": [(round(c, 2), round(x, 5)) for c, x in curve], "seconds": round(seconds, 1)}


def at(curve: Curve, cost: float) -> float:
    """The loss at a cost, between the points on a straight line; before the first point it is that
    of the untouched model."""
    before = max((p for p in curve if p[0] <= cost), default=curve[0])
    after = min((p for p in curve if p[0] >= cost), default=before)
    share = (cost - before[0]) / (after[0] - before[0]) if after[0] > before[0] else 0.0
    return before[1] + share * (after[1] - before[1])


def mean_curve(rows: Sequence[Curve]) -> Curve:
    return [(c, statistics.mean(at(row, c) for row in rows)) for c in COSTS]


class Results:
    """The results file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
        self.rows = {json.dumps(row["key"]): row for row in map(json.loads, lines)}

    def add(self, key: list[Any], row: dict[str, Any]) -> None:
        self.rows[json.dumps(key)] = {"key": key, **row}
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"key": key, **row}) + "\n")

    def curves(self, rank: int, subject: str, method: str) -> dict[float, Curve]:
        """By learning rate, the mean over the seeds."""
        found: dict[float, list[Curve]] = {}
        for row in self.rows.values():
            of_rank, of_subject, of_method, rate, _ = row["key"]
            if (of_rank, of_subject, of_method) == (rank, subject, method):
                found.setdefault(rate, []).append(row["curve"])
        return {rate: mean_curve(rows) for rate, rows in found.items()}

    def strongest(self, rank: int, subject: str, methods: Sequence[str]) -> Curve:
        """At each cost the lowest loss of any method at any rate: nobody could choose better."""
        every = [c for m in methods for c in self.curves(rank, subject, m).values()]
        return [(cost, min(curve[n][1] for curve in every)) for n, cost in enumerate(COSTS)]


def report(results: Results, rank: int, subjects: Sequence[str]) -> str:
    """Markdown: the strongest ordinary LoRA and ours at every cost, by subject."""
    lines = [f"| rank {rank} | " + " | ".join(f"cost {c}" for c in COSTS) + " |"]
    lines.append("|---" * (len(COSTS) + 1) + "|")
    shares: dict[str, list[list[float]]] = {}
    for subject in subjects:
        strongest = results.strongest(rank, subject, list(ORDINARY))
        lines.append(_row(f"{subject}: strongest ordinary", strongest))
        for method in BESIDE:
            if curves := results.curves(rank, subject, method):
                best = min(curves.values(), key=lambda curve: min(x for _, x in curve))
                lines.append(_row(f"{subject}: {method}", best))
                ratio = [x / y for (_, x), (_, y) in zip(best, strongest, strict=True)]
                shares.setdefault(method, []).append(ratio)
    for method, rows in shares.items():
        medians = [(c, statistics.median(r[n] for r in rows)) for n, c in enumerate(COSTS)]
        lines.append(_row(f"median share of the strongest: {method}", medians))
    return "\n".join(lines)


def _row(name: str, curve: Curve) -> str:
    return f"| {name} | " + " | ".join(f"{x:.3f}" for _, x in curve) + " |"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--subjects", nargs="+", type=Path, required=True, metavar="DIR")
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--rank", type=int, default=4)
    parser.add_argument("--model", default=MINI_SD)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--report", action="store_true", help="only say what the file holds")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if not args.report:
        _run_all(args)
    print(report(Results(args.output), args.rank, [s.name for s in args.subjects]))


def _run_all(args: argparse.Namespace) -> None:
    model = load_checkpoint(args.model)
    for seed in args.seeds:
        for folder in args.subjects:
            subject, held_out = read_halves(model, folder)
            validate = validation_loss(model, held_out, 8)
            for name in args.methods:
                for rate in METHODS[name].rates:
                    key = [args.rank, folder.name, name, rate, seed]
                    results = Results(args.output)
                    if json.dumps(key) not in results.rows:
                        method = METHODS[name]
                        row = run(model, subject, validate, method, rate, args.rank, seed)
                        results.add(key, row)


if __name__ == "__main__":
    main()
