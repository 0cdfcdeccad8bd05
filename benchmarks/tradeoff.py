"""What a LoRA's fit costs: forgetting at equal subject loss, prompt fidelity at equal subject
fidelity.

    python benchmarks/tradeoff.py --subjects subjects/hearts subjects/clocks --data
    mini-sd-build/data --output tradeoff.jsonl

Each contestant is looked at on its way, all in batches of 2: an ordinary LoRA (with feed-forward
layers in the same number of parameters, AdamW, averaged weights) after so many training steps, ours
after each effort of calibration and after the steps that follow; every LoRA at the strength that
fits the held-out pictures best. The ordinary LoRA counts up to its lowest loss (its highest subject
fidelity); where ours is better still, it is compared with that. A second table is at equal loss,
the lowest that both reach: what each forgets least for it, at any of its looks and any strength.
`class` preserves what the model itself draws for the class prompt, `domain` 32 pictures of the
pre-training domain, of which 48 others measure the forgetting (fidelity.py). Resumable, a line for
each look.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from fidelity import (
    Domain,
    Reference,
    domain,
    forgetting,
    halves_of,
    measure,
    prior_triples,
    subject_reference,
)
from strengths import STRENGTHS, strongest_strength
from subject_folders import read_halves
from tqdm import tqdm
from tradeoff_report import ORDINARY, Row, at_equal_loss, report

from cntlora_core.calibration.calibrate import Calibration, calibrate
from cntlora_core.config import CalibrationConfig, TrainConfig
from cntlora_core.data.batches import NoisedSet
from cntlora_core.data.class_images import class_images, class_noised
from cntlora_core.data.encoded import EncodedImages
from cntlora_core.defaults import MINI_SD
from cntlora_core.lora.adapter import LoRA, attached_lora, scaled
from cntlora_core.model.loader import StableDiffusion, load_checkpoint
from cntlora_core.training.loop import train
from cntlora_core.training.state import start_state
from cntlora_core.training.validation import validation_loss

ORDINARY_STEPS = (20, 40, 80, 160, 240)
OURS_STEPS = (60,)
LOOKS = ("balanced", "thorough")
PRIORS = ("none", "class", "domain")
PATH = (0.2, *sorted(STRENGTHS))  # strengths, from the untouched model on


def trained(
    model: StableDiffusion,
    subject: EncodedImages,
    start: Calibration,
    lr: float,
    seed: int,
    looks: tuple[int, ...],
) -> Iterator[tuple[int, LoRA]]:
    """The LoRA after each number of steps in `looks`, in one run."""
    config = TrainConfig(
        steps=max(looks), learning_rate=lr, seed=seed, batch_size=2, validate_every=0
    )
    found: dict[int, LoRA] = {}
    with attached_lora(model.unet, start.lora, trainable=True) as adapters:
        state = start_state(model, adapters, config, start.natural, start.importance)

        def keep(_state: Any) -> None:
            if state.step in looks:
                found[state.step] = adapters.factors()

        train(model, subject, state, config, preservation=start.preservation, save=keep)
    yield from found.items()


def looks(
    model: StableDiffusion,
    subject: EncodedImages,
    priors: dict[str, NoisedSet | None],
    args: Any,
    seed: int,
) -> Iterator[tuple[str, str, LoRA]]:
    """(contestant, when, LoRA)."""
    half = CalibrationConfig().rank // 2  # with feed-forward layers twice as many parameters
    config = CalibrationConfig(init="gaussian", targets="attention+ff", rank=half, seed=seed)
    ordinary = calibrate(model, subject, config)
    for step, lora in trained(model, subject, ordinary, args.lr, seed, ORDINARY_STEPS):
        yield ORDINARY, f"step {step}", lora
    for name, prior in priors.items():
        config = CalibrationConfig(seed=seed, targets=args.targets)
        for effort in LOOKS:
            start = calibrate(model, subject, replace(config, effort=effort), prior=prior)
            yield f"target, {name}", effort, start.lora
            for step, later in trained(model, subject, start, args.lr, seed, OURS_STEPS):
                yield f"target, {name}", f"{effort} + {step}", later


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--subjects",
        nargs="+",
        type=Path,
        required=True,
        metavar="DIR",
        help="with train/ and heldout/",
    )
    parser.add_argument(
        "--data", type=Path, required=True, help="made by benchmarks/mini_sd/prepare_data.py"
    )
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--targets", default="auto", help="of ours")
    parser.add_argument("--lr", type=float, default=3e-3, help="of the ordinary LoRA")
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args()
    held = args.output.read_text(encoding="utf-8").splitlines() if args.output.is_file() else []
    rows: list[Row] = [json.loads(line) for line in held]
    for rate in {r.get("lr", "?") for r in rows} - {args.lr}:
        raise SystemExit(f"'{args.output}' is of rate {rate}: give another --output.")
    done = {
        (r["subject"], r["seed"])
        for r in rows
        if r["when"] == f"{LOOKS[-1]} + {OURS_STEPS[-1]}"
        and r["contestant"] == f"target, {PRIORS[-1]}"
    }
    rows = [r for r in rows if (r["subject"], r["seed"]) in done]  # the others are made anew
    model = load_checkpoint(MINI_SD)
    of = domain(model, args.data)
    for folder in tqdm(args.subjects):
        folders, (prompt, class_prompt) = halves_of(folder)
        to = subject_reference(model, folders, (prompt, class_prompt))
        subject, held_out = read_halves(model, folder)
        validate = validation_loss(model, held_out, 16)
        base = validate()
        priors = {
            "none": None,
            "class": class_noised(model, class_images(model, class_prompt, subject.resolution)),
            "domain": prior_triples(model, args.data),
        }
        for seed in args.seeds:
            if (folder.name, seed) in done:
                continue
            for contestant, when, lora in looks(model, subject, priors, args, seed):
                row = {"subject": folder.name, "seed": seed, "contestant": contestant, "when": when}
                row |= {"lr": args.lr} | _look(model, lora, validate, base, to, of)
                rows.append(row)
                with args.output.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(row) + "\n")
    print(report(rows), at_equal_loss(rows), sep="\n\n")


def _look(
    model: StableDiffusion, lora: LoRA, validate: Any, base: float, to: Reference, of: Domain
) -> Row:
    path = {}
    for each in PATH:
        with attached_lora(model.unet, scaled(lora, each)):
            path[each] = (validate() / base, forgetting(model, of))
    strength, loss = strongest_strength(lambda s: path[s][0])
    with attached_lora(model.unet, scaled(lora, strength)):
        scores = measure(model, to)
    return {
        "loss": loss,
        "strength": strength,
        "forgetting": path[strength][1],
        "path": [*path.values()],
        **{("subject_fidelity" if n == "subject" else n): v for n, v in scores.items()},
    }


if __name__ == "__main__":
    main()
