"""Train LoRA (DreamBooth)."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields, replace
from typing import Any

from ..cntlora_core.config import CalibrationConfig, TrainConfig
from ..cntlora_core.data.encoded import EncodedImages
from ..cntlora_core.defaults import resolve
from ..cntlora_core.errors import CNTLoRAError
from ..cntlora_core.events import Event, Notice, Saved
from ..cntlora_core.files import DISK, Disk, free_name
from ..cntlora_core.model.loader import StableDiffusion
from ..cntlora_core.presets import PRESETS, with_preset
from ..cntlora_core.run.outcome import RunResult
from ..cntlora_core.run.runs import run_training
from ..cntlora_core.settings import read_settings
from ..cntlora_core.training.identity import run_identity
from ..cntlora_core.training.prior_loss import (
    BasePrediction,
    ClassImages,
    OutsideTheMask,
    PriorLoss,
)
from ..cntlora_core.training.resume import RunSnapshots
from ..cntlora_core.training.validation import validation_loss
from . import host
from .host import io
from .reporter import Reporter
from .sampler import Sampler, Wanted, more_sample_widgets, sample_widgets
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
from .unfinished import GO_ON, snapshots, widgets
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
OUTSIDE = "outside the mask"  # a prior loss that needs no prior
PRIOR_LOSSES = ("class images", "base prediction", OUTSIDE)
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
                *sample_widgets(),
                *more_sample_widgets(),
                *widgets(),
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
    def validate_inputs(
        cls, steps: Any = None, learning_rate: Any = None, unfinished: Any = None
    ) -> bool | str:  # `unfinished` may have ended since it was chosen: `execute` says so
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
        checkpoint_every: int = 100,
        unfinished: str = GO_ON,
        **own: Any,
    ) -> io.NodeOutput:
        start = lora_init or CalibratedStart(None, ORDINARY)
        wanted = Wanted(**{f.name: own.pop(f"sample_{f.name}", f.default) for f in fields(Wanted)})
        config = read_settings(TrainConfig, own | (settings.fields if settings else {}))
        config = with_preset(config, subject.preset)
        check_room(sd_model, start.config, start.calibration.lora if start.calibration else None)
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
            config = _resolved(config, sd_model, start, encoded, held_out, subject.preset, report)
            sampler = Sampler(sd_model, wanted, encoded.prompt, report)
            same = _identity(sd_model, subject, encoded, held_out, start, config, prior, settings)
            checkpoints = snapshots(
                unfinished, encoded.trigger or encoded.prompt, same, checkpoint_every, cls.disk
            )

            def finished(run: RunResult) -> LoRAModel:
                story = (start.config, run.training, run.kept_step, start.source)
                return lora_model(run.lora, sd_model, encoded, *story)

            def keep(run: RunResult) -> None:
                if run.steps:
                    kept.append(_keep(finished(run), run, report, cls.disk))

            kept: list[str] = []
            with _telling_where(kept, checkpoints, report):
                run = run_training(
                    sd_model,
                    encoded,
                    start.config,
                    config,
                    prior=_prior_loss(encoded, prior, settings),
                    start=start.calibration,
                    validate=_validation(sd_model, held_out, config),
                    checkpoints=checkpoints,
                    on_stop=keep,
                    observer=sampler,
                )
            sampler.finish(run)
            checkpoints.remove()
        images = to_image(sampler.pictures)
        losses = {"loss": run.losses or [loss for _, loss in run.validations]}
        return io.NodeOutput(finished(run), losses, images, ui=report.shown())


def _resolved(
    config: TrainConfig,
    model: StableDiffusion,
    start: CalibratedStart,
    subject: EncodedImages,
    held_out: EncodedImages,
    preset: str,
    report: Reporter,
) -> TrainConfig:
    """The settings with numbers where they say auto."""
    if start.source and config.optimizer == "auto":
        config = replace(config, optimizer="adamw")  # a LoRA file holds no metric
    pictures, share = subject.picture_count, PRESETS[preset].steps
    init, held = start.config.init, len(held_out)
    return resolve(config, model.name, init, pictures, report, share=share, held_out=held)


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


def _identity(
    model: StableDiffusion,
    subject: Pictures,
    encoded: EncodedImages,
    held_out: EncodedImages,
    start: CalibratedStart,
    config: TrainConfig,
    prior: EncodedImages | None,
    settings: ExtraSettings | None,
) -> dict[str, Any]:
    """What the run is made from and with."""
    return run_identity(
        model,
        encoded,
        held_out if config.validate_every else None,
        [one.data for one in (subject, *subject.others)],
        start.config,
        config,
        precision=str(model.dtype),
        start=start.made_from,
        continued=start.source and start.source.sha256,
        prior=_prior_identity(prior, settings),
    )


def _prior_identity(prior: EncodedImages | None, settings: ExtraSettings | None) -> list[str]:
    which = settings.prior_loss if settings else PRIOR_LOSSES[0]
    if which == OUTSIDE:
        return [which]
    return [which, prior.digest, prior.prompt] if prior else []


def _validation(
    model: StableDiffusion, held_out: EncodedImages, config: TrainConfig
) -> Callable[[], float] | None:
    return validation_loss(model, held_out, config.batch_size) if config.validate_every else None


@contextmanager
def _telling_where(kept: list[str], checkpoints: RunSnapshots, report: Reporter) -> Iterator[None]:
    """An error says where the work is, and how to go on."""
    try:
        yield
    except CNTLoRAError as error:
        for place in kept:
            error.add_sentence(f"What was trained is in {place}.")
        raise
    except host.Cancelled:
        if checkpoints.ours:
            report.note(Notice("Queue the same graph again and the run goes on where it stopped."))
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
            prior is None and settings is not None and settings.prior_loss == PRIOR_LOSSES[1],
            "prior_loss has no effect: no prior is connected.",
        ),
        (
            prior is not None and settings is not None and settings.prior_loss == OUTSIDE,
            f"The prior has no effect on training: prior_loss is {OUTSIDE}.",
        ),
    ]
    return [text for holds, text in rules if holds]


def _other_words(validation: str, subject: str) -> str:
    return (
        f"The pictures to validate with say '{validation}', those to train on '{subject}': the "
        "best weights are chosen by other words. Give both the same trigger and class_name."
    )


def _prior_loss(
    subject: EncodedImages, prior: EncodedImages | None, settings: ExtraSettings | None
) -> PriorLoss | None:
    if settings and settings.prior_loss == OUTSIDE:
        return OutsideTheMask(subject)
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
