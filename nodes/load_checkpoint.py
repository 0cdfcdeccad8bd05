"""Load SD Checkpoint."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

from ..cntlora_core.config import ModelConfig
from ..cntlora_core.devices import INT8
from ..cntlora_core.errors import SettingError
from ..cntlora_core.model.loader import load_checkpoint
from ..cntlora_core.settings import read_settings
from . import host
from .host import io
from .paths import stamps
from .types import SDModel
from .widgets import widgets_of

# Inputs for files of single parts, the folder of each, and its text.
PARTS = {
    "vae": ("vae", "Another VAE, or one for a checkpoint without."),
    "text_encoder": ("text_encoders", "For a checkpoint without text encoders."),
    "text_encoder_2": ("text_encoders", "SDXL's other one, in any order."),
}


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
                    "emoji and trains in about a minute, to try the graph.",
                ),
                *widgets_of(ModelConfig),
                *_part_inputs(),
            ],
            outputs=[
                SDModel.Output(
                    display_name="sd_model", tooltip="The model, ready for CNTLoRA's other nodes."
                )
            ],
            hidden=host.IDENTITY,
        )

    @classmethod
    def validate_inputs(cls, checkpoint: str | None = None) -> bool | str:
        try:
            if checkpoint is not None:  # None: another node gives it
                host.checkpoint_path(checkpoint)
        except SettingError as error:
            return str(error)
        return True

    @classmethod
    def fingerprint_inputs(cls, checkpoint: str | None = None, **others: Any) -> str:
        """What the files are; the host compares the inputs themselves. Of a name that is connected
        (None) it is not known which, so all count."""
        paths: list[str | None] = []
        with suppress(SettingError):  # which the run says
            names = host.checkpoint_names() if checkpoint is None else [checkpoint]
            paths += map(host.checkpoint_path, names)
            for name, (folder, _) in PARTS.items():
                part = others.get(name, host.OWN)
                names = host.part_names(folder) if part is None else [part]
                paths += (host.part_path(folder, name) for name in names)
        return stamps(path for path in paths if path)

    @classmethod
    def execute(
        cls,
        checkpoint: str,
        **chosen: Any,
    ) -> io.NodeOutput:
        vae, *encoders = _parts(chosen)
        how = read_settings(ModelConfig, {k: v for k, v in chosen.items() if k not in PARTS})
        embedded = checkpoint == host.EMBEDDED
        with host.gradients():
            model = load_checkpoint(
                host.checkpoint_path(checkpoint),
                dtype=host.dtype(how.precision),
                eight_bits=how.precision == INT8,
                prediction=how.prediction,
                clip_skip=how.clip_skip,
                max_tokens=how.max_tokens,
                vae=vae,
                text_encoders=[file for file in encoders if file],
                tokenizer=None if embedded else host.tokenizer_folder(),
                observer=host.notices(cls),
            )
            model.device = host.device()  # where it goes while a node works with it
        return io.NodeOutput(model)


def _parts(chosen: dict[str, Any]) -> list[str | None]:
    """The files of `PARTS`."""
    return [
        host.part_path(folder, chosen.get(name, host.OWN)) for name, (folder, _) in PARTS.items()
    ]


def _part_inputs() -> list[Any]:
    """Files of the model's parts, in place of its own."""
    return [
        host.advanced(io.Combo)(
            name,
            options=host.part_names(folder),
            default=host.OWN,
            optional=True,
            tooltip=text,
        )
        for name, (folder, text) in PARTS.items()
    ]
