"""A folder in diffusers' layout -> the parts of a Stable Diffusion."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import torch

from ..errors import CheckpointError
from .families import REFINER
from .single_file import build_text, build_vae, empty_unet, fill_unet
from .tensor_file import TensorFiles, open_tensors
from .tokenizers import check_tokenizer

# diffusers' and transformers' names for a component's weights
WEIGHTS_FILE = re.compile(
    r"^(?:diffusion_pytorch_model|model)(?:\.(?P<variant>[\w-]+?))?(?P<shard>-\d+-of-\d+)?"
    r"(?:\.(?P<late_variant>\w+))?\.safetensors$"
)


def load_folder(
    folder: Path,
    device: torch.device,
    dtype: torch.dtype,
    vae: str | os.PathLike[str] | None = None,
) -> tuple[Any, Any, tuple[Any, ...], tuple[Any, ...]]:
    """(UNet, VAE, text encoders, tokenizers), the UNet in `dtype` on `device`, the others on the
    CPU as they are stored. Weights may be in one file or sharded, of a variant (fp16) where there
    are no others. `vae` names a file that is used instead of the folder's. Raises
    CheckpointError."""
    suffixes = check_components(folder)
    try:
        parts = _load(folder, suffixes, device, dtype, vae)
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
            weights_files(folder / part)
    return suffixes


def weights_files(part: Path) -> list[Path]:
    """Of a component: its file or its shards, the plain ones, else a variant's, fp16 first. Raises
    CheckpointError when there are none in safetensors."""
    found: dict[tuple[str, bool], list[Path]] = {}
    for path in sorted(part.iterdir()):
        if match := WEIGHTS_FILE.match(path.name):
            variant = match["variant"] or match["late_variant"] or ""
            found.setdefault((variant, bool(match["shard"])), []).append(path)
    if not found:
        raise CheckpointError(
            f"The checkpoint '{part.parent}' has no safetensors weights in {part.name}. Pickled "
            "weights are not loaded: they can run code."
        )
    return found[min(found, key=lambda kind: (kind[0] != "", kind[0] != "fp16", kind))]


def _load(
    folder: Path,
    suffixes: list[str],
    device: torch.device,
    dtype: torch.dtype,
    vae_file: str | os.PathLike[str] | None,
) -> tuple[Any, Any, tuple[Any, ...], tuple[Any, ...]]:
    from transformers import CLIPTokenizer

    unet = empty_unet(read_json(folder / "unet" / "config.json"))
    fill_unet(unet, TensorFiles(weights_files(folder / "unet")), device, dtype)
    vae = build_vae(
        TensorFiles(weights_files(folder / "vae")) if vae_file is None else open_tensors(vae_file),
        read_json(folder / "vae" / "config.json"),
    )
    encoders = tuple(
        build_text(TensorFiles(weights_files(part)), read_json(part / "config.json"), bool(suffix))
        for suffix in suffixes
        for part in [folder / f"text_encoder{suffix}"]
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
    if config.get("class_embed_type") is not None:
        raise CheckpointError(
            f"'{path}' is conditioned on pictures or classes too (unCLIP, an upscaler): CNTLoRA "
            "trains models that are conditioned on text alone."
        )
    if config["cross_attention_dim"] == 1280:
        raise CheckpointError(f"'{path}' is {REFINER}")
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
