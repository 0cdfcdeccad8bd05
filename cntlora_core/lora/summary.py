"""What a LoRA file holds."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import LoRAFileError
from .file import read_lora
from .other_names import without_mids


def _fit(down: Tensor, up: Tensor, alpha: Tensor | None) -> bool:
    ranks = [t.shape[n] for t, n in ((down, 0), (up, 1)) if t.ndim > 1]
    return (
        len(ranks) == 2
        and ranks[0] == ranks[1] > 0
        and up.flatten(1).shape[1] == ranks[0]
        and (alpha is None or alpha.numel() == 1)
    )


def inspect_file(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Ranks, sizes, dtypes and metadata of a LoRA file with kohya's key names. Raises
    LoRAFileError."""
    state, about = read_lora(path)
    state = without_mids(state)
    modules = {}
    for key, down in sorted(state.items()):
        if not key.endswith(".lora_down.weight"):
            continue
        name = key.removesuffix(".lora_down.weight")
        up = state.get(f"{name}.lora_up.weight")
        if up is None:
            raise LoRAFileError(f"'{path}' has only one half of '{name}'.")
        alpha = state.get(f"{name}.alpha")
        if not _fit(down, up, alpha):
            raise LoRAFileError(f"'{path}' is damaged: the shapes of '{name}' do not fit.")
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
        raise LoRAFileError(
            f"'{path}' is not a LoRA file in kohya's names: it has no '.lora_down.weight' tensors. "
            "Other trainers' names are read by --continue-from alone."
        )
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
