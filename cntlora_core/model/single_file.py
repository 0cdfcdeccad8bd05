"""One .safetensors (or .ckpt) file in the original LDM / SGM layout, and perhaps files of single
parts beside it -> the parts of a Stable Diffusion."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import CheckpointError
from .families import check_depth, config_of
from .ldm_names import Place, attention_up_blocks, text_places, unet_places, vae_places
from .tensor_file import TensorSource, open_tensors, read_scaled

Locate = Callable[[str], list[Place]]  # a parameter's name -> where it may stand in a file
VAE_FIRST, TEXT_FIRST = "decoder.conv_in.weight", "text_model.embeddings.token_embedding.weight"


def load_single_file(
    source: TensorSource,
    family: str,
    *,
    device: torch.device,
    dtype: torch.dtype,
    vae: str | os.PathLike[str] | None = None,
    text_encoders: Sequence[str | os.PathLike[str]] = (),
) -> tuple[Any, Any, tuple[nn.Module, ...]]:
    """(UNet, VAE, text encoders) of an opened file. The UNet comes straight into `dtype` on
    `device`, one tensor at a time; VAE and text encoders stay on the CPU as they are stored. `vae`
    and `text_encoders` name files that come before the checkpoint's own. Raises CheckpointError."""
    config = config_of(family)
    check_depth(source, config["unet"])
    sources = [*(open_tensors(path) for path in text_encoders), source]
    decoder = build_vae(source if vae is None else open_tensors(vae), config["vae"])
    encoders = tuple(
        _build_text(_find_text(sources, family, i, text), text, i == 1, _texts(family, i))
        for i, text in enumerate(config["text_encoders"])
    )
    unet = empty_unet(config["unet"])
    fill_unet(unet, source, device, dtype)
    return unet, decoder, encoders


def missing_parts(source: TensorSource, family: str) -> list[str]:
    """What must come from files of its own: `VAE`, `text encoder` (SDXL: `text encoder 1`, `2`)."""
    config = config_of(family)
    levels = len(config["vae"]["block_out_channels"])
    missing = [] if _stands(source, vae_places(VAE_FIRST, levels)) else ["VAE"]
    texts = config["text_encoders"]
    for i, text in enumerate(texts):
        if not _holds_text(source, family, i, text):
            missing.append(f"text encoder {i + 1}" if len(texts) > 1 else "text encoder")
    return missing


def empty_unet(config: Mapping[str, Any]) -> Any:
    """A UNet of diffusers' configuration whose weights have shapes alone."""
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        return UNet2DConditionModel.from_config(dict(config))


def fill_unet(
    unet: Any, source: TensorSource, device: torch.device, dtype: torch.dtype | None
) -> None:
    """Give a UNet its weights, straight into `dtype` on `device`. Those that are there already as
    they should be are shared, not copied."""
    attentive = attention_up_blocks(unet.config)
    _fill(unet, source, lambda name: unet_places(name, attentive), "UNet", device, dtype)


def build_vae(source: TensorSource, config: dict[str, Any]) -> Any:
    """A VAE of diffusers' configuration from a checkpoint or a file of its own."""
    from diffusers import AutoencoderKL

    levels = len(config["block_out_channels"])
    if not _stands(source, vae_places(VAE_FIRST, levels)):
        raise CheckpointError(
            f"'{source.path.name}' holds no VAE. Give one beside it (--vae FILE)."
        )
    with torch.device("meta"):
        vae = AutoencoderKL.from_config(config)
    _fill(vae, source, lambda name: vae_places(name, levels), "VAE", torch.device("cpu"), None)
    return vae


def build_text(source: TensorSource, config: dict[str, Any], projected: bool) -> Any:
    """A text encoder of transformers' configuration from a file in transformers' names;
    `projected`: SDXL's second."""
    return _build_text(source, config, projected, _texts("sd1", 0))


