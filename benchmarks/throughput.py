"""Steps a second and peak memory beside diffusers' DreamBooth LoRA script and ComfyUI's Train LoRA node.

    python benchmarks/throughput.py --script train_dreambooth_lora.py --comfyui PATH --repeats 5

`--script` is diffusers' examples/dreambooth/train_dreambooth_lora.py, run as its users run it; `--comfyui` a checkout of ComfyUI. Either
may be left out. Every measurement is two whole processes that differ in their number of steps, so that loading cancels out;
contestants take turns, so that a busy machine hurts all alike. Same model, pictures, shapes, batch, rank and fp32 for all.
What differs by design: ComfyUI's node trains every layer with a weight, the others the attention projections.

With `--family sd1` the model has Stable Diffusion 1.5's shapes and random weights (`make_checkpoint.py` makes the file).
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[1]
SUBJECT = ROOT / "cntlora_core/mini_sd/subject"
MINI = ROOT / "cntlora_core/mini_sd/model"


def ours(args: argparse.Namespace, steps: int, work: Path) -> list[str]:
    command = [sys.executable, "-m", "cntlora_core", "train", "--checkpoint", str(args.model), "--images", str(SUBJECT)]
    command += ["--prompt", "a sks cat face emoji", "--init", "gaussian", "--rank", "4", "--rank-rule", "uniform"]
    command += ["--steps", str(steps), "--validate-every", "0", "--batch-size", str(args.batch_size), "--upscale"]
    return [*command, "--resolution", str(args.resolution), "--output", str(work / "ours.safetensors"), "--overwrite"]


def diffusers(args: argparse.Namespace, steps: int, work: Path) -> list[str]:
    command = [sys.executable, str(args.script), "--pretrained_model_name_or_path", str(args.folder)]
    command += [
        "--instance_data_dir",
        str(work / "pictures"),
        "--instance_prompt",
        "a sks cat face emoji",
        "--rank",
        "4",
    ]
    command += ["--resolution", str(args.resolution), "--train_batch_size", str(args.batch_size), "--output_dir"]
    command += [str(work / "diffusers"), "--max_train_steps", str(steps), "--learning_rate", "1e-4"]
    return [*command, "--checkpointing_steps", "100000", "--mixed_precision", "no"]


def comfyui(args: argparse.Namespace, steps: int, work: Path) -> list[str]:
    command = [sys.executable, __file__, "--worker", "--comfyui", str(args.comfyui), "--model", str(args.model)]
    command += ["--family", args.family, "--resolution", str(args.resolution), "--batch-size", str(args.batch_size)]
    return [*command, "--steps", str(steps)]


def measure(command: list[str], cwd: Path) -> tuple[float, float]:
    """Seconds and peak resident memory (MiB) of a process."""
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    with tempfile.TemporaryFile() as log:
        started = time.perf_counter()
        process = subprocess.Popen(command, cwd=cwd, env=environment, stdout=log, stderr=log)
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - started
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            log.seek(0)
            raise SystemExit(f"{' '.join(command)}\n{log.read().decode(errors='replace')[-3000:]}")
    return seconds, usage.ru_maxrss / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--script", type=Path)
    parser.add_argument("--comfyui", type=Path)
    parser.add_argument("--family", choices=("mini", "sd1"), default="mini")
    parser.add_argument("--model", type=Path, help="for sd1: a single-file checkpoint")
    parser.add_argument("--resolution", type=int, default=64)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--steps", type=int, default=150, help="between the short and the long process")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        return _comfyui_worker(args)
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        (work / "pictures").mkdir()  # the script opens every file of the folder as a picture
        for picture in SUBJECT.glob("*.png"):
            shutil.copy(picture, work / "pictures")
        args.folder = MINI if args.family == "mini" else _as_folder(args.model, work / "model")
        args.model = "mini-sd" if args.family == "mini" else args.model.resolve()
        contestants: dict[str, Callable[[argparse.Namespace, int, Path], list[str]]] = {"ours": ours}
        if args.script:
            args.script = args.script.resolve()
            contestants["diffusers"] = diffusers
        if args.comfyui:
            args.comfyui = args.comfyui.resolve()
            contestants["comfyui"] = comfyui
        short = 2
        rates: dict[str, list[float]] = {name: [] for name in contestants}
        peaks: dict[str, list[float]] = {name: [] for name in contestants}
        for _ in tqdm(range(args.repeats)):
            for name, command in contestants.items():
                few, _ = measure(command(args, short, work), ROOT)
                many, peak = measure(command(args, short + args.steps, work), ROOT)
                rates[name].append(args.steps / (many - few))
                peaks[name].append(peak)
    report = {
        "family": args.family, "resolution": args.resolution, "batch_size": args.batch_size, "repeats": args.repeats,
        "threads": os.environ.get("OMP_NUM_THREADS", "all"),
    } | {
        name: {
            "steps_per_second": round(statistics.median(rates[name]), 3),
            "spread": [round(min(rates[name]), 3), round(max(rates[name]), 3)],
            "peak_mib": round(statistics.median(peaks[name])),
            "ours_is_faster": round(statistics.median(a / b for a, b in zip(rates["ours"], rates[name], strict=True)), 2),
            "ours_takes_memory": round(statistics.median(peaks["ours"]) / statistics.median(peaks[name]), 2),
        }
        for name in contestants
    }  # fmt: skip
    print(json.dumps(report, indent=2))


def _as_folder(checkpoint: Path, folder: Path) -> Path:
    """The same weights in diffusers' layout, for the script."""
    sys.path.insert(0, str(ROOT))
    from diffusers import DDPMScheduler
    from transformers import CLIPTokenizer

    from cntlora_core.checkpoint import load_checkpoint

    model = load_checkpoint(checkpoint)
    model.unet.save_pretrained(folder / "unet")
    model.vae.save_pretrained(folder / "vae")
    model.text_encoders[0].save_pretrained(folder / "text_encoder")
    DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False).save_pretrained(
        folder / "scheduler"
    )
    tokenizer = CLIPTokenizer.from_pretrained(MINI / "tokenizer")
    tokenizer.save_pretrained(folder / "tokenizer")
    index = {
        "_class_name": "StableDiffusionPipeline", "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"], "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"], "scheduler": ["diffusers", "DDPMScheduler"],
        "safety_checker": [None, None], "feature_extractor": [None, None], "requires_safety_checker": False,
    }  # fmt: skip
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


