"""Host memory of loading a model file, a process each; file_kinds.py --memory prints it."""

from __future__ import annotations

import ctypes
import gc
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from file_variants import Workshop

from cntlora_core.defaults import MINI_SD
from cntlora_core.model.loader import load_checkpoint


def loaded_memory(shop: Workshop, path: Path, options: dict[str, Any]) -> tuple[float, float]:
    """(peak of a process that loads the file into fp16 and reads every weight, what the model
    holds then) over the size of the file and those beside it."""
    task = json.dumps([shop.width, str(path), options], default=str)
    command = [sys.executable, __file__, task]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    peak, held = json.loads(done.stdout.splitlines()[-1])
    beside = [options.get("vae"), *options.get("text_encoders", [])]
    size = sum(_size(file) for file in (path, *beside) if file)
    return peak / size, held / size


def _size(path: Path) -> int:
    files = path.rglob("*.safetensors") if path.is_dir() else [path]
    return sum(file.stat().st_size for file in files)


def _load(width: int, path: str, options: dict[str, Any]) -> None:
    load_checkpoint(MINI_SD)  # what the libraries take when they are first used
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # what they have given back is given back
    with Workshop(Path(), width).known():
        Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here on
        before = _status("VmRSS")
        model = load_checkpoint(path, dtype=torch.float16, **options)
    held = 0
    for module in (model.unet, model.pictures.vae, *model.prompts.encoders):
        for value in module.parameters():
            value.sum()  # maps are read when they are used
            held += value.numel() * value.element_size()
    print(json.dumps([_status("VmHWM") - before, held]))


def _status(key: str) -> int:
    """Bytes of this process, now or at most."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))


if __name__ == "__main__":
    _load(*json.loads(sys.argv[1]))
