"""What this installation can do."""

from __future__ import annotations

import platform
from importlib import metadata
from typing import Any

import torch

from .. import __version__

PACKAGES = ("torch", "diffusers", "transformers", "safetensors", "numpy", "pillow")


def environment() -> dict[str, Any]:
    """Versions, devices, threads and the CLIP tokenizer that would be used."""
    from ..model.tokenizers import describe_tokenizer
    from ..training.memory_plan import describe_needs

    cuda = (
        [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
        if torch.cuda.is_available()
        else []
    )
    return {
        "cntlora": __version__,
        "python": platform.python_version(),
        **{package: _version(package) for package in PACKAGES},
        "devices": ["cpu", *cuda, *(["mps"] if torch.backends.mps.is_available() else [])],
        "threads": torch.get_num_threads(),
        "tokenizer": describe_tokenizer(),
        "memory_of_a_training_step_in_half_precision": describe_needs(),
    }


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "missing"
