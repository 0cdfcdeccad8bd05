"""The demonstration: the whole path on the embedded model and pictures, beside an ordinary LoRA."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..config import CalibrationConfig, TrainConfig
from ..data.dataset import read_subject
from ..data.images import find_pictures
from ..defaults import MINI_SD, resolve
from ..errors import SettingError
from ..events import Done, Observer, Status
from ..lora.adapter import LoRA, attached_lora, parameter_count
from ..model.loader import MINI_SD_FOLDER, StableDiffusion, load_checkpoint
from ..model.sampling import sample
from ..report.charts import loss_chart, rank_map, sample_sheet
from ..run.outcome import RunResult
from ..run.runs import run_training
from ..run.saving import save_run
from ..training.validation import validation_loss
from .console import Console, EventFile, broadcast

PROMPT = "a sks cat face emoji"
SEEDS = range(4)
CALIBRATION = CalibrationConfig(rank=4, seed=0)
TRAINING = TrainConfig(seed=0, validate_every=20)


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
    # Each start at its own best learning rate on this subject (benchmarks/learning_rate.py).
    training, ordinary = (
        resolve(TRAINING, model.name, init, subject.picture_count)
        for init in (CALIBRATION.init, "gaussian")
    )
    run = run_training(model, subject, CALIBRATION, training, validate=validate, observer=observer)
    lora = save_run(
        folder / "lora.safetensors",
        run.lora,
        model,
        subject,
        steps=run.kept_step,
        calibration=CALIBRATION,
        training=run.training,
        overwrite=True,
        observer=observer,
    )
    observer(Status("The same steps from an ordinary start (gaussian), to compare"))
    plain = replace(CALIBRATION, init="gaussian")
    gaussian = run_training(model, subject, plain, ordinary, validate=validate)
    observer(Status("Drawing"))
    _draw(folder, model, run, gaussian, observer)
    return {
        "lora": str(lora),
        "base_loss": run.base_loss,
        "step0_loss": run.validations[0][1],
        "final_loss": run.kept_loss,
        "kept_step": run.kept_step,
        "strength": run.strength,
        "gaussian_final_loss": gaussian.kept_loss,
    }


def _draw(
    folder: Path, model: StableDiffusion, run: RunResult, gaussian: RunResult, observer: Observer
) -> None:
    """Samples, ranks and losses, as pictures."""

    def drawn(factors: LoRA) -> list[Any]:
        with attached_lora(model.unet, factors):
            return sample(model, [PROMPT] * len(SEEDS), SEEDS, observer=observer)

    rows = [
        ("base", drawn({})),
        ("step 0, calibrated", drawn(run.start.lora)),
        (f"step {run.kept_step}, trained", drawn(run.lora)),
    ]
    pictures = [p.image for p in find_pictures(MINI_SD_FOLDER / "subject")]
    title = f"{PROMPT} - same seeds in every row"
    sample_sheet(rows, subject=pictures, title=title).save(folder / "samples.png")
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
    title = "Held-out loss against training steps"
    loss_chart(curves, title=title, base=run.base_loss).save(folder / "loss.png")
