"""Seconds and peak memory of every phase on a GPU, at real size, with random weights: one command.

    python benchmarks/gpu.py --output gpu.json
    python benchmarks/gpu.py --script train_dreambooth_lora.py --comfyui PATH --output gpu.json

SD 1.5 at 512 px and SDXL at 1024 px in bf16, batch 1, 2 and 4: encoding, calibration of each
length, AdamW and natural-gradient steps, drawing; and a profile of a step. Then smaller cards: all
but so many GB of the memory are taken, and a run has to find its way (in bf16, and in int8). With
`--script` and `--comfyui` (see throughput.py) diffusers' script and ComfyUI's node train SD 1.5 on
the same card in the same run. Prints a table for docs/performance.md as it goes and writes JSON
with the card's name. Where there is no CUDA it runs the same code on the embedded miniature.

Peaks are of what tensors hold, and of what the process takes from the card for them. It takes about
9 GB of disk in the temporary folder (none where `--checkpoints` names a folder with sd1.safetensors
and sdxl.safetensors made by make_checkpoint.py), and 45 GB of GPU memory for all rows; a row that
does not fit says so.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise, product
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from gpu_report import Report
from PIL import Image

from cntlora_core.calibration.calibrate import Calibration
from cntlora_core.calibration.closed_form import Fitted, fitted_step
from cntlora_core.config import EFFORTS, CalibrationConfig, DataConfig, TrainConfig
from cntlora_core.data.dataset import encode_subject
from cntlora_core.data.encoded import EncodedImages
from cntlora_core.data.images import Picture
from cntlora_core.devices import INT8
from cntlora_core.events import Notice, Status, Step
from cntlora_core.model.loader import StableDiffusion, load_checkpoint
from cntlora_core.model.sampling import sample
from cntlora_core.run.runs import run_calibration, run_training

REAL = {"sd1": 512, "sdxl": 1024}
# Smaller cards, GB, and how the weights are stored there.
CARDS = {"sd1": [(4, "bf16")], "sdxl": [(24, "bf16"), (12, "bf16"), (8, "bf16"), (8, INT8)]}
SMALL = {"mini-sd": 64}
PROMPT = "a sks cat"
PICTURES = 4
DRAWING_STEPS = 25
TABLE_HEAD = "| {} | seconds | GB held | GB taken |\n|---|---|---|---|"


class Clock:
    """An observer that notes when steps end: their loss was read, so the device has done them. It
    prints what the run says of the memory."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def __call__(self, event: object) -> None:
        if isinstance(event, Step):
            self.ends.append(time.perf_counter())
        elif isinstance(event, (Notice, Status)) and "memory free" in event.text:
            print(event.text, flush=True)

    @property
    def seconds(self) -> float:
        """The median step's, without the first."""
        return statistics.median(b - a for a, b in pairwise(self.ends))


def pictures(size_px: int) -> list[Picture]:
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randint(0, 256, (PICTURES, size_px, size_px, 3), generator=generator)
    images = [Image.fromarray(p.byte().numpy()) for p in drawn]
    return [Picture(f"{n}.png", image, str(n)) for n, image in enumerate(images)]


def run_phases(
    model: StableDiffusion,
    size_px: int,
    report: Report,
    *,
    batches: tuple[int, ...],
    steps: int,
    efforts: Sequence[str],
) -> EncodedImages | None:
    """Every phase of a run, largest last. The encoded pictures, where those fit."""
    data, found = DataConfig(resolution=size_px, hold_out=False), {}

    def encode() -> None:
        found["subject"] = encode_subject(model, pictures(size_px), PROMPT, data)

    report.measure(f"encode {PICTURES} pictures", encode)
    report.measure(f"draw a picture, {DRAWING_STEPS} steps", lambda: _draw(model, size_px))
    if "subject" in found:
        run_trainings(
            model, found["subject"], report, batches=batches, steps=steps, efforts=efforts
        )
    return found.get("subject")


def run_trainings(
    model: StableDiffusion,
    subject: EncodedImages,
    report: Report,
    *,
    batches: tuple[int, ...],
    steps: int,
    efforts: Sequence[str],
) -> None:
    """A calibration of each of the lengths, in this order, and steps of each kind from the last."""
    found: dict[str, Calibration] = {}
    for turn, effort in enumerate(efforts):
        asked = CalibrationConfig(effort=effort)

        def calibrate(asked: CalibrationConfig = asked) -> None:
            with never_standing_still():
                found["start"] = run_calibration(model, subject, asked, observer=Clock())

        note = "" if turn or len(efforts) == 1 else ", first in the process"
        report.measure(f"calibrate, {effort}, batches of {asked.batch_size}{note}", calibrate)
    if "start" not in found:
        return
    for batch, optimizer in product(batches, ("adamw", "natural")):

        def train(batch: int = batch, optimizer: str = optimizer) -> float:
            clock = Clock()
            config = TrainConfig(
                steps=steps,
                learning_rate=1e-4,
                batch_size=batch,
                optimizer=optimizer,
                validate_every=0,
            )
            start = found["start"]
            run_training(model, subject, CalibrationConfig(), config, start=start, observer=clock)
            return clock.seconds

        report.measure(f"{optimizer} step, batch {batch}", train)


@contextmanager
def never_standing_still() -> Iterator[None]:
    """Random weights have nothing to teach: where no step makes their loss lower, a calibration
    would end before its small steps, which are to be timed."""

    def moved(*given: Any) -> Fitted:
        found = fitted_step(*given)
        return found if found.step else Fitted(1e-8, found.loss, 1e-8)

    with patch("cntlora_core.calibration.calibrate.fitted_step", moved):
        yield


