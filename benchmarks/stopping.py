"""Early stop and averaged weights: what they save and what they lose, on several subjects.

    python benchmarks/stopping.py --output stopping.jsonl --subjects subjects/*
    python benchmarks/stopping.py --output stopping.jsonl --table

A running mean of the weights does not change how they are trained, so one run judges every decay:
all means are kept beside the weights and validated on the held-out pictures. Where a patience would
have stopped is read off the same curve. Losses are shares of the untouched model's.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from subject_folders import read_halves

from cntlora_core.config import CalibrationConfig, TrainConfig
from cntlora_core.defaults import MINI_SD, resolve
from cntlora_core.lora.adapter import attached_lora
from cntlora_core.lora.averaging import RunningAverage
from cntlora_core.model.cpu_convolutions import convolutions_as_matmul
from cntlora_core.model.loader import StableDiffusion, load_checkpoint
from cntlora_core.run.runs import run_calibration
from cntlora_core.training.loop import train
from cntlora_core.training.state import TrainState, start_state
from cntlora_core.training.validation import validation_loss

METHODS = {
    "ours": CalibrationConfig(),
    "ordinary": CalibrationConfig(init="gaussian", targets="attention"),
}
DECAYS = (0.0, 0.9, 0.95, 0.98, 0.99)
PATIENCES = (3, 5, 8)
EVERY = 10  # steps between validations
STEPS = 200  # twice what is chosen for the embedded model


def run(model: StableDiffusion, folder: Path, method: str, seed: int) -> dict[str, Any]:
    """The held-out losses at every look, of each decay."""
    subject, held_out = read_halves(model, folder)
    validate = validation_loss(model, held_out, 8)
    config = replace(METHODS[method], seed=seed)
    with convolutions_as_matmul(model.unet):
        base = validate()
    start = run_calibration(model, subject, config)
    training = resolve(
        TrainConfig(steps=STEPS, seed=seed, averaging=0.0, patience=0, validate_every=0),
        model.name, config.init, subject.picture_count,
    )  # fmt: skip
    curves: dict[str, list[float]] = {str(decay): [] for decay in DECAYS}
    with (
        convolutions_as_matmul(model.unet),
        attached_lora(model.unet, start.lora, trainable=True) as adapters,
    ):
        state = start_state(model, adapters, training, start.natural, start.importance)
        means = {decay: _mean(state, decay) for decay in DECAYS}

        def look(state: TrainState) -> None:
            if state.step:
                for mean in means.values():
                    mean.add(state.live)
            if state.step % EVERY:
                return
            for decay, mean in means.items():
                state.flat.detach().copy_(mean.value)
                curves[str(decay)].append(round(validate() / base, 5))
            state.flat.detach().copy_(state.live)

        train(model, subject, state, training, preservation=start.preservation, save=look)
    return curves


def _mean(state: TrainState, decay: float) -> RunningAverage:
    """As a run begins it: where the calibration's mean stands; with no decay the last weights."""
    mean = RunningAverage(state.average.value if decay else state.live, decay)
    mean.count = state.average.count if decay else 0
    return mean


def stopped(curve: Sequence[float], patience: int) -> tuple[int, float]:
    """The steps made and the lowest loss, where so many looks without a better one end the run."""
    best = 0
    for n, loss in enumerate(curve):
        if loss < curve[best]:
            best = n
        if n - best >= patience:
            return n * EVERY, curve[best]
    return (len(curve) - 1) * EVERY, curve[best]


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Markdown: the lowest losses of each subject, their median, and that of the last losses' share
    of the lowest without a mean; then what each patience saves and loses."""
    parts = []
    for method in METHODS:
        mine = _means(r for r in rows if r["method"] == method)
        if not mine:
            continue
        parts.append(f"| {method}: weights averaged | {' | '.join(mine)} | median | at the end |")
        parts.append("|---" * (len(mine) + 3) + "|")
        lowest = [min(curves[str(DECAYS[0])]) for curves in mine.values()]
        for decay in map(str, DECAYS):
            best = [min(curves[decay]) for curves in mine.values()]
            ends = [
                curves[decay][-1] / low for curves, low in zip(mine.values(), lowest, strict=True)
            ]
            cells = [*best, statistics.median(best), statistics.median(ends)]
            parts.append(f"| {decay} | " + " | ".join(f"{x:.3f}" for x in cells) + " |")
        parts.append("")
        parts.append(f"| {method}: patience | steps | lost | " + " | ".join(mine) + " |")
        parts.append("|---" * (len(mine) + 3) + "|")
        for patience in PATIENCES:
            ends = [stopped(curves["0.95"], patience) for curves in mine.values()]
            least = [min(curves["0.95"]) for curves in mine.values()]
            lost = [end[1] / low - 1 for end, low in zip(ends, least, strict=True)]
            cells = [f"{end[0]}, {x:.1%}" for end, x in zip(ends, lost, strict=True)]
            steps, worst = statistics.mean(end[0] for end in ends), max(lost)
            parts.append(f"| {patience} | {steps:.0f} | {worst:.1%} | " + " | ".join(cells) + " |")
        parts.append("")
    return "\n".join(parts)


def _means(rows: Iterable[dict[str, Any]]) -> dict[str, dict[str, list[float]]]:
    """By subject its curves, each look's mean over the seeds."""
    seeds: dict[str, list[dict[str, list[float]]]] = {}
    for row in rows:
        seeds.setdefault(row["subject"], []).append(row["curves"])
    return {
        name: {
            decay: [statistics.mean(look) for look in zip(*(o[decay] for o in own), strict=True)]
            for decay in own[0]
        }
        for name, own in seeds.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True, metavar="RUNS.jsonl")
    parser.add_argument("--subjects", type=Path, nargs="*", default=[], metavar="DIR")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--table", action="store_true", help="print what the results say")
    args = parser.parse_args()
    lines = args.output.read_text("utf-8").splitlines() if args.output.is_file() else []
    rows = [json.loads(line) for line in lines]
    done = {(r["subject"], r["method"], r["seed"]) for r in rows}
    model = load_checkpoint(MINI_SD)
    for folder in args.subjects:
        for method in args.methods:
            key = (folder.name, method, args.seed)
            if key in done:
                continue
            curves = run(model, folder, method, args.seed)
            row = dict(zip(("subject", "method", "seed"), key, strict=True)) | {"curves": curves}
            rows.append(row)
            with args.output.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
    if args.table:
        print(table(rows))


if __name__ == "__main__":
    main()
