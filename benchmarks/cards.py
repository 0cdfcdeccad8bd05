"""What a run plans on cards of 6 to 24 GB, from shapes alone: no GPU is needed.

    python benchmarks/cards.py
    python benchmarks/cards.py --family sdxl --rank 4 --cards 8 12
    python benchmarks/cards.py --family sdxl --prior

For each card SD 1.5 at 512 px and SDXL at 1024 px the sentences that a run says, in bf16 and, where
that does not fit, in int8; with `--prior` where the calibration preserves one. Of a card's GB 0.8
are taken before the model is loaded. Writes a Markdown table.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch

from cntlora_core.calibration.calibrate import Calibration, continued
from cntlora_core.calibration.constraints import Metric
from cntlora_core.calibration.moments import Moments
from cntlora_core.calibration.natural import NaturalStart
from cntlora_core.config import CalibrationConfig, TrainConfig
from cntlora_core.events import Event
from cntlora_core.lora.targets import find_projections, targets_for
from cntlora_core.model.eight_bits import store_in_eight_bits
from cntlora_core.model.families import config_of
from cntlora_core.training import memory_plan
from cntlora_core.training.memory_estimate import meta_lora
from cntlora_core.training.shapes import meta_unet

CARDS = (6, 8, 12, 16, 24)  # GB
TAKEN = 800_000_000  # by the framework 0.6 (measured on an H100), by a screen the rest
SIZES = {"sd1": 512, "sdxl": 1024}


def model_of(family: str, precision: str) -> Any:
    """A model of which only shapes are known."""
    unet = meta_unet(config_of(family)["unet"], torch.bfloat16, "cuda")
    if precision == "int8":
        store_in_eight_bits(unet)
    return SimpleNamespace(
        unet=unet,
        device=torch.device("cuda"),
        dtype=torch.bfloat16,
        family=family,
        vae_scale=8,
        lender=None,
    )


def start_of(model: Any, config: CalibrationConfig, prior: Moments | None) -> Calibration:
    """A calibration's result by its shapes: as many parameters as that rank on the attention's
    layers, the metric of all."""
    projections = find_projections(model.unet, targets_for(config))
    attention = [p for p in projections if p.attention]
    natural = NaturalStart(projections, Metric(config.rho, prior), Moments(), 1.0)
    return replace(continued(meta_lora(attention, config.rank)), natural=natural)


def sentences(
    model: Any, card_gb: float, config: CalibrationConfig, prior: Moments | None = None
) -> list[str]:
    """Of the calibration and of the training, on a card of so many GB."""
    weights = sum(t.nbytes for t in (*model.unet.parameters(), *model.unet.buffers()))
    told: list[Event] = []
    observer: Callable[[Event], None] = told.append
    resolution = SIZES[model.family]
    free = int(card_gb * 1e9) - TAKEN - weights
    with patch.object(memory_plan, "free_memory", lambda device: max(0, free)):
        preserves = prior is not None
        memory_plan.fitted_calibration(model, config, resolution, observer, preserves=preserves)
        training = TrainConfig(steps=1, learning_rate=1e-4, batch_size=config.batch_size)
        start = start_of(model, config, prior)
        memory_plan.fitted_training(model, training, start, resolution, observer)
    return [str(event.to_dict()["text"]) for event in told]


def table(
    family: str,
    cards: Sequence[float],
    config: CalibrationConfig,
    prior: Moments | None = None,
) -> str:
    """A row for each card and precision, up to the first that fits."""
    models = {precision: model_of(family, precision) for precision in ("bf16", "int8")}
    lines = [f"| {family}, {SIZES[family]} px | precision | calibration | training |"]
    lines.append("|---" * 4 + "|")
    for card in cards:
        for precision, model in models.items():
            said = sentences(model, card, config, prior)
            lines.append(" | ".join([f"| {card:g} GB", precision, *said]) + " |")
            if not any("too little" in text for text in said):
                break
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--family", choices=SIZES, action="append")
    parser.add_argument("--cards", type=float, nargs="+", default=CARDS, metavar="GB")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--batch-size", type=int, default=2)
    parser.add_argument("--prior", action="store_true", help="with a prior that is preserved")
    args = parser.parse_args()
    config = CalibrationConfig(rank=args.rank, batch_size=args.batch_size)
    for family in args.family or SIZES:
        prior = Moments() if args.prior else None
        print(table(family, args.cards, config, prior), end="\n\n")


if __name__ == "__main__":
    main()
