"""What this installation can do, and what a checkpoint is."""

from __future__ import annotations

import platform
from collections import Counter
from importlib import metadata
from pathlib import Path
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


def about_checkpoint(path: Path) -> dict[str, Any]:
    """What a checkpoint file or diffusers folder says of itself: family, prediction, where the
    noise schedule ends, dtypes by number of values, missing parts. Reads no weights (of an SD 2
    file one vector). Raises CheckpointError for what is not trained."""
    from ..errors import CheckpointError
    from ..model.families import check_depth, config_of, distilled
    from ..model.loader import read_folder_kind, read_kind
    from ..model.noise_schedule import NoiseSchedule
    from ..model.single_file import missing_parts
    from ..model.tensor_file import open_tensors

    if not path.exists():
        raise CheckpointError(f"The checkpoint '{path}' does not exist.")
    notes: list[str] = []
    found: dict[str, Any] = {}
    if path.is_file():
        source = open_tensors(path)
        family, scheduler = read_kind(
            source, observer=lambda event: notes.append(getattr(event, "text", ""))
        )
        check_depth(source, config_of(family)["unet"])
        sizes: Counter[str] = Counter()
        for name, dtype in source.dtypes.items():
            sizes[str(dtype).removeprefix("torch.")] += torch.Size(source.shapes[name]).numel()
        found = {"dtypes": dict(sizes.most_common()), "missing": missing_parts(source, family)}
    else:
        family, scheduler = read_folder_kind(path, str(path))
    schedule = NoiseSchedule.from_config(scheduler)
    if warning := distilled(path.name, str(scheduler.get("_class_name"))):
        notes.append(warning)
    return {
        "checkpoint": path.name,
        "family": family,
        "prediction": schedule.prediction,
        "last_alpha_bar": float(schedule.alphas_cumprod[-1]),
        **found,
        "notes": notes,
    }


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "missing"
