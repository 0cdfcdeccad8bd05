"""Time and peak memory to load a single-file checkpoint: CNTLoRA against diffusers'
from_single_file, in turn, a process each.

    python benchmarks/make_checkpoint.py sd1 sd1.safetensors
    COMFYUI_PATH=... python benchmarks/load_time.py sd1.safetensors        (a CLIP tokenizer is
    needed, e.g. ComfyUI's)

Both load UNet, VAE and text encoder in the given dtype on the CPU, offline, from the same
configuration. Prints one JSON object.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

LOADERS = ("cntlora", "diffusers")


def config_folder(family: str, folder: Path) -> Path:
    """A diffusers folder without weights, which from_single_file reads instead of asking the
    hub."""
    from cntlora_core.model.families import config_of
    from cntlora_core.model.tokenizers import load_tokenizers

    config = config_of(family)
    classes = {"unet": "UNet2DConditionModel", "vae": "AutoencoderKL", "scheduler": "DDIMScheduler"}
    for part, name in classes.items():
        (folder / part).mkdir()
        file = "scheduler_config.json" if part == "scheduler" else "config.json"
        (folder / part / file).write_text(json.dumps({"_class_name": name, **config[part]}))
    index = {
        "_class_name": "StableDiffusionPipeline",
        "safety_checker": [None, None],
        "feature_extractor": [None, None],
    }
    index |= {part: ["diffusers", name] for part, name in classes.items()}
    index |= {
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
    }
    (folder / "text_encoder").mkdir()
    text = {
        "architectures": ["CLIPTextModel"],
        "model_type": "clip_text_model",
        **config["text_encoders"][0],
    }
    (folder / "text_encoder" / "config.json").write_text(json.dumps(text))
    load_tokenizers(family)[0].save_pretrained(folder / "tokenizer")
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


def load_once(loader: str, checkpoint: str, dtype_name: str, config: str) -> dict:
    """In this process: seconds and peak memory of the load alone, libraries already imported."""
    import torch
    from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel  # noqa: F401
    from transformers import CLIPTextModel  # noqa: F401

    from cntlora_core.model.loader import load_checkpoint

    dtype = getattr(torch, dtype_name)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    started = time.monotonic()
    if loader == "cntlora":
        model = load_checkpoint(checkpoint, dtype=dtype, tokenizer=f"{config}/tokenizer")
        parts = (model.unet, model.pictures.vae, *model.prompts.encoders)
    else:
        pipe = StableDiffusionPipeline.from_single_file(
            checkpoint, config=config, local_files_only=True, torch_dtype=dtype, safety_checker=None
        )
        parts = (pipe.unet, pipe.vae, pipe.text_encoder)
    seconds = time.monotonic() - started
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    size = sum(p.numel() * p.element_size() for part in parts for p in part.parameters())
    return {"seconds": seconds, "peak_over_model": peak * 1024 / size, "model_gb": size / 1e9}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoint")
    parser.add_argument("--family", default="sd1", choices=("sd1",))
    parser.add_argument("--dtype", default="float16", choices=("float16", "bfloat16", "float32"))
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--once", nargs=2, metavar=("LOADER", "CONFIG"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.once:
        print(json.dumps(load_once(args.once[0], args.checkpoint, args.dtype, args.once[1])))
        return
    results: dict[str, list[dict]] = {loader: [] for loader in LOADERS}
    with tempfile.TemporaryDirectory() as name:
        config = config_folder(args.family, Path(name))
        for _ in range(args.runs + 1):  # the first pair warms the disk cache and is left out
            for loader in LOADERS:
                command = [
                    sys.executable,
                    __file__,
                    args.checkpoint,
                    "--dtype",
                    args.dtype,
                    "--once",
                    loader,
                    str(config),
                ]
                done = subprocess.run(command, capture_output=True, text=True, check=True)
                results[loader].append(json.loads(done.stdout.splitlines()[-1]))
    summary: dict = {"dtype": args.dtype, "runs": args.runs}
    for loader, runs in results.items():
        counted = runs[1:]
        summary[loader] = {
            key: {
                "median": statistics.median(r[key] for r in counted),
                "min": min(r[key] for r in counted),
                "max": max(r[key] for r in counted),
            }
            for key in counted[0]
        }
    pairs = zip(results["cntlora"][1:], results["diffusers"][1:], strict=True)
    summary["time_ratio"] = statistics.median(a["seconds"] / b["seconds"] for a, b in pairs)
    print(json.dumps(summary, indent=1))


if __name__ == "__main__":
    main()
