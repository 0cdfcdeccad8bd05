"""A checkpoint on disk -> the parts of a Stable Diffusion, frozen and ready."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..defaults import MINI_SD
from ..errors import CheckpointError
from ..events import Observer, ignore
from .families import config_of, detect_family
from .finite import check_weights
from .memo import Memo
from .noise_schedule import NoiseSchedule
from .prediction import AUTO, EPSILON, check_prediction, detect_prediction, scheduler_keys
from .single_file import beside, load_single_file
from .tensor_file import open_tensors
from .tokenizers import load_tokenizers

MINI_SD_FOLDER = Path(__file__).parents[1] / "mini_sd"
WEIGHTS = (
    "diffusion_pytorch_model",
    "model",
)  # diffusers' and transformers' names for a component's weights


@dataclass
class StableDiffusion:
    """A frozen model. `family` is sd1, sd2 (epsilon), sd2-v or sdxl; `name` is what the metadata
    call it."""

    unet: Any  # diffusers.UNet2DConditionModel; diffusers ships no types that a checker can follow
    vae: Any  # diffusers.AutoencoderKL
    text_encoders: tuple[nn.Module, ...]
    tokenizers: tuple[Any, ...]
    schedule: NoiseSchedule
    scheduler_config: dict[str, Any]
    family: str
    name: str
    device: torch.device
    dtype: torch.dtype
    encoded: Memo = field(default_factory=Memo, repr=False)  # pictures it has encoded

    @property
    def vae_scale(self) -> int:
        """Pixels per latent cell along a side: 8 in Stable Diffusion, 4 in the miniature."""
        return 2 ** (len(self.vae.config.block_out_channels) - 1)

    @property
    def resolution(self) -> int:
        """The side in px of the pictures the model was trained on."""
        return int(self.unet.config.sample_size) * self.vae_scale

    def drop_encoders(self) -> None:
        """Give the VAE's and text encoders' memory back, once all is encoded. The model can still
        be trained, but not draw."""
        for module in (self.vae, *self.text_encoders):
            nn.Module.to(module, "meta")


def load_checkpoint(
    path: str | os.PathLike[str],
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    vae: str | os.PathLike[str] | None = None,
    prediction: str = AUTO,
    tokenizer: str | os.PathLike[str] | None = None,
    observer: Observer = ignore,
) -> StableDiffusion:
    """Load a single file, a diffusers folder, or the embedded miniature by its name `mini-sd`.

    The UNet comes in `dtype` on `device`; VAE and text encoders wait on the CPU and visit the
    device, in fp32, while they run. For single files `vae` names another VAE file and `tokenizer` a
    folder with CLIP's vocabulary. `prediction`, one of `PREDICTIONS`, overrides what the checkpoint
    says of itself. Raises CheckpointError.
    """
    check_prediction(prediction)
    folder = MINI_SD_FOLDER / "model" if str(path) == MINI_SD else Path(path)
    device = torch.device(device)
    if not folder.exists():
        raise CheckpointError(
            f"The checkpoint '{path}' does not exist. Give a .safetensors file, a diffusers "
            f"folder, or {MINI_SD}."
        )
    if folder.is_file():
        model = _from_file(folder, device, dtype, vae, prediction, tokenizer, observer)
    else:
        model = _from_folder(folder, str(path), device, dtype, prediction)
    check_weights(model.name, model.unet, model.vae, model.text_encoders)
    return model


def _from_file(
    path: Path,
    device: torch.device,
    dtype: torch.dtype,
    vae: str | os.PathLike[str] | None,
    prediction: str,
    tokenizer: str | os.PathLike[str] | None,
    observer: Observer,
) -> StableDiffusion:
    source = open_tensors(path)
    family = detect_family(source)
    prediction = detect_prediction(source, family, prediction, observer)
    if family == "sd2" and prediction != EPSILON:
        family = "sd2-v"
    tokenizers = load_tokenizers(family, [tokenizer] if tokenizer else beside(path))
    scheduler_config = config_of(family)["scheduler"] | scheduler_keys(prediction)
    unet, decoder, encoders = load_single_file(source, family, device=device, dtype=dtype, vae=vae)
    for part in (unet, decoder, *encoders):
        part.eval().requires_grad_(False)
    return StableDiffusion(
        unet=unet,
        vae=decoder,
        text_encoders=encoders,
        tokenizers=tokenizers,
        schedule=NoiseSchedule.from_config(scheduler_config),
        scheduler_config=scheduler_config,
        family=family,
        name=path.stem,
        device=device,
        dtype=dtype,
    )


def _from_folder(
    folder: Path, path: str, device: torch.device, dtype: torch.dtype, prediction: str
) -> StableDiffusion:
    names = _components(folder)
    scheduler_config = _read_json(folder / "scheduler" / "scheduler_config.json")
    scheduler_config |= scheduler_keys(prediction)
    schedule = NoiseSchedule.from_config(scheduler_config)
    with _quiet():
        unet, vae, encoders, tokenizers = _load_components(folder, names, dtype)
    for part in (unet, vae, *encoders):
        part.eval().requires_grad_(False)
    unet.to(device)
    return StableDiffusion(
        unet=unet,
        vae=vae,
        text_encoders=encoders,
        tokenizers=tokenizers,
        schedule=schedule,
        scheduler_config=scheduler_config,
        family=_family(unet.config, schedule, path),
        name=path if path == MINI_SD else folder.name,
        device=device,
        dtype=dtype,
    )


def _components(folder: Path) -> list[str]:
    """The text encoders' suffixes ("", "_2"); checks that every part is there."""
    if not (folder / "model_index.json").is_file():
        raise CheckpointError(
            f"'{folder}' is not a diffusers model folder: model_index.json is missing."
        )
    index = _read_json(folder / "model_index.json")
    second = index.get("text_encoder_2") or [None, None]
    suffixes = ["", "_2"] if second[0] else [""]
    needed = ["unet", "vae", "scheduler"] + [
        f"{part}{s}" for s in suffixes for part in ("text_encoder", "tokenizer")
    ]
    for part in needed:
        config = folder / part / ("scheduler_config.json" if part == "scheduler" else "config.json")
        missing = not (folder / part).is_dir() or not (
            part.startswith("tokenizer") or config.is_file()
        )
        if missing:
            raise CheckpointError(
                f"The checkpoint '{folder}' has no {part}: copy the whole model folder."
            )
        weights = [folder / part / f"{name}.safetensors" for name in WEIGHTS]
        if (
            part != "scheduler"
            and not part.startswith("tokenizer")
            and not any(w.is_file() for w in weights)
        ):
            raise CheckpointError(
                f"The checkpoint '{folder}' has no safetensors weights in {part}. Pickled weights "
                "are not loaded: they can run code."
            )
    return suffixes


