"""Training Settings: what Train LoRA needs only now and then."""

from __future__ import annotations

from typing import Any

from ..cntlora_core.config import TrainConfig
from ..cntlora_core.settings import read_settings
from . import host
from .host import io
from .train import ON_TRAIN, PRIOR_LOSSES
from .types import ExtraSettings, Settings
from .widgets import widgets_of


class TrainingSettings(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return host.schema(
            node_id="CNTLoRATrainingSettings",
            display_name="Training Settings",
            category=host.category(),
            search_aliases=["optimizer", "scheduler", "min snr", "early stopping"],
            description="More settings for Train LoRA. The defaults are those of Train LoRA "
            "without this node.",
            inputs=[
                io.Combo.Input(
                    "prior_loss",
                    options=list(PRIOR_LOSSES),
                    default=PRIOR_LOSSES[0],
                    optional=True,
                    tooltip="With a prior connected to Train LoRA: train its pictures beside the "
                    "subject's (DreamBooth), or hold the model to its own prediction under "
                    "the class prompt, which needs no pictures. outside the mask: to its own "
                    "prediction where masks hide the subject's pictures; needs no prior.",
                ),
                *widgets_of(TrainConfig, without=ON_TRAIN),
            ],
            outputs=[Settings.Output(display_name="settings", tooltip="For Train LoRA.")],
        )

    @classmethod
    def execute(cls, prior_loss: str = PRIOR_LOSSES[0], **fields: Any) -> io.NodeOutput:
        read_settings(
            TrainConfig, fields
        )  # says what is wrong with a value before anything is trained
        return io.NodeOutput(ExtraSettings(fields, prior_loss))
