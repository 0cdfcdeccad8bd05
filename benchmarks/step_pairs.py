"""How much longer a natural-gradient step takes than AdamW's on the same pictures.

    python benchmarks/step_pairs.py --batch-size 1

Trainings of the embedded model in turn, a calibrated start with natural steps (one of eight brings
its metric up to date) and an ordinary one with AdamW, as many parameters each; the ratio of their
times, of each pair and in the median, by the clock and in processor time. On a machine with other
work to do only the ratios tell.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path

import torch

from cntlora_core.calibration.calibrate import Calibration, calibrate
from cntlora_core.config import CalibrationConfig, TrainConfig
from cntlora_core.data.dataset import read_subject
from cntlora_core.data.encoded import EncodedImages
from cntlora_core.defaults import MINI_SD
from cntlora_core.lora.adapter import attached_lora
from cntlora_core.model.loader import MINI_SD_FOLDER, StableDiffusion, load_checkpoint
from cntlora_core.training.loop import train
from cntlora_core.training.state import TrainState, start_state

Times = tuple[float, float]  # by the clock and of the processor, seconds


def seconds(
    model: StableDiffusion, subject: EncodedImages, start: Calibration, batch_size: int, steps: int
) -> Times:
    """Of so many steps after the first."""
    config = TrainConfig(
        steps=steps + 1, learning_rate=1e-3, batch_size=batch_size, validate_every=0, seed=0
    )
    at: list[Times] = []

    def note(state: TrainState) -> None:
        at.append((time.perf_counter(), time.process_time()))

    with attached_lora(model.unet, start.lora, trainable=True) as adapters:
        state = start_state(model, adapters, config, start.natural, start.importance)
        train(model, subject, state, config, save=note)
    (clock, processor), (ended, worked) = at[0], at[-1]
    return ended - clock, worked - processor


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--subject", type=Path, default=MINI_SD_FOLDER / "subject")
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--steps", type=int, default=48)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    model = load_checkpoint(MINI_SD)
    subject = read_subject(model, args.subject, "a sks cat face emoji")
    quick = CalibrationConfig(effort="quick", batch_size=args.batch_size)
    ordinary = CalibrationConfig(init="gaussian", targets="attention+ff", rank=2)
    starts = [calibrate(model, subject, config) for config in (ordinary, quick)]
    ratios: list[list[float]] = []
    for _ in range(args.pairs):
        plain, natural = (
            seconds(model, subject, start, args.batch_size, args.steps) for start in starts
        )
        ratios.append([n / p for n, p in zip(natural, plain, strict=True)])
        each = 1000 * plain[1] / args.steps
        print(
            f"{ratios[-1][0]:.2f} by the clock, {ratios[-1][1]:.2f} of {each:.0f} ms of processor"
        )
    clock, processor = (statistics.median(own) for own in zip(*ratios, strict=True))
    print(f"median {clock:.2f} by the clock, {processor:.2f} of processor time")


if __name__ == "__main__":
    main()
