"""The demonstration: the whole path on the embedded model and pictures, beside an ordinary LoRA."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..config import CalibrationConfig, TrainConfig
from ..data.dataset import read_subject
from ..data.images import find_pictures
from ..defaults import MINI_SD
from ..errors import SettingError
from ..events import Done, Observer, Status
from ..lora.adapter import Factors, attached_lora, parameter_count
from ..model.loader import MINI_SD_FOLDER, load_checkpoint
from ..model.sampling import sample
from ..report.charts import loss_chart, rank_map, sample_sheet
from ..run import run_training, save_run
from ..training.validation import validation_loss
from .console import Console, EventFile, broadcast

PROMPT = "a sks cat face emoji"
SEEDS = range(4)
CALIBRATION = CalibrationConfig(rank=4, seed=0)
TRAINING = TrainConfig(steps=100, learning_rate=3e-3, seed=0)
# Each method at its own best learning rate on this subject (benchmarks/learning_rate.py).
GAUSSIAN_LR = 1e-2


def run_demo(folder: Path) -> dict[str, Any]:
    """Calibrate, train, draw. Writes lora.safetensors, samples.png, ranks.png, loss.png and
    events.jsonl into `folder`."""
    started = time.monotonic()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SettingError(
            f"The output folder '{folder}' cannot be made ({error.strerror})."
        ) from error
    with Console() as console, EventFile(folder / "events.jsonl") as events:
        observer = broadcast(console, events)
        result = _run(folder, observer)
        result["seconds"] = round(time.monotonic() - started, 1)
        observer(Done(result))
    return result


def _run(folder: Path, observer: Observer) -> dict[str, Any]:
    observer(Status("Loading the embedded miniature Stable Diffusion"))
    model = load_checkpoint(MINI_SD)
    subject = read_subject(model, MINI_SD_FOLDER / "subject", PROMPT, observer=observer)
    held_out = read_subject(model, MINI_SD_FOLDER / "heldout", PROMPT, observer=observer)
    validate = validation_loss(model, held_out, TRAINING.batch_size)
    run = run_training(model, subject, CALIBRATION, TRAINING, validate=validate, observer=observer)
    lora = save_run(
        folder / "lora.safetensors",
        run.lora,
        model,
        subject,
        steps=run.kept_step,
        calibration=CALIBRATION,
        training=TRAINING,
        overwrite=True,
        observer=observer,
    )
    observer(Status("The same steps from an ordinary start (gaussian), to compare"))
    gaussian = run_training(
        model,
        subject,
        replace(CALIBRATION, init="gaussian"),
        replace(TRAINING, learning_rate=GAUSSIAN_LR),
        validate=validate,
    )
    observer(Status("Drawing"))

    def draw(factors: dict[str, Factors]) -> list[Any]:
        with attached_lora(model.unet, factors):
            return sample(model, [PROMPT] * len(SEEDS), SEEDS, observer=observer)

    rows = [
        ("base", draw({})),
        ("step 0, calibrated", draw(run.start.lora)),
        (f"step {run.kept_step}, trained", draw(run.lora)),
    ]
    pictures = [p.image for p in find_pictures(MINI_SD_FOLDER / "subject")]
    sample_sheet(rows, subject=pictures, title=f"{PROMPT} - same seeds in every row").save(
        folder / "samples.png"
    )
    report = run.start.report
    rank_map(
        report.ranks,
        report.energy,
        title="Rank and energy of each projection",
        params=parameter_count(run.lora),
    ).save(folder / "ranks.png")
    curves = {
        "calibrated (target)": run.validations,
        "ordinary LoRA (gaussian)": gaussian.validations,
    }
    loss_chart(curves, title="Held-out loss against training steps", base=run.base_loss).save(
        folder / "loss.png"
    )
    return {
        "lora": str(lora),
        "base_loss": run.base_loss,
        "step0_loss": run.validations[0][1],
        "final_loss": dict(run.validations)[run.kept_step],
        "gaussian_final_loss": dict(gaussian.validations)[gaussian.kept_step],
    }
