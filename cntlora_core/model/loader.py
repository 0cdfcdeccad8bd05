"""A checkpoint on disk -> the parts of a Stable Diffusion, frozen and ready."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..defaults import MINI_SD
from ..devices import room
from ..errors import CheckpointError
from ..events import Notice, Observer, ignore
from .clip_prompts import MAX_TOKENS, CLIPPrompts, check_text_settings
from .diffusers_folder import check_components, folder_family, load_folder, read_json
from .eight_bits import store_in_eight_bits
from .encoders import PictureEncoder, PromptEncoder, VAEPictures, fp32_bytes
from .families import config_of, detect_family, distilled
from .finite import check_weights
from .memo import Memo
from .noise_schedule import NoiseSchedule
from .prediction import AUTO, EPSILON, check_prediction, detect_prediction, scheduler_keys
from .single_file import beside, fill_unet, load_single_file
from .tensor_file import TensorSource, open_tensors
from .tokenizers import load_tokenizers
from .vae_tiles import ENCODE_BYTES

MINI_SD_FOLDER = Path(__file__).parents[1] / "mini_sd"


@dataclass(repr=False)
class StableDiffusion:
    """A frozen model. `family` is sd1, sd2 (epsilon), sd2-v or sdxl; `name` is what the metadata
    call it."""

    unet: Any  # diffusers.UNet2DConditionModel; diffusers ships no types that a checker can follow
    prompts: PromptEncoder
    pictures: PictureEncoder
    schedule: NoiseSchedule
    scheduler_config: dict[str, Any]
    family: str
    name: str
    device: torch.device
    dtype: torch.dtype
    encoded: Memo = field(default_factory=Memo)  # pictures it has encoded
    # Whose the UNet's weights are, where they are not its own: it has them while it works.
    lender: Callable[[], TensorSource] | None = None

    def __repr__(self) -> str:
        return f"<'{self.name}', {self.family}>"

    @property
    def vae_scale(self) -> int:
        """Pixels per latent cell along a side."""
        return self.pictures.scale

    @property
    def resolution(self) -> int:
        """The side in px of the pictures the model was trained on."""
        size = self.unet.config.sample_size or config_of(self.family)["unet"]["sample_size"]
        return int(size if isinstance(size, int) else max(size)) * self.vae_scale

    @contextmanager
    def at_work(self) -> Iterator[None]:
        """The UNet on its device while the block runs; otherwise on the host, or without its
        weights where they are lent."""
        try:
            self._bring()
            yield
        finally:
            self._put_away()

    @contextmanager
    def encoding(self, size_px: int) -> Iterator[None]:
        """Around the encoding of pictures of up to `size_px` px, and of their words. The UNet
        leaves its device meanwhile where it would make a picture go in tiles, or the words to the
        host; nothing may be attached to it."""
        pictures = size_px * ENCODE_BYTES + sum(map(fp32_bytes, self.pictures.modules))
        needed = max(pictures, *map(fp32_bytes, self.prompts.modules), 0)
        limit, there = room(self.device), next(self.unet.parameters()).device.type
        if limit is None or needed <= limit or there != self.device.type:
            yield
            return
        try:
            self._put_away()
            yield
        finally:
            self._bring()

    def _bring(self) -> None:
        if self.lender is None:
            self.unet.to(self.device)
        else:
            fill_unet(self.unet, self.lender(), self.device, self.dtype)

    def _put_away(self) -> None:
        nn.Module.to(self.unet, "cpu" if self.lender is None else "meta")

    def drop_encoders(self) -> None:
        """Give the VAE's and text encoders' memory back, once all is encoded. The model can still
        be trained, but not draw."""
        for module in (*self.pictures.modules, *self.prompts.modules):
            nn.Module.to(module, "meta")


def located(checkpoint: str | os.PathLike[str]) -> Path:
    """The file or folder of a checkpoint, which may be the embedded model's name."""
    return MINI_SD_FOLDER / "model" if str(checkpoint) == MINI_SD else Path(checkpoint)