def _load_components(
    folder: Path, suffixes: list[str], dtype: torch.dtype
) -> tuple[Any, Any, tuple[nn.Module, ...], tuple[Any, ...]]:
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

    local: dict[str, Any] = {"local_files_only": True}
    weights: dict[str, Any] = {**local, "use_safetensors": True}
    try:
        unet = UNet2DConditionModel.from_pretrained(
            folder, subfolder="unet", torch_dtype=dtype, **weights
        )
        vae = AutoencoderKL.from_pretrained(
            folder, subfolder="vae", torch_dtype=torch.float32, **weights
        )
        encoders = []
        for suffix in suffixes:
            kind = CLIPTextModelWithProjection if suffix else CLIPTextModel
            part = kind.from_pretrained(
                folder, subfolder=f"text_encoder{suffix}", torch_dtype=torch.float32, **weights
            )
            encoders.append(part)
        tokenizers = [
            CLIPTokenizer.from_pretrained(folder, subfolder=f"tokenizer{s}", **local)
            for s in suffixes
        ]
    except (
        Exception
    ) as error:  # three libraries, each with errors of its own; the cause stays attached
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CheckpointError(f"The checkpoint '{folder}' cannot be loaded: {reason}") from error
    return unet, vae, tuple(encoders), tuple(tokenizers)


def _family(config: Any, schedule: NoiseSchedule, path: str) -> str:
    if config.in_channels != 4:
        raise CheckpointError(
            f"'{path}' takes {config.in_channels} input channels (inpainting or depth): CNTLoRA "
            "trains text-to-image models, with 4."
        )
    if config.addition_embed_type == "text_time":
        return "sdxl"
    if config.cross_attention_dim == 1024:
        return "sd2-v" if schedule.prediction_type == "v_prediction" else "sd2"
    return "sd1"


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"'{path}' cannot be read as JSON ({error}).") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"'{path}' is not a JSON object.")
    return content


@contextmanager
def temporarily_on(module: nn.Module, device: torch.device) -> Iterator[nn.Module]:
    """The module in fp32 on `device` for a while, then back on the host as it was: text encoders
    and VAE take no room beside training, and fp16 (which overflows in SDXL's VAE) is only how they
    are stored."""
    stored = next(module.parameters()).dtype
    try:
        yield nn.Module.to(module, device, torch.float32)  # diffusers' own `to` warns about casts
    finally:
        nn.Module.to(module, "cpu", stored)


@contextmanager
def _quiet() -> Iterator[None]:
    """transformers draws a progress bar for every component; switch it off for a moment and put it
    back."""
    from transformers.utils import logging

    was_on = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if was_on:
            logging.enable_progress_bar()
