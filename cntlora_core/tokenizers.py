"""Where a CLIP tokenizer can be had offline."""

from __future__ import annotations

import os
from pathlib import Path


def find_tokenizer(*folders: str | os.PathLike[str]) -> Path | None:
    """The first folder that holds a CLIP tokenizer: those given, then ComfyUI's own (COMFYUI_PATH)."""
    comfyui = os.environ.get("COMFYUI_PATH")
    places = [Path(f) for f in folders] + ([Path(comfyui) / "comfy" / "sd1_tokenizer"] if comfyui else [])
    return next((p for p in places if (p / "vocab.json").is_file() and (p / "merges.txt").is_file()), None)


def describe_tokenizer() -> str:
    """For `info`: where SD's tokenizer was found, or what is used without one."""
    found = find_tokenizer()
    return str(found) if found else "the checkpoint's own (set COMFYUI_PATH to use ComfyUI's)"
