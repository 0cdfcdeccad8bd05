"""Time and peak host memory of every phase at real size, on the CPU, with a checkpoint of random
weights.

    python benchmarks/make_checkpoint.py sd1 sd1.safetensors
    COMFYUI_PATH=... python benchmarks/real_size.py sd1.safetensors --resolution 128

`--projections N` calibrates only the first N projections (for SDXL on a small machine). Linux only:
it resets the kernel's record of the peak before each phase. Prints one JSON object.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from cntlora_core.calibration.calibrate import calibrate
from cntlora_core.config import EFFORTS, CalibrationConfig, DataConfig, TrainConfig
from cntlora_core.data.dataset import read_subject
from cntlora_core.devices import DTYPES
from cntlora_core.lora.adapter import attached_lora
from cntlora_core.lora.targets import find_projections, targets_for
from cntlora_core.model.gradient_checkpointing import recomputing_activations
from cntlora_core.model.loader import MINI_SD_FOLDER, load_checkpoint
from cntlora_core.run.saving import save_run
from cntlora_core.training.loop import train
from cntlora_core.training.memory_estimate import estimate_training_memory
from cntlora_core.training.state import start_state


def status(key: str) -> float:
    """GB, from the kernel's account of this process."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) / 1e6
    raise KeyError(key)


@contextmanager
def phase(name: str, report: dict) -> Iterator[None]:
    ctypes.CDLL("libc.so.6").malloc_trim(
        0
    )  # give freed memory back, or the next phase would seem to need none
    Path("/proc/self/clear_refs").write_text("5")
    started, before = time.monotonic(), status("VmRSS")
    yield
    seconds = round(time.monotonic() - started, 1)
    report[name] = {
        "seconds": seconds,
        "peak_gb": round(status("VmHWM"), 2),
        "before_gb": round(before, 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoint")
    parser.add_argument("--resolution", type=int, default=128)
    parser.add_argument("--precision", choices=DTYPES, default="fp32")
    parser.add_argument("--rank", type=int, default=4)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--effort", choices=list(EFFORTS), default="quick")
    parser.add_argument("--projections", type=int)
    parser.add_argument("--gradient-checkpointing", action="store_true")
    args = parser.parse_args()
    report: dict = {
        "resolution": args.resolution,
        "precision": args.precision,
        "threads": torch.get_num_threads(),
    }
    report["gradient_checkpointing"] = args.gradient_checkpointing
    with phase("load", report):
        model = load_checkpoint(args.checkpoint, dtype=DTYPES[args.precision])
    report["family"] = model.family
    with phase("encode pictures", report):
        subject = read_subject(
            model,
            MINI_SD_FOLDER / "subject",
            "a sks cat",
            DataConfig(resolution=args.resolution, upscale=True),
        )
    calibration = CalibrationConfig(
        rank=args.rank,
        effort=args.effort,
        batch_size=1,
        gradient_checkpointing=args.gradient_checkpointing,
    )
    chosen = find_projections(model.unet, targets_for(calibration))[: args.projections]
    with phase("calibrate", report):
        start = calibrate(model, subject, calibration, projections=chosen)
    report["calibrate"] |= {
        "projections": len(chosen),
        "loss": start.report.loss,
        "base_loss": start.report.base_loss,
    }
    training = TrainConfig(steps=args.steps, learning_rate=3e-3, batch_size=1, validate_every=0)
    lora = start.lora
    if args.steps:
        with phase("train", report), attached_lora(model.unet, lora, trainable=True) as adapters:
            with recomputing_activations(model.unet, args.gradient_checkpointing):
                train(model, subject, start_state(model, adapters, training), training)
            lora = adapters.factors()
        report["train"]["steps"] = args.steps
        estimate = estimate_training_memory(
            model.family,
            resolution=args.resolution,
            rank=args.rank,
            dtype=model.dtype,
            gradient_checkpointing=args.gradient_checkpointing,
            device="cpu",
        )
        measured = report["train"]["peak_gb"] - report["train"]["before_gb"]
        report["train"] |= {
            "estimated_above_weights_gb": round((estimate.peak - estimate.weights) / 1e9, 2),
            "measured_above_start_gb": round(measured, 2),
        }
    with tempfile.TemporaryDirectory() as folder, phase("save", report):
        saved = save_run(
            Path(folder) / "x.safetensors",
            lora,
            model,
            subject,
            steps=args.steps,
            calibration=calibration,
            training=training,
        )
        report["file_mb"] = round(saved.stat().st_size / 1e6, 1)
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
