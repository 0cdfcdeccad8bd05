"""Train LoRA (DreamBooth)."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from ..cntlora_core.config import CalibrationConfig, TrainConfig
from ..cntlora_core.data.encoded import EncodedImages
from ..cntlora_core.defaults import resolve
from ..cntlora_core.errors import CNTLoRAError
from ..cntlora_core.events import Event, Notice, Saved
from ..cntlora_core.files import DISK, Disk, free_name
from ..cntlora_core.model.loader import StableDiffusion
from ..cntlora_core.run.outcome import RunResult
from ..cntlora_core.run.runs import run_training
from ..cntlora_core.settings import read_settings
from ..cntlora_core.training.prior_loss import BasePrediction, ClassImages, PriorLoss
from ..cntlora_core.training.validation import validation_loss
from . import host
from .host import io
from .reporter import Reporter
from .sampler import Sampler
from .types import (
    CalibratedStart,
    ExtraSettings,
    LoRAInit,
    LoRAModel,
    Pictures,
    Prior,
    SDModel,
    Settings,
    SubjectPictures,
    check_room,
    lora_model,
    to_image,
)
from .widgets import refusal, widgets_of

# The settings on this node; Training Settings has the others.
ON_TRAIN = (
    "steps",
    "learning_rate",
    "seed",
    "batch_size",
    "validate_every",
    "weight_decay",
    "gradient_checkpointing",
)
PRIOR_LOSSES = ("class images", "base prediction")
ORDINARY = CalibrationConfig(init="gaussian")  # the start when none is connected


class TrainLoRA(io.ComfyNode):
    disk = DISK

    @classmethod
    def define_schema(cls) -> io.Schema:
        return host.schema(
            node_id="CNTLoRATrain",
            display_name="Train LoRA",
            category=host.category(),
            search_aliases=["dreambooth", "fine-tune", "finetune", "train lora", "personalise"],
            description="Trains the LoRA on the pictures (DreamBooth). Cancel stops within one "
            "step and keeps the work.",
            inputs=[
                *_wires(),
                *widgets_of(TrainConfig, *ON_TRAIN),
                host.advanced(io.Int)(
                    "sample_every",
                    default=50,
                    optional=True,
                    min=0,
                    max=100_000,
                    tooltip="Draw samples at step 0 and after every so many steps; 0: none. Often "
                    "is pretty but slows training.",
                ),
                host.advanced(io.String)(
                    "sample_prompt",
                    default="",
                    optional=True,
                    tooltip="What to draw; empty: the training prompt.",
                ),
            ],
            outputs=[
                io.LoraModel.Output(
                    display_name="lora",
                    tooltip="For Save LoRA, Preview LoRA or ComfyUI's Load LoRA Model.",
                ),
                io.LossMap.Output(display_name="loss", tooltip="For ComfyUI's Plot Loss Graph."),
                io.Image.Output(display_name="samples", tooltip="The last samples drawn."),
            ],
            hidden=host.IDENTITY,
            is_output_node=True,
        )

    @classmethod
    def validate_inputs(cls, steps: Any = None, learning_rate: Any = None) -> bool | str:
        return refusal(TrainConfig, {"steps": steps, "learning_rate": learning_rate})

    @classmethod
    def execute(
        cls,
        sd_model: StableDiffusion,
        subject: Pictures,
        lora_init: CalibratedStart | None = None,
        validation: Pictures | None = None,
        prior: EncodedImages | None = None,
        settings: ExtraSettings | None = None,
        sample_every: int = 50,
        sample_prompt: str = "",
        **own: Any,
    ) -> io.NodeOutput:
        start = lora_init.config if lora_init else ORDINARY
        made = lora_init.calibration if lora_init else None
        config = read_settings(TrainConfig, own | (settings.fields if settings else {}))
        check_room(sd_model, start, made.lora if made else None)
        with (
            Reporter(host.identity(cls), "CNTLoRATrain", config.steps, disk=cls.disk) as report,
            host.working(sd_model),
        ):
            for text in _without_effect(config, validation, prior, settings):
                report(Notice(text))
            encoded, held_out = subject.encode(sd_model, report)
            if validation:
                if validation.prompt != subject.prompt:
                    report(Notice(_other_words(validation.prompt, subject.prompt)))
                held_out = validation.encode_all(sd_model, report)
            config = resolve(config, sd_model.name, start.init, encoded.picture_count, report)
            sampler = Sampler(sd_model, sample_prompt or encoded.prompt, sample_every, report)

            def finished(run: RunResult) -> LoRAModel:
                return lora_model(run.lora, sd_model, encoded, start, run.training, run.kept_step)

            def keep(run: RunResult) -> None:
                if run.steps:
                    kept.append(_keep(finished(run), run, report, cls.disk))

            kept: list[str] = []
            with _telling_where(kept):
                run = run_training(
                    sd_model,
                    encoded,
                    start,
                    config,
                    prior=_prior_loss(prior, settings),
                    start=made,
                    validate=_validation(sd_model, held_out, config),
                    on_stop=keep,
                    observer=sampler,
                )
            sampler.finish(run)
        images = to_image(sampler.pictures)
        losses = {"loss": sampler.losses or [loss for _, loss in run.validations]}
        return io.NodeOutput(finished(run), losses, images, ui=report.shown())


def _wires() -> list[Any]:
    return [
        SDModel.Input("sd_model", tooltip="From Load SD Checkpoint."),
        SubjectPictures.Input("subject", tooltip="From Subject Images."),
        LoRAInit.Input(
            "lora_init",
            optional=True,
            tooltip="From Calibrate LoRA. Without it an ordinary LoRA of rank 4 is trained.",
        ),
        SubjectPictures.Input(
            "validation",
            optional=True,
            tooltip="Other pictures of the same subject, never trained on: their loss "
            "shows when training overfits. Without it, what Subject Images holds out.",
        ),
        Prior.Input(
            "prior",
            optional=True,
            tooltip="From Prior Images: trains a second loss that keeps the class as it "
            "is. Twice the time a step.",
        ),
        Settings.Input(
            "settings",
            optional=True,
            tooltip="From Training Settings; its defaults without it.",
        ),
    ]


def _validation(
    model: StableDiffusion, held_out: EncodedImages, config: TrainConfig
) -> Callable[[], float] | None:
    return validation_loss(model, held_out, config.batch_size) if config.validate_every else None


@contextmanager
def _telling_where(kept: list[str]) -> Iterator[None]:
    """An error says where the work is."""
    try:
        yield
    except CNTLoRAError as error:
        for place in kept:
            error.add_sentence(f"What was trained is in {place}.")
        raise


def _without_effect(
    config: TrainConfig,
    validation: Pictures | None,
    prior: EncodedImages | None,
    settings: ExtraSettings | None,
) -> list[str]:
    """Inputs that do nothing beside the others, a sentence each."""
    rules = [
        (
            validation is not None and not config.validate_every,
            "The pictures to validate with have no effect: validate_every is 0.",
        ),
        (
            prior is None and settings is not None and settings.prior_loss != PRIOR_LOSSES[0],
            "prior_loss has no effect: no prior is connected.",
        ),
    ]
    return [text for holds, text in rules if holds]


def _other_words(validation: str, subject: str) -> str:
    return (
        f"The pictures to validate with say '{validation}', those to train on '{subject}': the "
        "best weights are chosen by other words. Give both the same trigger and class_name."
    )


def _prior_loss(prior: EncodedImages | None, settings: ExtraSettings | None) -> PriorLoss | None:
    if prior is None:
        return None
    if settings and settings.prior_loss == PRIOR_LOSSES[1]:
        return BasePrediction(prior.conditioning[:1])
    return ClassImages(prior)


def _keep(lora: LoRAModel, run: RunResult, report: Reporter, disk: Disk) -> str:
    """Save what an interrupted run has learnt, and say where."""
    moment = time.strftime("%Y-%m-%d_%H%M%S")
    path = free_name(host.lora_path(f"cntlora-interrupted/{moment}_step{run.kept_step}"))

    def note(event: Event) -> None:
        if isinstance(event, Notice):
            report.note(event)

    saved = lora.write(path, observer=note, disk=disk)
    name = host.lora_name(saved)
    report.note(Saved(name))
    return name if saved.is_absolute() and name == str(saved) else f"loras/{name}"
