"""Subject fidelity and prompt fidelity against cost, from step 0: the paper's kind of figure.

    python benchmarks/progress.py --output progress.jsonl --figure progress.png
    python benchmarks/progress.py --pictures equal_cost.jpg --at 30

Drawings under the subject's prompt are compared with held-out pictures of the subject, drawings
under other prompts with the base model's own (fidelity.py: likeness by the emoji encoder). Cost is
steps of 4 pictures, every pass counted. Ordinary LoRAs train with AdamW and averaged weights in
batches of 2, each at one rate that is good on the miniature, in the same number of parameters; ours
runs as it comes, with and without pictures of the class to preserve. Every look is a line of the
results file; a run that is there whole is not made again. The figure shows means over seeds, bars
from the lowest to the highest, and the lines of the file. `--pictures` draws what the same runs
give at one cost: the subject's prompt, then others, the same noises in every row.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import panels
import torch
from fidelity import (
    GUIDANCE,
    STEPS,
    UNRELATED,
    Reference,
    halves_of,
    measure,
    subject_reference,
)
from opponents import STEP, cost_of
from PIL import Image
from ranks import read
from subject_folders import PROMPT_ALONE
from tradeoff import trained

from cntlora_core.calibration.calibrate import calibrate
from cntlora_core.config import CalibrationConfig
from cntlora_core.data.batches import NoisedSet
from cntlora_core.data.class_images import class_images, class_noised
from cntlora_core.data.dataset import read_subject
from cntlora_core.data.encoded import EncodedImages
from cntlora_core.defaults import MINI_SD
from cntlora_core.lora.adapter import LoRA, attached_lora
from cntlora_core.model.loader import StableDiffusion, load_checkpoint
from cntlora_core.model.sampling import sample
from cntlora_core.report.charts import sample_sheet

COSTS = (10, 20, 30, 45, 60, 90)
BATCH = 2
OTHERS, CELL = 4, 72  # pictures of each kind in a row, and how large they are


@dataclass(frozen=True)
class Method:
    """A start, and the rate of the steps after it (none of ours is asked for one)."""

    start: CalibrationConfig
    rate: float = 1.0
    prior: bool = False


METHODS = {
    "default start, attention": Method(CalibrationConfig(init="default"), 6e-3),
    "gaussian start, attention": Method(CalibrationConfig(init="gaussian"), 6e-3),
    "gaussian start, with feed-forward": Method(
        CalibrationConfig(init="gaussian", targets="attention+ff", rank=2), 3e-3
    ),
    "ours": Method(CalibrationConfig(effort="quick")),
    "ours, with pictures of the class": Method(CalibrationConfig(effort="quick"), prior=True),
}
Row = dict[str, Any]


def looks(
    model: StableDiffusion,
    subject: Any,
    method: Method,
    prior: NoisedSet | None,
    seed: int,
    costs: Sequence[float] = COSTS,
) -> Iterator[tuple[float, LoRA]]:
    """(cost, LoRA) along a run, its start first."""
    start = calibrate(model, subject, replace(method.start, seed=seed), prior=prior)
    spent = cost_of(start.report.forward_passes, start.report.backward_passes)
    if spent:
        yield spent, start.lora
    steps = tuple(round((cost - spent) * STEP / BATCH) for cost in costs if cost > spent)
    for step, lora in trained(model, subject, start, method.rate, seed, steps):
        yield spent + step * BATCH / STEP, lora


def subject_and_class(
    model: StableDiffusion, folder: Path, prompt: str, class_prompt: str
) -> tuple[EncodedImages, NoisedSet]:
    """The pictures to train on, and what the model draws for the class. The drawing is not counted
    as a cost: it is made once for a model and a class."""
    subject = read_subject(model, folder, prompt, PROMPT_ALONE)
    drawn = class_images(model, class_prompt, subject.resolution)
    return subject, class_noised(model, drawn)


def run(model: StableDiffusion, folder: Path | None, seeds: Sequence[int], output: Path) -> None:
    """What the file lacks."""
    folders, (prompt, class_prompt) = halves_of(folder)
    to = subject_reference(model, folders, (prompt, class_prompt))
    subject, prior = subject_and_class(model, folders[0], prompt, class_prompt)
    base = {"cost": 0.0} | _scores(model, {}, to)
    for seed in seeds:
        for name, method in METHODS.items():
            key = {"folder": folder.name if folder else "embedded", "seed": seed, "method": name}
            done = [row for row in read(output) if key.items() <= row.items()]
            if any(row["cost"] > COSTS[-2] for row in done):
                continue
            found = [base]
            for cost, lora in looks(model, subject, method, prior if method.prior else None, seed):
                found.append({"cost": round(cost, 2)} | _scores(model, lora, to))
            with output.open("a", encoding="utf-8") as file:
                file.writelines(json.dumps(key | look) + "\n" for look in found)


def _scores(model: StableDiffusion, lora: LoRA, to: Reference) -> dict[str, float]:
    with attached_lora(model.unet, lora):
        scores = measure(model, to)
    return {name: round(scores[name], 4) for name in ("subject", "unrelated")}


def pictures(model: StableDiffusion, folder: Path | None, at: float, seed: int) -> Image.Image:
    """A row for each training, after it cost `at`."""
    folders, (prompt, class_prompt) = halves_of(folder)
    subject, prior = subject_and_class(model, folders[0], prompt, class_prompt)
    others = [text for text, kind in UNRELATED.items() if kind not in class_prompt]
    prompts = [prompt] * OTHERS + others[:: len(others) // OTHERS][:OTHERS]

    def drawn(lora: LoRA) -> list[Image.Image]:
        with attached_lora(model.unet, lora):
            return sample(model, prompts, range(len(prompts)), steps=STEPS, guidance=GUIDANCE)

    rows = [("the model as it was", drawn({}))]
    for name, method in METHODS.items():
        made = looks(model, subject, method, prior if method.prior else None, seed, costs=(at,))
        lora = list(made)[-1][1]
        rows.append((name, drawn(lora)))
    title = f"{prompt}, and other prompts, after {at:g} steps of 4 pictures"
    return sample_sheet(rows, title=title, cell=CELL)


def table(rows: Sequence[Row], measured: str) -> str:
    """Markdown: means over the seeds, by method and cost."""
    costs = sorted({round(row["cost"]) for row in rows})
    lines = [f"| {measured} | " + " | ".join(f"cost {c}" for c in costs) + " |"]
    lines.append("|---" * (len(costs) + 1) + "|")
    for name in METHODS:
        found = by_cost(rows, name, measured)
        means = {round(c): statistics.mean(values) for c, values in found.items()}
        cells = [f"{means[c]:.3f}" if c in means else "" for c in costs]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def by_cost(rows: Sequence[Row], method: str, measured: str) -> Mapping[float, list[float]]:
    found: dict[float, list[float]] = {}
    for row in rows:
        if row["method"] == method:
            found.setdefault(row["cost"], []).append(row[measured])
    return dict(sorted(found.items()))


def figure(rows: Sequence[Row]) -> Image.Image:
    """Two panels with the methods' lines."""
    titles = {"likeness to the subject": "subject", "likeness of other prompts": "unrelated"}
    return panels.figure(
        {
            title: [panels.Line(name, by_cost(rows, name, measured)) for name in METHODS]
            for title, measured in titles.items()
        }
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--subject", type=Path, help="train/ and heldout/; else the embedded one")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--model", default=MINI_SD)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--figure", type=Path)
    parser.add_argument("--pictures", type=Path)
    parser.add_argument("--at", type=float, default=30, help="cost of the pictures (%(default)s)")
    args = parser.parse_args()
    torch.set_num_threads(1)
    model = load_checkpoint(args.model)
    if args.pictures:
        pictures(model, args.subject, args.at, args.seeds[0]).save(args.pictures, quality=92)
    if not args.output:
        return
    run(model, args.subject, args.seeds, args.output)
    rows = read(args.output)
    print("\n\n".join(table(rows, measured) for measured in ("subject", "unrelated")))
    if args.figure:
        figure(rows).save(args.figure)


if __name__ == "__main__":
    main()
