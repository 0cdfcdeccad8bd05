"""The optimisers that other packages bring."""

from __future__ import annotations

import importlib
from typing import Any

from ..errors import SettingError

PACKAGES = {
    "adamw8bit": ("bitsandbytes.optim", "AdamW8bit"),
    "prodigy": ("prodigyopt", "Prodigy"),
    "schedulefree": ("schedulefree", "AdamWScheduleFree"),
}


def optional_optimizer(name: str) -> Any:
    """The class of an optimiser of `PACKAGES`, None for what needs no package. Raises SettingError
    when the package is not installed."""
    if name not in PACKAGES:
        return None
    module, kind = PACKAGES[name]
    try:
        return getattr(importlib.import_module(module), kind)
    except (ImportError, OSError, RuntimeError, AttributeError) as error:
        package = module.split(".")[0]
        raise SettingError(
            f"optimizer is '{name}', which needs the package {package}: install it (pip install "
            f"{package}), or take 'adamw'."
        ) from error
