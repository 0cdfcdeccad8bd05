"""Load SD Checkpoint."""

from __future__ import annotations

import os

from ..cntlora_core.model.loader import load_checkpoint
from ..cntlora_core.model.prediction import AUTO, PREDICTIONS
from . import host
from .host import io
from .types import SDModel


class LoadCheckpoint(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return host.schema(
            node_id="CNTLoRALoadCheckpoint",
            display_name="Load SD Checkpoint",
            category=host.category(),
            search_aliases=["load checkpoint", "stable diffusion", "mini sd"],
            description="Loads a Stable Diffusion 1.x, 2.x or SDXL checkpoint for calibration and "
            "training.",
            inputs=[
                io.Combo.Input(
                    "checkpoint",
                    options=host.checkpoint_names(),
                    default=host.EMBEDDED,
                    tooltip="A .safetensors checkpoint from models/checkpoints. 'mini-sd "
                    "(embedded)' is a tiny model that comes with CNTLoRA: it draws 64 px "
                    "emoji and trains in seconds, to try the graph.",
                ),
                io.Combo.Input(
                    "precision",
                    options=list(host.PRECISIONS),
                    default="auto",
                    tooltip="How the frozen model computes; the LoRA itself is always trained in "
                    "fp32. auto: fp32 on a CPU, bf16 or fp16 on a GPU. fp32 needs twice "
                    "the memory; fp16 may overflow where bf16 does not.",
                ),
                host.advanced(io.Combo)(
                    "prediction",
                    options=list(PREDICTIONS),
                    default=AUTO,
                    optional=True,
                    tooltip="What the checkpoint was trained to predict. auto: what the file says "
                    "of itself, as ComfyUI reads it. Set it for a v-prediction file that does not "
                    "say so: trained as the wrong kind a LoRA is useless.",
                ),
            ],
            outputs=[
                SDModel.Output(
                    display_name="sd_model", tooltip="The model, ready for CNTLoRA's other nodes."
                )
            ],
            hidden=host.IDENTITY,
        )

    @classmethod
    def validate_inputs(cls, checkpoint: str) -> bool | str:
        if checkpoint not in host.checkpoint_names():
            return (
                f"The checkpoint '{checkpoint}' is not in models/checkpoints. Put it "
                "there and refresh, or choose another."
            )
        return True

    @classmethod
    def fingerprint_inputs(cls, checkpoint: str, precision: str, prediction: str = AUTO) -> str:
        path = host.checkpoint_path(checkpoint)
        stat = os.stat(path) if path and os.path.exists(path) else None
        return f"{checkpoint}|{precision}|{prediction}|{stat and (stat.st_size, stat.st_mtime_ns)}"

    @classmethod
    def execute(cls, checkpoint: str, precision: str, prediction: str = AUTO) -> io.NodeOutput:
        path = host.checkpoint_path(checkpoint)
        embedded = checkpoint == host.EMBEDDED
        with host.gradients():
            model = load_checkpoint(
                path or checkpoint,
                device=host.device(),
                dtype=host.dtype(precision),
                prediction=prediction,
                tokenizer=None if embedded else host.tokenizer_folder(),
                observer=host.notices(cls),
            )
        model.unet.to("cpu")  # until a node works with it
        return io.NodeOutput(model)
