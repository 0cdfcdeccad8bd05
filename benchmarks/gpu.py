"""Seconds and peak memory of every phase on a GPU, at real size, with random weights: one command.

    python benchmarks/gpu.py --output gpu.json
    python benchmarks/gpu.py --script train_dreambooth_lora.py --comfyui PATH --output gpu.json

SD 1.5 at 512 px and SDXL at 1024 px in bf16, batch 1 and 4: encoding, calibration of each length,
AdamW and natural-gradient steps, drawing; and a profile of a step. With `--script` and `--comfyui`
(see throughput.py) diffusers' script and ComfyUI's node train SD 1.5 on the same card in the same
run. Prints a table for docs/performance.md as it goes and writes JSON with the card's name. Where
there is no CUDA it runs the same code on the embedded miniature.

It takes about 9 GB of disk in the temporary folder, and 16 GB of GPU memory for all rows; a row
that does not fit says so.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import tempfile
import threading
import time
from argparse import Namespace
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from cntlora_core.config import EFFORTS, CalibrationConfig, DataConfig, TrainConfig
from cntlora_core.data.dataset import encode_subject
from cntlora_core.data.images import Picture
from cntlora_core.errors import OutOfMemory
from cntlora_core.events import Step
from cntlora_core.model.loader import StableDiffusion, load_checkpoint
from cntlora_core.model.sampling import sample
from cntlora_core.run.runs import run_calibration, run_training

REAL = {"sd1": 512, "sdxl": 1024}
SMALL = {"mini-sd": 64}
PROMPT = "a sks cat"
PICTURES = 4
DRAWING_STEPS = 25


@dataclass
class Report:
    """Rows as they are measured: seconds and peak GB of the device, None where nobody knows."""

    device: torch.device
    rows: list[dict[str, Any]] = field(default_factory=list)

    def add(self, phase: str, seconds: float | None, peak_gb: float | None) -> None:
        self.rows.append({"phase": phase, "seconds": seconds, "peak_gb": peak_gb})
        cells = ["too large" if seconds is None else f"{seconds:.3f}"]
        cells.append("-" if peak_gb is None else f"{peak_gb:.2f}")
        print("| " + " | ".join([phase, *cells]) + " |", flush=True)

    def measure(self, phase: str, run: Callable[[], float | None]) -> Any:
        """`run`'s seconds (those it returns, where it does), with the peak of the device."""
        cuda = self.device.type == "cuda"
        if cuda:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        started = time.perf_counter()
        try:
            own = run()
        except (OutOfMemory, torch.OutOfMemoryError):
            self.add(phase, None, None)
            return
        if cuda:
            torch.cuda.synchronize()
        seconds = time.perf_counter() - started if own is None else own
        self.add(phase, seconds, torch.cuda.max_memory_allocated() / 1e9 if cuda else None)