@contextmanager
def card_of(gb: float, report: Report) -> Iterator[None]:
    """All but so many GB of the card are taken while the block runs, what the framework and the
    model hold counted in."""
    torch.cuda.empty_cache()
    rest = max(0, torch.cuda.mem_get_info()[1] - int(gb * 1e9))
    taken = torch.empty(rest, dtype=torch.uint8, device=report.device)
    report.apart = rest
    try:
        yield
    finally:
        report.apart = 0
        del taken
        torch.cuda.empty_cache()


def _draw(model: StableDiffusion, size_px: int) -> None:
    sample(model, [PROMPT], [0], steps=DRAWING_STEPS, size=(size_px, size_px))


def profiles_of(model: StableDiffusion, subject: EncodedImages, steps: int = 3) -> dict[str, str]:
    """Kernels by time, of AdamW's steps and of a short calibration; on a GPU also the host's."""
    config = TrainConfig(steps=steps, learning_rate=1e-4, batch_size=1, validate_every=0)

    def train() -> None:
        run_training(model, subject, CalibrationConfig(init="gaussian"), config)

    def calibrate() -> None:
        with never_standing_still():
            run_calibration(model, subject, CalibrationConfig(effort="quick"))

    return {"steps": _profile(model, train), "calibration": _profile(model, calibrate)}


def _profile(model: StableDiffusion, run: Callable[[], None]) -> str:
    from torch.profiler import ProfilerActivity, profile

    cuda = model.device.type == "cuda"
    with profile(activities=[ProfilerActivity.CPU, *[ProfilerActivity.CUDA] * cuda]) as seen:
        run()
    orders = ["self_cpu_time_total", *["self_cuda_time_total"] * cuda]
    found = seen.key_averages()
    return "\n".join(
        found.table(sort_by=by, row_limit=25, max_name_column_width=60) for by in orders
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, required=True, help="JSON to send")
    parser.add_argument("--script", type=Path, help="diffusers' train_dreambooth_lora.py")
    parser.add_argument("--comfyui", type=Path, help="a checkout of ComfyUI")
    parser.add_argument("--families", nargs="*", choices=list(REAL), default=list(REAL))
    parser.add_argument("--checkpoints", type=Path, help="a folder of make_checkpoint.py's files")
    parser.add_argument("--efforts", nargs="+", choices=list(EFFORTS), default=list(EFFORTS))
    parser.add_argument("--profiles", nargs="*", choices=list(REAL), default=list(REAL))
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--peer-batches", nargs="+", type=int, default=[1, 4])
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    cuda = device.type == "cuda"
    told: dict[str, Any] = {
        "device": torch.cuda.get_device_name() if cuda else platform.processor() or "CPU",
        "torch": torch.__version__,
        "profiles": {},
    }
    report = Report(device, args.output, told)
    with tempfile.TemporaryDirectory() as folder:
        place = args.checkpoints or Path(folder)
        for family in args.families if cuda else SMALL:
            files, size_px = Files(family, place, device), (REAL | SMALL)[family]
            model = files.load("bf16")
            print(TABLE_HEAD.format(f"{family} {size_px} px"), flush=True)
            batches = (1, 2, 4) if cuda else (1, 2)
            efforts = (args.efforts[0], *args.efforts)  # the first twice: libraries load
            subject = run_phases(
                model, size_px, report, batches=batches, steps=args.steps, efforts=efforts
            )
            if subject and (family in args.profiles or not cuda):
                told["profiles"][family] = profiles_of(model, subject)
            if cuda:
                model = run_cards(files, model, size_px, report, args.steps)
                del model
                torch.cuda.empty_cache()
        if cuda and (args.script or args.comfyui):
            from gpu_peers import measure_peers

            files, size_px = Files("sd1", place, device), REAL["sd1"]
            print(TABLE_HEAD.format(f"sd1 {size_px} px"), flush=True)
            measure_peers(args, files.written(), size_px, Path(folder), report)
    report.write()


def run_cards(
    files: Files, model: StableDiffusion, size_px: int, report: Report, steps: int
) -> StableDiffusion:
    """A short calibration and steps of two pictures on every smaller card. The last model."""
    held = "bf16"
    for gb, precision in CARDS[files.family]:
        if precision != held:
            model, held = files.load(precision), precision
        print(TABLE_HEAD.format(f"{files.family} in {precision}, {gb} GB"), flush=True)
        with card_of(gb, report):
            run_phases(model, size_px, report, batches=(2,), steps=steps, efforts=("quick",))
    return model


@dataclass(frozen=True)
class Files:
    """A family's checkpoint of random weights, written when it is not there."""

    family: str
    folder: Path
    device: torch.device

    @property
    def path(self) -> Path:
        return self.folder / f"{self.family}.safetensors"

    def written(self) -> Path:
        from make_checkpoint import write

        if not self.path.exists():
            write(self.path, self.family)
        return self.path

    def load(self, precision: str) -> StableDiffusion:
        """With weights stored in bf16 or int8, on the device."""
        if self.family in SMALL:
            return load_checkpoint(self.family)
        from make_checkpoint import clip_vocabulary

        tokenizer = self.folder / "tokenizer"
        return load_checkpoint(
            self.written(),
            device=self.device,
            dtype=torch.bfloat16,
            tokenizer=tokenizer if tokenizer.exists() else clip_vocabulary(self.folder),
            eight_bits=precision == INT8,
        )


if __name__ == "__main__":
    main()
