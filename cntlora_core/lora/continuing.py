"""A LoRA file to train on from: ours, kohya's, or in PEFT's and diffusers' names."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..config import CALIBRATED, Init
from ..events import Observer, ignore
from .adapter import LoRA
from .file import load_lora
from .metadata import Source
from .targets import ALL, find_projections

if TYPE_CHECKING:
    from ..model.loader import StableDiffusion


@dataclass(frozen=True)
class ContinuedLoRA:
    """Its factors, what the metadata will say of it, and the init that its learning rate goes by:
    that of a calibration where it is from one, else an ordinary one."""

    lora: LoRA
    source: Source
    init: Init


def continued_lora(
    path: str | os.PathLike[str],
    model: StableDiffusion,
    *,
    shared: bool = False,
    observer: Observer = ignore,
) -> ContinuedLoRA:
    """Read it. `shared`: leave out the layers that CNTLoRA does not train, and say so. Raises
    LoRAFileError."""
    lora, metadata = load_lora(
        path, find_projections(model.unet, ALL), model.family, shared=shared, observer=observer
    )
    was = metadata.get("cntlora.origin", metadata.get("cntlora.init"))
    init: Init = next((kind for kind in CALIBRATED if kind == was), "gaussian")
    return ContinuedLoRA(lora, Source.of(path), init)
