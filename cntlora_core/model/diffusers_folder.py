"""A folder in diffusers' layout -> the parts of a Stable Diffusion."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from ..errors import CheckpointError
from .single_file import build_vae
from .tensor_file import open_tensors
from .tokenizers import check_tokenizer

# diffusers' and transformers' names for a component's weights
WEIGHTS = ("diffusion_pytorch_model", "model")


def load_folder(
    folder: Path, dtype: torch.dtype, vae: str | os.PathLike[str] | None = None
) -> tuple[Any, Any, tuple[Any, ...], tuple[Any, ...]]:
    """(UNet, VAE, text encoders, tokenizers) on the CPU, the UNet in `dtype`, VAE and text encoders
    in fp32. Weights may be in one file or sharded, of a variant (fp16) where there are no others.
    `vae` names a file that is used instead of the folder's. Raises CheckpointError."""
    suffixes = check_components(folder)
    try:
        with _quiet():
            parts = _load(folder, suffixes, dtype, vae)
    except CheckpointError:
        raise
    except Exception as error:  # three libraries, each with errors of its own; the cause stays
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CheckpointError(f"The checkpoint '{folder}' cannot be loaded: {reason}") from error
    for suffix, encoder, tokenizer in zip(suffixes, parts[2], parts[3], strict=True):
        check_tokenizer(tokenizer, encoder.config.vocab_size, folder / f"tokenizer{suffix}")
    return parts


def check_components(folder: Path) -> list[str]:
    """The text encoders' suffixes ("", "_2"); checks that every part is there."""
    if not (folder / "model_index.json").is_file():
        raise CheckpointError(
            f"'{folder}' is not a diffusers model folder: model_index.json is missing."
        )
    second = read_json(folder / "model_index.json").get("text_encoder_2") or [None, None]
    suffixes = ["", "_2"] if second[0] else [""]
    for part in ["unet", "vae", "scheduler"] + [
        f"{part}{s}" for s in suffixes for part in ("text_encoder", "tokenizer")
    ]:
        config = folder / part / ("scheduler_config.json" if part == "scheduler" else "config.json")
        is_tokenizer = part.startswith("tokenizer")
        if not (folder / part).is_dir() or not (is_tokenizer or config.is_file()):
            raise CheckpointError(
                f"The checkpoint '{folder}' has no {part}: copy the whole model folder."
            )
        if part != "scheduler" and not is_tokenizer:
            weights_variant(folder / part)
    return suffixes


def weights_variant(part: Path) -> str | None:
    """Which of a component's weights to read: None for the plain ones, else the variant's name,
    fp16 first. Raises CheckpointError when there are none in safetensors."""
    name = f"(?:{'|'.join(WEIGHTS)})"
    one = re.compile(rf"^{name}(?:\.([\w-]+))?\.safetensors$")
    index = re.compile(rf"^{name}\.safetensors\.index(?:\.([\w-]+))?\.json$")
    files = sorted(p.name for p in part.iterdir())
    found = {m[1] for file in files if (m := one.match(file) or index.match(file))}
    found = {variant for variant in found if not variant or "-of-" not in variant}
    if not found:
        raise CheckpointError(
            f"The checkpoint '{part.parent}' has no safetensors weights in {part.name}. Pickled "
            "weights are not loaded: they can run code."
        )
    return None if None in found else "fp16" if "fp16" in found else min(filter(None, found))


def _load(
    folder: Path, suffixes: list[str], dtype: torch.dtype, vae_file: str | os.PathLike[str] | None
) -> tuple[Any, Any, tuple[Any, ...], tuple[Any, ...]]:
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

    # Without this package diffusers loads plainly, but complains where it is not told to.
    memory = {} if find_spec("accelerate") else {"low_cpu_mem_usage": False}

    def read(kind: Any, part: str, dtype: torch.dtype) -> Any:
        return kind.from_pretrained(
            folder,
            subfolder=part,
            torch_dtype=dtype,
            variant=weights_variant(folder / part),
            use_safetensors=True,
            local_files_only=True,
            **memory,
        )

    unet = read(UNet2DConditionModel, "unet", dtype)
    if vae_file is None:
        vae = read(AutoencoderKL, "vae", torch.float32)
    else:
        vae = build_vae(open_tensors(vae_file), read_json(folder / "vae" / "config.json"))
    encoders = tuple(
        read(CLIPTextModelWithProjection if s else CLIPTextModel, f"text_encoder{s}", torch.float32)
        for s in suffixes
    )
    tokenizers = tuple(
        CLIPTokenizer.from_pretrained(folder, subfolder=f"tokenizer{s}", local_files_only=True)
        for s in suffixes
    )
    return unet, vae, encoders, tokenizers


def folder_family(config: Any, prediction: str, path: str) -> str:
    """The family of a diffusers UNet configuration. Raises CheckpointError."""
    if config["in_channels"] != 4:
        raise CheckpointError(
            f"'{path}' takes {config['in_channels']} input channels (inpainting or depth): CNTLoRA "
            "trains text-to-image models, with 4."
        )
    if config.get("addition_embed_type") == "text_time":
        layers = config.get("transformer_layers_per_block")
        if config.get("layers_per_block", 2) != 2 or (
            isinstance(layers, list) and layers != [1, 2, 10]
        ):
            raise CheckpointError(
                f"'{path}' is a distilled SDXL with fewer blocks or layers (KOALA, SSD-1B, Vega "
                "and their like): train on SDXL itself or a full descendant of it."
            )
        return "sdxl"
    if config["cross_attention_dim"] == 1024:
        return "sd2" if prediction.startswith("epsilon") else "sd2-v"
    return "sd1"


def read_json(path: Path) -> dict[str, Any]:
    """An object from a file. Raises CheckpointError."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"'{path}' cannot be read as JSON ({error}).") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"'{path}' is not a JSON object.")
    return content


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
