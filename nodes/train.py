"""Train LoRA (DreamBooth)."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from ..cntlora_core.config import CalibrationConfig, TrainConfig
from ..cntlora_core.events import Notice
from ..cntlora_core.files import DISK
from ..cntlora_core.model.loader import StableDiffusion
from ..cntlora_core.presets import with_preset
from ..cntlora_core.run.runs import run_training
from ..cntlora_core.settings import read_settings
from . import host
from .checks import check_model, check_prior, check_room, of_other_models
from .host import io
from .host_images import to_image
from .reporter import Reporter, shown
from .sampler import Sampler, Wanted, more_sample_widgets, sample_widgets
from .train_inputs import Keeper, TrainInputs, encoded, without_effect
from .types import (
    CalibratedStart,
    ClassPictures,
    ExtraSettings,
    LoRAInit,
    Maker,
    Pictures,
    Prior,
    SDModel,
    Settings,
    SubjectPictures,
    Traces,
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
            not_idempotent=True,  # the cache must not answer with what another node shows
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
        prior: ClassPictures | None = None,
        settings: ExtraSettings | None = None,
        checkpoint_every: int = 100,
        unfinished: str = GO_ON,
        **own: Any,
    ) -> io.NodeOutput:
        start = lora_init or CalibratedStart(None, ORDINARY)
        more = settings or ExtraSettings()
        wanted = Wanted(**{f.name: own.pop(f"sample_{f.name}", f.default) for f in fields(Wanted)})
        config = with_preset(read_settings(TrainConfig, own | more.fields), subject.preset)
        if start.calibration:
            check_model(sd_model, start.calibration.lora)
        check_prior(sd_model, prior)
        check_room(sd_model, start.config, start.calibration.lora if start.calibration else None)
        before, node = _traces(start, subject, validation), host.identity(cls)
        with (
            Reporter(node, "CNTLoRATrain", config.steps, before=before, disk=cls.disk) as report,
            host.working(sd_model),
        ):
            doubts = of_other_models(Maker.of(sd_model), prior, start)
            idle = without_effect(config, validation, prior is not None, more.prior_loss)
            for text in (*doubts, *idle):
                report(Notice(text))
            parts = encoded(subject, validation, config, sd_model, report)
            inputs = TrainInputs(sd_model, subject, *parts, start, config, prior, more.prior_loss)
            config = inputs.resolved(report)
            sampler = Sampler(sd_model, wanted, inputs.subject.prompt, report)
            called = inputs.subject.trigger or inputs.subject.prompt
            same = inputs.identity(config)
            checkpoints = snapshots(unfinished, called, same, checkpoint_every, cls.disk)
            keeper = Keeper(inputs, report, cls.disk)
            with keeper.telling_where(checkpoints):
                run = run_training(
                    sd_model,
                    inputs.subject,
                    start.config,
                    config,
                    prior=inputs.second_loss(),
                    start=start.calibration,
                    validate=inputs.validation(config),
                    checkpoints=checkpoints,
                    on_stop=keeper.keep,
                    observer=sampler,
                )
                with keeper.keeping(run):
                    sampler.finish(run)
            lora = inputs.finished(run)
            lora.spare = keeper.spare(lora, run.kept_step)
            checkpoints.remove()
        images = to_image(sampler.pictures)
        losses = {"loss": run.losses or [loss for _, loss in run.validations]}
        lora.traces = (report.trace, *before)
        return io.NodeOutput(lora, losses, images, ui=shown(*lora.traces))


def _traces(*parts: CalibratedStart | Pictures | None) -> Traces:
    """Of everything that came in, each once."""
    told = [trace for part in parts if part for trace in part.traces]
    return tuple(trace for n, trace in enumerate(told) if trace not in told[:n])


def _wires() -> list[Any]:
    return [
        SDModel.Input("sd_model", tooltip="From Load SD Checkpoint or Use ComfyUI Model."),
        SubjectPictures.Input("subject", tooltip="From Subject Images."),
        LoRAInit.Input(
            "lora_init",
            optional=True,
            tooltip="From Calibrate LoRA or Continue LoRA. Without it an ordinary LoRA of rank 4 "
            "is trained.",
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
