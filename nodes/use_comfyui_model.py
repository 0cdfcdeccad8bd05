"""Use ComfyUI Model: train on what other nodes have loaded."""

from __future__ import annotations

from typing import Any

from ..cntlora_core.config import ModelConfig
from ..cntlora_core.devices import INT8
from . import host
from .comfyui_model import use_model
from .host import io
from .types import SDModel
from .widgets import widgets_of


class UseComfyUIModel(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return host.schema(
            node_id="CNTLoRAUseComfyUIModel",
            display_name="Use ComfyUI Model",
            category=host.category(),
            search_aliases=["convert model", "from checkpoint", "model clip vae"],
            description="Takes the Stable Diffusion 1, 2 or SDXL model that other nodes have "
            "loaded, merged or changed, for calibration and training. It is not copied, and not "
            "changed.",
            inputs=[
                io.Model.Input(
                    "model",
                    tooltip="From Load Checkpoint or any other loader. Its LoRAs and merges count, "
                    "and a ModelSamplingDiscrete before it says what it predicts.",
                ),
                io.Clip.Input(
                    "clip",
                    tooltip="Encodes the captions: long ones, weights, embeddings and CLIP Set "
                    "Last Layer as in your other graphs.",
                ),
                io.Vae.Input("vae", tooltip="Encodes the pictures and decodes the samples."),
                *widgets_of(ModelConfig, "precision", leaving=(INT8,)),
            ],
            outputs=[
                SDModel.Output(
                    display_name="sd_model", tooltip="The model, ready for CNTLoRA's other nodes."
                )
            ],
            hidden=host.IDENTITY,
        )

    @classmethod
    def execute(cls, model: Any, clip: Any, vae: Any, precision: str = "auto") -> io.NodeOutput:
        used = use_model(
            model,
            clip,
            vae,
            device=host.device(),
            dtype=host.dtype(precision),
            observer=host.notices(cls),
        )
        with host.gradients():
            used.prompts.encode([""], used.device)  # a CLIP of another model is told here
        return io.NodeOutput(used)
