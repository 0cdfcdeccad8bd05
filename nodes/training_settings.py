"""Training Settings: what Train LoRA needs only now and then."""

from __future__ import annotations

from typing import Any

from ..cntlora_core.config import OPTIMIZERS, SCHEDULES, TrainConfig
from . import host
from .host import io
from .types import ExtraSettings, Settings

PRIOR_LOSSES = ("class images", "base prediction")
DEFAULT = TrainConfig()


class TrainingSettings(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return host.schema(
            node_id="CNTLoRATrainingSettings",
            display_name="Training Settings (CNTLoRA)",
            category="training/CNTLoRA",
            search_aliases=["optimizer", "scheduler", "min snr", "early stopping"],
            description="More settings for Train LoRA. The defaults are those of Train LoRA "
            "without this node.",
            inputs=[
                io.Boolean.Input(
                    "keep_best",
                    default=DEFAULT.keep_best,
                    tooltip="Give out the weights of the lowest validation loss, not the last: "
                    "more steps than needed do no harm.",
                ),
                io.Int.Input(
                    "patience",
                    default=DEFAULT.patience,
                    min=0,
                    max=10_000,
                    tooltip="Stop after so many validations without a better one; 0: never. 5 is "
                    "sensible with validation pictures.",
                ),
                io.Int.Input(
                    "accumulation",
                    default=DEFAULT.accumulation,
                    min=1,
                    max=1024,
                    tooltip="Batches a step: a larger batch in the same memory, and as much "
                    "slower.",
                ),
                io.Combo.Input(
                    "schedule",
                    options=list(SCHEDULES),
                    default=DEFAULT.schedule,
                    tooltip="Of the learning rate after warmup.",
                ),
                io.Int.Input(
                    "warmup",
                    default=DEFAULT.warmup,
                    min=0,
                    max=100_000,
                    tooltip="Steps in which the learning rate rises.",
                ),
                io.Combo.Input(
                    "prior_loss",
                    options=list(PRIOR_LOSSES),
                    default=PRIOR_LOSSES[0],
                    tooltip="With a prior connected to Train LoRA: train its pictures beside the "
                    "subject's (DreamBooth), or hold the model to its own prediction under "
                    "the class prompt, which needs no pictures.",
                ),
                io.Float.Input(
                    "prior_weight",
                    default=DEFAULT.prior_weight,
                    min=0.0,
                    max=100.0,
                    step=0.1,
                    tooltip="Of the prior loss. Lower it when the subject is not learnt, raise it "
                    "when the class changes.",
                ),
                host.advanced(io.Combo)(
                    "optimizer",
                    options=list(OPTIMIZERS),
                    default=DEFAULT.optimizer,
                    tooltip="adamw8bit and prodigy need their packages (bitsandbytes, prodigyopt); "
                    "prodigy wants learning rate 1.",
                ),
                host.advanced(io.Float)(
                    "min_snr_gamma",
                    default=DEFAULT.min_snr_gamma,
                    min=0.0,
                    max=100.0,
                    step=0.5,
                    tooltip="Weighs timesteps by their noise; 5 is usual, 0: off.",
                ),
                host.advanced(io.Float)(
                    "noise_offset",
                    default=DEFAULT.noise_offset,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip="Lets pictures become darker or brighter as a whole: 0.03 to 0.1, 0: "
                    "off.",
                ),
                host.advanced(io.Float)(
                    "caption_dropout",
                    default=DEFAULT.caption_dropout,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip="Share of pictures trained without words. For styles 0.05 to 0.1; more "
                    "loosens the trigger.",
                ),
            ],
            outputs=[Settings.Output(display_name="settings", tooltip="For Train LoRA.")],
        )

    @classmethod
    def execute(cls, prior_loss: str, **fields: Any) -> io.NodeOutput:
        TrainConfig(**fields)  # says what is wrong with a value before anything is trained
        return io.NodeOutput(ExtraSettings(fields, prior_loss))