def _build_text(
    source: TensorSource, config: dict[str, Any], projected: bool, locate: Locate
) -> nn.Module:
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    kind = CLIPTextModelWithProjection if projected else CLIPTextModel
    with torch.device("meta"):
        model = kind(CLIPTextConfig.from_dict(config))
    _fill(model, source, locate, "text encoder", torch.device("cpu"), None)
    return model


def _texts(family: str, index: int) -> Locate:
    return lambda name: text_places(name, family, index)


def _find_text(
    sources: Sequence[TensorSource], family: str, index: int, config: dict[str, Any]
) -> TensorSource:
    """The first that holds the family's text encoder number `index`."""
    source = next((s for s in sources if _holds_text(s, family, index, config)), None)
    if source is None:
        which = f"text encoder {index + 1} of {family}" if family == "sdxl" else "text encoder"
        raise CheckpointError(
            f"'{sources[-1].path.name}' holds no {which} ({config['hidden_size']} channels wide). "
            "Use the full checkpoint, or give it beside the file (--text-encoder FILE)."
        )
    return source


def _holds_text(source: TensorSource, family: str, index: int, config: dict[str, Any]) -> bool:
    """Files of one encoder alone are told apart by their width."""
    name = _stands(source, text_places(TEXT_FIRST, family, index))
    return name is not None and source.shapes[name][-1] == config["hidden_size"]


def _stands(source: TensorSource, places: list[Place]) -> str | None:
    return next((name for name, _ in places if name in source.shapes), None)


@torch.no_grad()
def _fill(
    model: nn.Module,
    source: TensorSource,
    locate: Locate,
    part: str,
    device: torch.device,
    dtype: torch.dtype | None,
) -> None:
    """Give a model made without memory its weights, each read and converted on its own. Without a
    `dtype` they stay as they are stored, where that is one dtype of more than 8 bits."""
    wanted = model.state_dict()
    places = {name: _place(source, locate(name), part) for name in wanted}
    for name, (old, _) in places.items():
        if wanted[name].is_floating_point() and not source.dtypes[old].is_floating_point:
            raise CheckpointError(
                f"'{source.path.name}' is quantised (it keeps '{old}' as whole numbers) and cannot "
                "be trained on. Use the file in fp16, bf16 or fp8."
            )
    if dtype is None:
        dtype = _common_dtype({source.dtypes[old] for old, _ in places.values()})
    state = {}
    for name, (old, third) in places.items():
        shape = tuple(wanted[name].shape)
        read = read_scaled(source, old, dtype)
        tensor = _fit(read, third, shape, transpose=old.endswith("text_projection"))
        if tensor.shape != shape:
            raise CheckpointError(
                f"'{source.path.name}' has a {part} of another shape: '{old}' is "
                f"{tuple(tensor.shape)}, expected {shape}."
            )
        state[name] = tensor.to(device).contiguous()
    model.load_state_dict(state, assign=True)
    _fill_buffers(model, part)


def _place(source: TensorSource, places: list[Place], part: str) -> Place:
    for place in places:
        if place[0] in source.shapes:
            return place
    raise CheckpointError(
        f"'{source.path.name}' is not complete: the {part} lacks '{places[0][0]}'."
    )


def _common_dtype(stored: set[torch.dtype]) -> torch.dtype | None:
    """The dtype that holds all of these, None where there is only one. A module is moved and cast
    as a whole, and nothing computes in 8 bits."""
    wide = {dtype for dtype in stored if dtype.itemsize > 1} or {torch.float16}
    if len(wide) > 1:
        return torch.float32
    return None if wide == stored else wide.pop()


def _fill_buffers(model: nn.Module, part: str) -> None:
    """Buffers that are no weights were made without memory too."""
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            if buffer.is_meta and name == "position_ids":
                positions = torch.arange(buffer.shape[-1]).expand(buffer.shape).clone()
                module.register_buffer(name, positions, persistent=False)
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
