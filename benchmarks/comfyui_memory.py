"""Host memory of a model that ComfyUI has loaded and CNTLoRA works with: COMFYUI_PATH=... python
benchmarks/comfyui_memory.py FILE.safetensors [--half]

A process for each way: *Load Checkpoint* alone, with *Load SD Checkpoint* beside it, and with *Use
ComfyUI Model*. Prints the memory of each while the UNet works, and as a share of the file. On the
CPU both compute in fp32; `--half`: in fp16, what a host keeps for a GPU.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
WAYS = ("alone", "load", "use")


def resident() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def load_pack() -> None:
    """This repository as ComfyUI loads it."""
    spec = importlib.util.spec_from_file_location(
        "cntlora_pack", ROOT / "__init__.py", submodule_search_locations=[str(ROOT)]
    )
    assert spec is not None
    assert spec.loader is not None
    sys.modules["cntlora_pack"] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)


def run(way: str, path: str, dtype: torch.dtype) -> None:
    sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != ROOT]
    sys.path.insert(0, os.environ["COMFYUI_PATH"])
    import comfy.cli_args

    comfy.cli_args.args.cpu = True
    comfy.cli_args.args.fp16_unet = dtype == torch.float16
    import comfy.sd

    load_pack()
    nodes = importlib.import_module("cntlora_pack.nodes.comfyui_model")
    loader = importlib.import_module("cntlora_pack.cntlora_core.model.loader")
    before = resident()
    with torch.inference_mode():
        model, clip, vae, _ = comfy.sd.load_checkpoint_guess_config(path)
    device = torch.device("cpu")
    if way == "load":
        tokenizer = Path(comfy.__path__[0], "sd1_tokenizer")
        used = loader.load_checkpoint(path, device=device, dtype=dtype, tokenizer=tokenizer)
    elif way == "use":
        used = nodes.use_model(model, clip, vae, device=device, dtype=dtype)
    else:
        print(resident() - before)
        return
    with used.at_work():
        for weight in used.unet.parameters():
            weight.sum()  # maps are read when they are used
        print(resident() - before)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("file", type=Path)
    parser.add_argument("--half", action="store_true", help="compute in fp16")
    parser.add_argument("--way", choices=WAYS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.way:
        run(args.way, str(args.file), torch.float16 if args.half else torch.float32)
        return
    size = args.file.stat().st_size
    print(f"file: {size / 1e9:.2f} GB")
    for way in WAYS:
        command = [sys.executable, *sys.argv, "--way", way]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        taken = int(done.stdout.splitlines()[-1])
        print(f"{way}: {taken / 1e9:.2f} GB, {taken / size:.2f} of the file", flush=True)


if __name__ == "__main__":
    main()
