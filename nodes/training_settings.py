"""Training Settings: what Train LoRA needs only now and then."""

from __future__ import annotations

from typing import Any

from ..cntlora_core.config import RunConfig, TrainConfig
from ..cntlora_core.settings import read_settings
from . import host
from .host import io
from .train import ON_TRAIN
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
                *widgets_of(RunConfig, "prior_loss"),
                *widgets_of(TrainConfig, without=ON_TRAIN),
            ],
            outputs=[Settings.Output(display_name="settings", tooltip="For Train LoRA.")],
        )

    @classmethod
    def execute(cls, prior_loss: str = "images", **fields: Any) -> io.NodeOutput:
        read_settings(
            TrainConfig, fields
        )  # says what is wrong with a value before anything is trained
        return io.NodeOutput(ExtraSettings(fields, prior_loss))
