"""One .safetensors (or .ckpt) file in the original LDM / SGM layout -> the parts of a Stable
Diffusion."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import CheckpointError
from .families import config_of
from .ldm_names import (
    UNET_PREFIX,
    VAE_PREFIX,
    attention_up_blocks,
    text_name,
    text_prefix,
    unet_name,
    vae_name,
)
from .tensor_file import TensorSource, open_tensors

Locate = Callable[
    [str], tuple[str, int | None]
]  # a parameter's name -> its name in the file, and which third of it


def load_single_file(
    source: TensorSource,
    family: str,
    *,
    device: torch.device,
    dtype: torch.dtype,
    vae: str | os.PathLike[str] | None = None,
) -> tuple[Any, Any, tuple[nn.Module, ...]]:
    """(UNet, VAE, text encoders) of an opened file. The UNet comes straight into `dtype` on
    `device`, one tensor at a time; VAE and text encoders stay on the CPU in the file's own dtype.
    `vae` names another VAE file. Raises CheckpointError."""
    config = config_of(family)
    unet = _build_unet(source, config["unet"], device, dtype)
    decoder = _build_vae(source if vae is None else open_tensors(vae), config["vae"])
    encoders = tuple(
        _build_text(source, family, i, c) for i, c in enumerate(config["text_encoders"])
    )
    return unet, decoder, encoders


def _build_unet(
    source: TensorSource, config: dict[str, Any], device: torch.device, dtype: torch.dtype
) -> Any:
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(config)
    attentive = attention_up_blocks(config)

    def locate(name: str) -> tuple[str, None]:
        return UNET_PREFIX + unet_name(name, attention_up_blocks=attentive), None

    _fill(unet, source, locate, "UNet", device, dtype)
    return unet


def _build_vae(source: TensorSource, config: dict[str, Any]) -> Any:
    from diffusers import AutoencoderKL

    with torch.device("meta"):
        vae = AutoencoderKL.from_config(config)
    prefix = VAE_PREFIX if f"{VAE_PREFIX}decoder.conv_in.weight" in source.shapes else ""
    if f"{prefix}decoder.conv_in.weight" not in source.shapes:
        raise CheckpointError(
            f"'{source.path.name}' holds no VAE. Give one beside it (--vae FILE)."
        )
    levels = len(config["block_out_channels"])
    _fill(
        vae,
        source,
        lambda name: (prefix + vae_name(name, levels), None),
        "VAE",
        torch.device("cpu"),
        None,
    )
    return vae


def _build_text(source: TensorSource, family: str, index: int, config: dict[str, Any]) -> nn.Module:
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    prefix, _ = text_prefix(family, index)
    kind = CLIPTextModelWithProjection if index == 1 else CLIPTextModel
    with torch.device("meta"):
        model = kind(CLIPTextConfig(**config))
    if not any(name.startswith(prefix) for name in source.shapes):
        raise CheckpointError(
            f"'{source.path.name}' holds no text encoder ('{prefix}...'): use the full checkpoint, "
            "not a UNet alone."
        )
    _fill(
        model,
        source,
        lambda name: text_name(name, family, index),
        "text encoder",
        torch.device("cpu"),
        None,
    )
    return model


@torch.no_grad()
def _fill(
    model: nn.Module,
    source: TensorSource,
    locate: Locate,
    part: str,
    device: torch.device,
    dtype: torch.dtype | None,
) -> None:
    """Give a model made without memory its weights, each read and converted on its own."""
    state = {}
    for name, wanted in model.state_dict().items():
        old, third = locate(name)
        if old not in source.shapes:
            raise CheckpointError(
                f"'{source.path.name}' is not complete: the {part} lacks '{old}'."
            )
        tensor = _fit(
            source.read(old, dtype),
            third,
            tuple(wanted.shape),
            transpose=old.endswith("text_projection"),
        )
        if tensor.shape != wanted.shape:
            raise CheckpointError(
                f"'{source.path.name}' has a {part} of another shape: '{old}' is "
                f"{tuple(tensor.shape)}, expected {tuple(wanted.shape)}."
            )
        state[name] = tensor.to(device).contiguous()
    model.load_state_dict(state, assign=True)
    for module in model.modules():
        # Buffers that are no weights were made without memory too.
        for name, buffer in module.named_buffers(recurse=False):
            if buffer.is_meta and name == "position_ids":
                module.register_buffer(
                    name,
                    torch.arange(buffer.shape[-1]).expand(buffer.shape).clone(),
                    persistent=False,
                )
            elif buffer.is_meta:
                raise RuntimeError(f"the {part}'s buffer {name} has no value")


def _fit(tensor: Tensor, third: int | None, shape: tuple[int, ...], *, transpose: bool) -> Tensor:
    if third is not None:
        return tensor.chunk(3)[third]
    if transpose:
        return tensor.T
    # 1x1 convolutions and linear layers hold the same numbers; families and tools differ in which
    # they write.
    return (
        tensor.reshape(shape)
        if tensor.numel() == torch.Size(shape).numel() and tensor.ndim != len(shape)
        else tensor
    )


def beside(path: Path) -> list[Path]:
    """Folders near a checkpoint file that may hold its tokenizer."""
    return [path.parent / "tokenizer", path.parent]
