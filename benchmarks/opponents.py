"""Ours against the strongest ordinary LoRA: held-out loss at equal cost, nothing of ours tuned.

    python benchmarks/opponents.py --output runs.jsonl --subjects subjects/*

An ordinary LoRA gets every choice that a good trainer would make: attention alone or with
feed-forward layers (in the same number of parameters), batches of 1, 2 and 4, AdamW with betas
(0.9, 0.99), Prodigy, schedule-free AdamW, Muon or Riemannian AdamW, weights averaged over the
steps, timesteps by importance as a row of its own, and of every row the learning rate that is best
on that very subject. PEFT's own starts are rows beside these. Of every LoRA, ours too, the best of
four strengths counts at every cost: whole, 0.8, 0.6 or 0.4. `ours, held out` is without any
hindsight: one of the pictures is left out, as the nodes do it, and it alone says the strength.

A subject is a folder with `train/` and `heldout/` (benchmarks/mini_sd/prepare_data.py makes them).
The cost counts every pass: three forward passes are what a forward and a backward pass cost, and 4
pictures are a step. Losses are shares of the untouched model's. Every run is a line of the results
file, and no run is made twice; several processes may share it.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from contestants import METHODS, ORDINARY, Method, rank_of
from factor_optimizers import factor_optimizer
from opponents_report import Results, figure, report
from peer_starts import peer_start, without
from strengths import STRENGTHS, strongest_strength
from subject_folders import read_halves
from torch import Tensor

from cntlora_core.calibration.calibrate import Calibration, calibrate, continued
from cntlora_core.config import CalibrationConfig, TrainConfig
from cntlora_core.data.encoded import EncodedImages, with_validation
from cntlora_core.data.importance import Importance
from cntlora_core.defaults import MINI_SD, VALIDATION_TIMESTEPS
from cntlora_core.lora.adapter import Adapters, Factors, attached_lora, scaled
from cntlora_core.model.loader import StableDiffusion, load_checkpoint
from cntlora_core.training.loop import train
from cntlora_core.training.state import TrainState, start_state
from cntlora_core.training.validation import validation_loss

COSTS = (10, 15, 20, 30, 45, 60, 90, 120)
ON_FACTORS = ("muon", "riemannian")
STEP = 4  # pictures that are one step of cost


def cost_of(forward: int, backward: int) -> float:
    """Of passes of single pictures; a backward pass counts as two forward ones."""
    return (forward + 2 * backward) / 3 / STEP


@dataclass
class Judge:
    """What a LoRA is worth on the held-out pictures, as a share of the untouched model's loss:
    whole, and at its best strength; `alone` finds that without looking at them."""

    validate: Callable[[], float]
    alone: Callable[[], float] | None = None

    def __post_init__(self) -> None:
        self.base = self.validate()

    def __call__(
        self, adapters: Adapters, strengths: Sequence[float] = STRENGTHS
    ) -> dict[str, float]:
        """Of what is attached, and is so again afterwards."""
        lora = adapters.factors()

        @cache
        def at(strength: float, loss: Callable[[], float]) -> float:
            adapters.load(scaled(lora, strength))
            return loss()

        strength, _ = strongest_strength(lambda s: at(s, self.alone or self.validate), strengths)
        loss, whole = at(strength, self.validate), at(1.0, self.validate)
        adapters.load(lora)
        return {"whole": whole / self.base, "loss": loss / self.base, "strength": strength}


def run(
    model: StableDiffusion,
    subject: EncodedImages,
    judge: Judge,
    method: Method,
    rate: float,
    rank: int,
    seed: int,
    until: float = math.inf,
) -> dict[str, Any]:
    """What the LoRA was worth at every cost `until` one, and the seconds it took without the
    looks."""
    costs = [cost for cost in COSTS if cost <= until]
    began, away = time.perf_counter(), 0.0
    config = replace(method.start, rank=rank_of(method, rank), seed=seed)
    start, taken_off = _begin(model, subject, method.peer, config)
    if method.alpha:  # Adam's steps of both factors by the root are as alpha / rank beside B A
        root = (method.alpha / config.rank) ** 0.5
        start, rate = _scaled(start, root), rate * root
    if method.importance:
        start = replace(start, importance=Importance.usual())
    spent = cost_of(start.report.forward_passes, start.report.backward_passes)
    spent += cost_of(len(STRENGTHS) * VALIDATION_TIMESTEPS, 0) if method.held_out else 0
    later = [cost for cost in costs if cost >= spent]
    at = {round((cost - spent) * STEP / method.batch): cost for cost in later}
    plain = method.alpha or method.optimizer == "schedulefree"
    training = TrainConfig(
        steps=max(at),
        learning_rate=rate or 1e-3,
        batch_size=method.batch,
        optimizer="adamw" if method.optimizer in ON_FACTORS else method.optimizer,
        averaging=0.0 if plain else TrainConfig.averaging,
        seed=seed,
        validate_every=0,
    )
    untouched = {"loss": 1.0, "whole": 1.0, "strength": 1.0}
    found = dict.fromkeys(costs, untouched)
    # Of what took its start off the base weights no part can be given out by itself.
    strengths = STRENGTHS[:1] if taken_off else STRENGTHS
    with (
        without(model, taken_off),
        attached_lora(model.unet, start.lora, trainable=True) as adapters,
    ):
        natural = start.natural if method.optimizer == "natural" else None
        state = start_state(model, adapters, training, natural, start.importance)
        if method.optimizer in ON_FACTORS:
            state.optimizer = factor_optimizer(method.optimizer, adapters)
        if method.alpha:
            state.optimizer.param_groups[0]["betas"] = (0.9, 0.999)

        def look(state: TrainState) -> None:
            nonlocal away
            if state.step in at:
                started = time.perf_counter()
                found[at[state.step]] = judge(adapters, strengths)
                away += time.perf_counter() - started

        train(model, subject, state, training, save=look)
    seconds = time.perf_counter() - began - away
    curves = {
        name: [(cost, round(own[name], 5)) for cost, own in found.items()]
        for name in ("loss", "whole", "strength")
    }
    return curves | {"seconds": round(seconds, 1)}


def _begin(
    model: StableDiffusion, subject: EncodedImages, peer: str, config: CalibrationConfig
) -> tuple[Calibration, dict[str, Tensor]]:
    """The start, and what it took off the base weights. As PEFT makes it where a `peer` is named:
    shown as many pictures as our sweep."""
    if not peer:
        return calibrate(model, subject, config), {}
    pictures = config.passes * config.batch_size
    made = peer_start(model, subject, peer, config.rank, config.seed, passes=pictures, batch_size=1)
    start = continued(made.lora)
    passes = {"forward_passes": made.forward, "backward_passes": made.backward}
    return replace(start, report=replace(start.report, **passes)), made.residuals


def _scaled(start: Calibration, by: float) -> Calibration:
    """With rows of A `by` times as long."""
    lora = {name: Factors(own.up, own.down * by) for name, own in start.lora.items()}
    return replace(start, lora=lora)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--subjects", nargs="+", type=Path, required=True, metavar="DIR")
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--rank", type=int, default=4)
    parser.add_argument("--model", default=MINI_SD)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rates", nargs="+", type=float, help="of ordinary LoRAs, not the usual")
    parser.add_argument("--until", type=int, default=COSTS[-1], help="this cost")
    parser.add_argument(
        "--random-crop", action="store_true", help="everybody's pictures in several crops"
    )
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--figure", type=Path, help="also draw what the file holds")
    parser.add_argument("--report", action="store_true", help="only say what the file holds")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    shown = " in random crops" if args.random_crop else ""
    setup = Path(args.model).stem + shown  # one results file is of one
    if not args.report:
        _run_all(args, setup)
    what = (
        Results(args.output, setup),
        args.rank,
        [s.name for s in args.subjects],
        args.methods,
    )
    print(report(*what))
    if args.figure:
        figure(*what).save(args.figure)


def _run_all(args: argparse.Namespace, setup: str) -> None:
    model = load_checkpoint(args.model, device=args.device)
    for seed in args.seeds:
        for folder in args.subjects:
            subject, held_out = read_halves(model, folder, random_crop=args.random_crop)
            judge = Judge(validation_loss(model, held_out, 8))
            training, one = with_validation(subject)
            alone = Judge(judge.validate, validation_loss(model, one, 8))
            for name in args.methods:
                for rate in (args.rates if name in ORDINARY else None) or METHODS[name].rates:
                    key = [args.rank, folder.name, name, rate, seed]
                    results = Results(args.output, setup)
                    if json.dumps(key) not in results.rows:
                        method = METHODS[name]
                        halves = (training, alone) if method.held_out else (subject, judge)
                        row = run(model, *halves, method, rate, args.rank, seed, args.until)
                        results.add(key, row)


if __name__ == "__main__":
    main()