def _renumbered(name: str, per_level: int) -> str:
    """The original layout counts three blocks a level; the mini SD has two."""
    match = re.fullmatch(r"(input|output)_blocks\.(\d+)(\..*)", name)
    if match is None or (match[2] == "0" and match[1] == "input"):
        return name
    first = 1 if match[1] == "input" else 0
    level, block = divmod(int(match[2]) - first, 3)
    return f"{match[1]}_blocks.{first + per_level * level + min(block, per_level - 1)}{match[3]}"


class Multiple(float):
    """The mini SD widens by 1.5; ComfyUI's UNet wants whole channels."""

    def __mul__(self, channels: float) -> int:  # type: ignore[override]
        return int(float(self) * channels)

    __rmul__ = __mul__  # type: ignore[assignment]


def _comfyui_worker(args: argparse.Namespace) -> None:
    """ComfyUI's node on the same UNet, latents and prompt."""
    sys.argv = [sys.argv[0], "--cpu"]
    sys.path[:0] = [str(args.comfyui)]
    import comfy.options

    comfy.options.enable_args_parsing()
    import torch
    from comfy import model_management, model_patcher, supported_models
    from comfy_extras.nodes_train import TrainLoraNode

    sys.path.append(str(ROOT))
    from cntlora_core.checkpoint import load_checkpoint
    from cntlora_core.config import DataConfig
    from cntlora_core.ldm_names import attention_up_blocks, unet_name
    from cntlora_core.runs import read_subject

    loaded = load_checkpoint("mini-sd" if args.family == "mini" else args.model)
    data = DataConfig(resolution=args.resolution, upscale=True)
    subject = read_subject(loaded, SUBJECT, "a sks cat face emoji", data)
    shape = loaded.unet.config
    config = {
        "image_size": 32, "in_channels": 4, "out_channels": 4, "model_channels": shape.block_out_channels[0],
        "num_res_blocks": [shape.layers_per_block] * len(shape.block_out_channels),
        "channel_mult": [Multiple(c / shape.block_out_channels[0]) for c in shape.block_out_channels],
        "transformer_depth": [], "transformer_depth_output": [], "transformer_depth_middle": 1,
        "context_dim": shape.cross_attention_dim, "use_spatial_transformer": True, "use_linear_in_transformer": False,
        "adm_in_channels": None, "use_temporal_attention": False, "legacy": False,
        "num_heads": shape.attention_head_dim, "num_head_channels": -1, "dtype": torch.float32,
    }  # fmt: skip
    down = ["CrossAttn" in kind for kind in shape.down_block_types]
    up = ["CrossAttn" in kind for kind in shape.up_block_types]
    config["transformer_depth"] = [int(on) for on in down for _ in range(shape.layers_per_block)]
    config["transformer_depth_output"] = [int(on) for on in reversed(up) for _ in range(shape.layers_per_block + 1)]
    kind = supported_models.SD15(config)
    attentive = attention_up_blocks(shape)
    per_level = shape.layers_per_block + 1
    state = {
        "model.diffusion_model." + _renumbered(unet_name(k, attention_up_blocks=attentive), per_level): v
        for k, v in loaded.unet.state_dict().items()
    }
    kind.set_inference_dtype(torch.float32, None)
    model = kind.get_model(state, "model.diffusion_model.")
    model.load_model_weights(state, "model.diffusion_model.")
    patcher = model_patcher.ModelPatcher(model, model_management.get_torch_device(), torch.device("cpu"))
    latents = {"samples": torch.stack(subject.mean) / loaded.vae.config.scaling_factor}
    words = [[subject.conditioning.tokens[:1].clone(), {}]]
    del loaded
    arguments = {
        "model": patcher, "latents": latents, "positive": words, "batch_size": args.batch_size, "steps": args.steps,
        "grad_accumulation_steps": 1, "learning_rate": 1e-4, "rank": 4, "optimizer": "AdamW", "loss_function": "MSE",
        "seed": 0, "training_dtype": "fp32", "lora_dtype": "fp32", "algorithm": "LoRA", "gradient_checkpointing": False,
        "existing_lora": "[None]",
    }  # fmt: skip
    with torch.inference_mode():
        TrainLoraNode().train(**arguments)


if __name__ == "__main__":
    main()