class Clock:
    """An observer that notes when steps end: their loss was read, so the device has done them."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def __call__(self, event: object) -> None:
        if isinstance(event, Step):
            self.ends.append(time.perf_counter())

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
    model: StableDiffusion, size_px: int, report: Report, *, batches: tuple[int, ...], steps: int
) -> None:
    """Every phase of a run, largest last."""
    data, found = DataConfig(resolution=size_px, hold_out=False), {}

    def encode() -> None:
        found["subject"] = encode_subject(model, pictures(size_px), PROMPT, data)

    report.measure(f"encode {PICTURES} pictures", encode)
    report.measure(f"draw a picture, {DRAWING_STEPS} steps", lambda: _draw(model, size_px))
    for effort in EFFORTS:
        asked = CalibrationConfig(effort=effort, batch_size=1)

        def calibrate(asked: CalibrationConfig = asked) -> None:
            found["start"] = run_calibration(model, found["subject"], asked)

        report.measure(f"calibrate, {effort}", calibrate)
    for batch in batches:
        for optimizer in ("adamw", "natural"):

            def train(batch: int = batch, optimizer: str = optimizer) -> float:
                clock = Clock()
                config = TrainConfig(
                    steps=steps,
                    learning_rate=1e-4,
                    batch_size=batch,
                    optimizer=optimizer,
                    validate_every=0,
                )
                run_training(
                    model,
                    found["subject"],
                    CalibrationConfig(),
                    config,
                    start=found["start"],
                    observer=clock,
                )
                return clock.seconds

            report.measure(f"{optimizer} step, batch {batch}", train)


def _draw(model: StableDiffusion, size_px: int) -> None:
    sample(model, [PROMPT], [0], steps=DRAWING_STEPS, size=(size_px, size_px))


def profile_of_a_step(model: StableDiffusion, size_px: int, steps: int = 3) -> str:
    """Kernels by time."""
    from torch.profiler import ProfilerActivity, profile

    subject = encode_subject(
        model, pictures(size_px), PROMPT, DataConfig(resolution=size_px, hold_out=False)
    )
    config = TrainConfig(steps=steps, learning_rate=1e-4, batch_size=1, validate_every=0)
    cuda = model.device.type == "cuda"
    kinds = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if cuda else [])
    with profile(activities=kinds) as seen:
        run_training(model, subject, CalibrationConfig(init="gaussian"), config)
    by = "self_cuda_time_total" if cuda else "self_cpu_time_total"
    return seen.key_averages().table(sort_by=by, row_limit=25, max_name_column_width=60)


@contextmanager
def watching_the_card(found: list[float]) -> Iterator[None]:
    """The most that all processes held on the card meanwhile, GB, beside what they held before."""
    before, least, stop = torch.cuda.mem_get_info()[0], [], threading.Event()

    def watch() -> None:
        while not stop.wait(0.05):
            least.append(torch.cuda.mem_get_info()[0])

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
        found.append((before - min(least, default=before)) / 1e9)


def measure_peers(args: argparse.Namespace, checkpoint: Path, work: Path, report: Report) -> None:
    """Others' trainers as whole processes, ours too, in the manner of throughput.py."""
    import throughput

    contestants: dict[str, Any] = {"CNTLoRA": throughput.ours}
    contestants |= {"diffusers' script": throughput.diffusers} if args.script else {}
    contestants |= {"ComfyUI's node": throughput.comfyui} if args.comfyui else {}
    folder = work / "model"
    throughput.write_folder(checkpoint, folder)
    for batch in (1, 4):
        data = work / f"peers{batch}"
        data.mkdir()
        throughput.copy_pictures(data / "pictures", batch)
        asked = Namespace(
            script=args.script,
            comfyui=args.comfyui,
            model=checkpoint,
            folder=folder,
            resolution=REAL["sd1"],
            batch_size=batch,
            gpu=True,
        )
        for name, command in contestants.items():
            peak: list[float] = []
            with watching_the_card(peak):
                few, many = (
                    throughput.measure(command(asked, n, data), throughput.ROOT, gpu=True).seconds
                    for n in (2, 42)
                )
            report.add(
                f"sd1 {name}, step of batch {batch}, whole process", (many - few) / 40, *peak
            )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, required=True, help="JSON to send")
    parser.add_argument("--script", type=Path, help="diffusers' train_dreambooth_lora.py")
    parser.add_argument("--comfyui", type=Path, help="a checkout of ComfyUI")
    parser.add_argument("--steps", type=int, default=12)
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    cuda = device.type == "cuda"
    report = Report(device)
    told = {
        "device": torch.cuda.get_device_name() if cuda else platform.processor() or "CPU",
        "torch": torch.__version__,
        "profiles": {},
    }
    with tempfile.TemporaryDirectory() as folder:
        for family, size_px in (REAL if cuda else SMALL).items():
            model, checkpoint = _model(family, Path(folder), device)
            print(f"| {family} {size_px} px | seconds | peak GB |\n|---|---|---|", flush=True)
            batches = (1, 4) if cuda else (1, 2)
            run_phases(model, size_px, report, batches=batches, steps=args.steps)
            told["profiles"][family] = profile_of_a_step(model, size_px)
            del model
            if cuda:
                torch.cuda.empty_cache()
            if cuda and family == "sd1" and (args.script or args.comfyui):
                measure_peers(args, checkpoint, Path(folder), report)
    args.output.write_text(json.dumps(told | {"rows": report.rows}, indent=1), encoding="utf-8")


def _model(family: str, folder: Path, device: torch.device) -> tuple[StableDiffusion, Path]:
    if family in SMALL:
        return load_checkpoint(family), Path(family)
    from make_checkpoint import clip_vocabulary, write

    path = folder / f"{family}.safetensors"
    write(path, family)
    place = folder / "tokenizer"
    tokenizer = place if place.exists() else clip_vocabulary(folder)
    model = load_checkpoint(path, device=device, dtype=torch.bfloat16, tokenizer=tokenizer)
    return model, path


if __name__ == "__main__":
    main()
