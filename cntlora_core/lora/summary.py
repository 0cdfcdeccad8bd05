"""What a LoRA file holds."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch

from ..errors import LoRAFileError
from .file import read_lora


def inspect_file(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Ranks, sizes, dtypes and metadata of a LoRA file with kohya's key names. Raises
    LoRAFileError."""
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
        "dtype": sorted(
            {
                str(v.dtype).removeprefix("torch.")
                for k, v in state.items()
                if not k.endswith(".alpha")
            }
        ),
        "modules": len(modules),
        "parameters": sum(v.numel() for k, v in state.items() if not k.endswith(".alpha")),
        "rank": {"min": min(ranks), "mean": sum(ranks) / len(ranks), "max": max(ranks)},
        "ranks": modules,
        "metadata": about,
    }
