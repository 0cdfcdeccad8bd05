"""Encoded pictures on disk, found again by what went into them."""

from __future__ import annotations

import hashlib
import os
from contextlib import suppress
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn

from ..errors import OutputError, SettingError
from ..files import atomic_write


class LatentCache:
    """A folder of small safetensors files. The name is a SHA-256 over the VAE's weights and dtype
    and the picture's view, so a file is never wrong, only missing; a damaged one counts as
    missing."""

    def __init__(self, folder: str | os.PathLike[str], vae: nn.Module) -> None:
        self.folder = Path(folder)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise SettingError(
                f"The cache folder '{folder}' cannot be made ({error.strerror})."
            ) from error
        self.model = _digest(vae)

    def get(self, key: tuple[object, ...]) -> tuple[Tensor, Tensor] | None:
        """Mean and standard deviation, if this view was encoded before."""
        try:
            held = load_file(self._path(key))
            return held["mean"], held["std"]
        except (OSError, SafetensorError, KeyError):
            return None

    def put(self, key: tuple[object, ...], mean: Tensor, std: Tensor) -> None:
        """What cannot be written is missing: other processes fill the same folder, a disk may be
        full."""
        tensors = {"mean": mean.cpu().contiguous(), "std": std.cpu().contiguous()}
        with suppress(OutputError):
            atomic_write(self._path(key), save(tensors))

    def _path(self, key: tuple[object, ...]) -> Path:
        return (
            self.folder
            / f"{hashlib.sha256(repr((self.model, key)).encode()).hexdigest()}.safetensors"
        )


def _digest(module: nn.Module) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(
            tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()
        )
    return digest.hexdigest()