def load_checkpoint(
    path: str | os.PathLike[str],
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    vae: str | os.PathLike[str] | None = None,
    text_encoders: Sequence[str | os.PathLike[str]] = (),
    prediction: str = AUTO,
    clip_skip: int = 1,
    max_tokens: int = MAX_TOKENS,
    tokenizer: str | os.PathLike[str] | None = None,
    eight_bits: bool = False,
    observer: Observer = ignore,
) -> StableDiffusion:
    """Load a single file, a diffusers folder, or the embedded miniature by its name `mini-sd`.

    The UNet comes in `dtype` on `device`; VAE and text encoders wait on the CPU and visit the
    device, in fp32, while they run. `vae` names another VAE file; `prediction`, one of
    `PREDICTIONS`, overrides what the checkpoint says of itself. `clip_skip` 2 reads prompts one
    layer before the text encoder's last (SDXL keeps its own), up to `max_tokens` of them. For
    single files `text_encoders` are files of the encoders alone and `tokenizer` is a folder with
    CLIP's vocabulary. With `eight_bits` the UNet is stored in int8 and computes in `dtype`. Raises
    CheckpointError or SettingError.
    """
    check_prediction(prediction)
    check_text_settings(clip_skip, max_tokens)
    folder = located(path)
    if not folder.exists():
        raise CheckpointError(
            f"The checkpoint '{path}' does not exist. Give a .safetensors file, a diffusers "
            f"folder, or {MINI_SD}."
        )
    device = torch.device(device)
    first = torch.device("cpu") if eight_bits else device  # it is made smaller before it moves
    asked = _Asked(
        folder, str(path), prediction, first, dtype, vae, text_encoders, tokenizer, observer
    )
    found = _of_file(asked) if folder.is_file() else _of_folder(asked)
    if warning := distilled(folder.name, str(found.scheduler_config.get("_class_name"))):
        observer(Notice(warning))
    name = MINI_SD if str(path) == MINI_SD else folder.stem if folder.is_file() else folder.name
    check_weights(name, found.unet, found.vae, found.text_encoders)
    for part in (found.unet, found.vae, *found.text_encoders):
        part.eval().requires_grad_(False)
    if eight_bits:
        store_in_eight_bits(found.unet)
        found.unet.to(device)
    sdxl = found.family == "sdxl"
    if sdxl and clip_skip > 1:
        observer(Notice("clip_skip is left out: SDXL keeps the layer it was trained on."))
    skip = None if sdxl else clip_skip
    return StableDiffusion(
        unet=found.unet,
        prompts=CLIPPrompts(found.text_encoders, found.tokenizers, sdxl, skip, max_tokens),
        pictures=VAEPictures(found.vae),
        schedule=NoiseSchedule.from_config(found.scheduler_config),
        scheduler_config=found.scheduler_config,
        family=found.family,
        name=name,
        device=device,
        dtype=dtype,
    )


@dataclass(frozen=True)
class _Asked:
    """What `load_checkpoint` was asked for, `called` so; the UNet comes on `device`."""

    path: Path
    called: str
    prediction: str
    device: torch.device
    dtype: torch.dtype
    vae: str | os.PathLike[str] | None
    text_encoders: Sequence[str | os.PathLike[str]]
    tokenizer: str | os.PathLike[str] | None
    observer: Observer


@dataclass(frozen=True)
class _Parts:
    """What a checkpoint is made of."""

    family: str
    scheduler_config: dict[str, Any]
    unet: Any
    vae: Any
    text_encoders: tuple[Any, ...]
    tokenizers: Any


def _of_file(asked: _Asked) -> _Parts:
    source = open_tensors(asked.path)
    family, scheduler_config = read_kind(source, asked.prediction, asked.observer)
    tokenizers = load_tokenizers(
        family, [asked.tokenizer] if asked.tokenizer else beside(asked.path)
    )
    unet, vae, encoders = load_single_file(
        source,
        family,
        device=asked.device,
        dtype=asked.dtype,
        vae=asked.vae,
        text_encoders=asked.text_encoders,
    )
    return _Parts(family, scheduler_config, unet, vae, encoders, tokenizers)


def _of_folder(asked: _Asked) -> _Parts:
    if asked.text_encoders:
        raise CheckpointError(
            f"'{asked.called}' is a folder with text encoders of its own: separate ones go with a "
            "single file."
        )
    kind = read_folder_kind(asked.path, asked.called, asked.prediction)
    return _Parts(*kind, *load_folder(asked.path, asked.device, asked.dtype, asked.vae))


def read_kind(
    source: TensorSource, prediction: str = AUTO, observer: Observer = ignore
) -> tuple[str, dict[str, Any]]:
    """(family, scheduler configuration) of a single file; its weights are not read."""
    family = detect_family(source)
    prediction = detect_prediction(source, family, prediction, observer)
    if family == "sd2" and prediction != EPSILON:
        family = "sd2-v"
    return family, config_of(family)["scheduler"] | scheduler_keys(prediction)


def read_folder_kind(folder: Path, path: str, prediction: str = AUTO) -> tuple[str, dict[str, Any]]:
    """(family, scheduler configuration) of a diffusers folder; its weights are not read."""
    check_components(folder)
    scheduler_config = read_json(folder / "scheduler" / "scheduler_config.json")
    scheduler_config |= scheduler_keys(prediction)
    schedule = NoiseSchedule.from_config(scheduler_config)
    unet_config = read_json(folder / "unet" / "config.json")
    return folder_family(unet_config, schedule.prediction, path), scheduler_config
