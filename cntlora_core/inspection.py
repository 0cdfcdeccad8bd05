"""What a LoRA file holds, and what this installation can do."""

from __future__ import annotations

import os
import platform
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from . import __version__
from .errors import LoRAFileError
from .lora_file import read_lora

PACKAGES = ("torch", "diffusers", "transformers", "safetensors", "numpy", "pillow")


def inspect_file(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Ranks, sizes, dtypes and metadata of a LoRA file with kohya's key names. Raises LoRAFileError."""
    state, about = read_lora(path)
    modules = {}
    for key, down in sorted(state.items()):
        if not key.endswith(".lora_down.weight"):
            continue
        name = key.removesuffix(".lora_down.weight")
        up = state.get(f"{name}.lora_up.weight")
        if up is None:
            raise LoRAFileError(f"'{path}' has only one half of '{name}'.")
        alpha = state.get(f"{name}.alpha")
        strength = len(down) if alpha is None else float(alpha)
        update = strength / len(down) * up.flatten(1).double() @ down.flatten(1).double()
        modules[name] = {
            "rank": len(down),
            "alpha": strength,
            "in": down[0].numel(),
            "out": len(up),
            "norm": float(torch.linalg.matrix_norm(update)),
        }
    if not modules:
        raise LoRAFileError(f"'{path}' is not a LoRA file: it has no '.lora_down.weight' tensors.")
    ranks = [m["rank"] for m in modules.values()]
    return {
        "file": str(path),
        "bytes": Path(path).stat().st_size,
        "dtype": sorted({str(v.dtype).removeprefix("torch.") for k, v in state.items() if not k.endswith(".alpha")}),
        "modules": len(modules),
        "parameters": sum(v.numel() for k, v in state.items() if not k.endswith(".alpha")),
        "rank": {"min": min(ranks), "mean": sum(ranks) / len(ranks), "max": max(ranks)},
        "ranks": modules,
        "metadata": about,
    }


def environment() -> dict[str, Any]:
    """Versions, devices, threads and the CLIP tokenizer that would be used."""
    from .memory import describe_needs
    from .tokenizers import describe_tokenizer

    cuda = (
        [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] if torch.cuda.is_available() else []
    )
    return {
        "cntlora": __version__,
        "python": platform.python_version(),
        **{package: _version(package) for package in PACKAGES},
        "devices": ["cpu", *cuda, *(["mps"] if torch.backends.mps.is_available() else [])],
        "threads": torch.get_num_threads(),
        "tokenizer": describe_tokenizer(),
        "memory_of_a_training_step_bf16": describe_needs(),
    }


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "missing"
