"""Steps a second and peak memory beside diffusers' DreamBooth LoRA script and ComfyUI's Train LoRA
node.

    python benchmarks/throughput.py --script train_dreambooth_lora.py --comfyui PATH
    python benchmarks/throughput.py --script train_dreambooth_lora.py --comfyui PATH \\
        --family sd1 --model sd1.safetensors --resolution 128 --batch-size 1 --steps 20

`--script` is diffusers' examples/dreambooth/train_dreambooth_lora.py, run as its users run it;
`--comfyui` a checkout of ComfyUI. Either may be left out. Every measurement is two whole processes
that differ in their number of steps, so that loading cancels out; contestants take turns, so that a
busy machine hurts all alike. Same model, pictures, shapes, batch, rank and fp32 for all (bf16 when
gpu.py runs them on a GPU). What differs by design: ComfyUI's node trains every layer with a weight,
the others the attention projections.

With `--family sd1` the model has Stable Diffusion 1.5's shapes and random weights
(`make_checkpoint.py` makes the file); COMFYUI_PATH must name a ComfyUI then, for its tokenizer.
`--threads` sets how many threads each contestant has. `steps` between the short and the long
process should take longer than loading does, or its changing time drowns them. Processor time a
step is reported too: with one thread it is what a busy machine disturbs least.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[1]
SUBJECT = ROOT / "cntlora_core/mini_sd/subject"
MINI = ROOT / "cntlora_core/mini_sd/model"
WORKER = Path(__file__).with_name("comfyui_training.py")
Command = Callable[[argparse.Namespace, int, Path], list[str]]


def ours(args: argparse.Namespace, steps: int, work: Path) -> list[str]:
    command = [
        sys.executable,
        "-m",
        "cntlora_core",
        "train",
        "--checkpoint",
        str(args.model),
        "--images",
        str(SUBJECT),
    ]
    command += [
        "--prompt",
        "a sks cat face emoji",
        "--init",
        "gaussian",
        "--rank",
        "4",
        "--rank-rule",
        "uniform",
    ]
    command += [
        "--steps",
        str(steps),
        "--validate-every",
        "0",
        "--batch-size",
        str(args.batch_size),
        "--upscale",
    ]
    return [
        *command,
        "--resolution",
        str(args.resolution),
        "--output",
        str(work / "ours.safetensors"),
        "--overwrite",
    ]


def diffusers(args: argparse.Namespace, steps: int, work: Path) -> list[str]:
    command = [
        sys.executable,
        str(args.script),
        "--pretrained_model_name_or_path",
        str(args.folder),
    ]
    command += [
        "--instance_data_dir",
        str(work / "pictures"),
        "--instance_prompt",
        "a sks cat face emoji",
        "--rank",
        "4",
    ]
    command += [
        "--resolution",
        str(args.resolution),
        "--train_batch_size",
        str(args.batch_size),
        "--output_dir",
    ]
    command += [str(work / "diffusers"), "--max_train_steps", str(steps), "--learning_rate", "1e-4"]
    precision = "bf16" if getattr(args, "gpu", False) else "no"
    return [*command, "--checkpointing_steps", "100000", "--mixed_precision", precision]


def comfyui(args: argparse.Namespace, steps: int, work: Path) -> list[str]:
    command = [
        sys.executable,
        str(WORKER),
        "--comfyui",
        str(args.comfyui),
        "--model",
        str(args.model),
    ]
    command += [
        "--resolution",
        str(args.resolution),
        "--batch-size",
        str(args.batch_size),
        "--images",
        str(SUBJECT),
    ]
    command += ["--gpu"] if getattr(args, "gpu", False) else []
    return [*command, "--steps", str(steps)]


@dataclass(frozen=True)
class Measured:
    """A whole process: its seconds, those of the processor (all threads), and its peak resident
    memory."""

    seconds: float
    processor_seconds: float
    peak_mib: float


def measure(
    command: list[str], cwd: Path, threads: int | None = None, *, gpu: bool = False
) -> Measured:
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    if not gpu:
        environment |= {"CUDA_VISIBLE_DEVICES": ""}
    if threads:
        environment |= {"OMP_NUM_THREADS": str(threads)}
    with tempfile.TemporaryFile() as log:
        started = time.perf_counter()
        process = subprocess.Popen(command, cwd=cwd, env=environment, stdout=log, stderr=log)
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - started
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            log.seek(0)
            raise SystemExit(f"{' '.join(command)}\n{log.read().decode(errors='replace')[-3000:]}")
    return Measured(seconds, usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1024)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--script", type=Path)
    parser.add_argument("--comfyui", type=Path)
    parser.add_argument("--family", choices=("mini", "sd1"), default="mini")
    parser.add_argument("--model", type=Path, help="for sd1: a single-file checkpoint")
    parser.add_argument("--resolution", type=int, default=64)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument(
        "--steps", type=int, default=150, help="between the short and the long process"
    )
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument(
        "--threads", type=int, help="of each contestant (default: what torch takes)"
    )
    parser.add_argument("--write-folder", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.write_folder:
        return write_folder(args.model, args.write_folder)
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        copy_pictures(work / "pictures", args.batch_size)
        if args.family == "mini":
            args.folder, args.model = MINI, "mini-sd"
        else:
            args.folder, args.model = work / "model", args.model.resolve()
            # In a process of its own: the system counts a parent's memory at the start of a child
            # as the child's peak.
            make = [
                sys.executable,
                __file__,
                "--model",
                str(args.model),
                "--write-folder",
                str(args.folder),
            ]
            measure(make, ROOT)
        contestants: dict[str, Command] = {"ours": ours}
        if args.script:
            args.script = args.script.resolve()
            contestants["diffusers"] = diffusers
        if args.comfyui:
            args.comfyui = args.comfyui.resolve()
            contestants["comfyui"] = comfyui
        results: dict[str, list[Result]] = {name: [] for name in contestants}
        for _ in tqdm(range(args.repeats)):
            for name, command in contestants.items():
                results[name].append(_measure_steps(command, args, work))
    report = {
        "family": args.family,
        "resolution": args.resolution,
        "batch_size": args.batch_size,
        "repeats": args.repeats,
        "steps": args.steps,
        "threads": args.threads or os.environ.get("OMP_NUM_THREADS", "all"),
    } | {name: _summary(results["ours"], results[name]) for name in contestants}
    print(json.dumps(report, indent=2))


def copy_pictures(folder: Path, batch_size: int) -> None:
    """The pictures alone, since the script opens every file of the folder as one, and each
    `batch_size` times, since it ends every pass with what is left of a batch: smaller steps than
    the others'."""
    folder.mkdir()
    for picture in SUBJECT.glob("*.png"):
        for copy in range(batch_size):
            shutil.copy(picture, folder / f"{picture.stem}-{copy}.png")


SHORT = 2  # steps of the short process


@dataclass(frozen=True)
class Result:
    """Of a step: seconds and processor seconds; of the long process: peak memory."""

    seconds: float
    processor_seconds: float
    peak_mib: float


def _measure_steps(command: Command, args: argparse.Namespace, work: Path) -> Result:
    few = measure(command(args, SHORT, work), ROOT, args.threads)
    many = measure(command(args, SHORT + args.steps, work), ROOT, args.threads)
    seconds, busy = many.seconds - few.seconds, many.processor_seconds - few.processor_seconds
    return Result(seconds / args.steps, busy / args.steps, many.peak_mib)


def _summary(ours: list[Result], theirs: list[Result]) -> dict[str, object]:
    rates = [1 / result.seconds for result in theirs]
    pairs = list(zip(ours, theirs, strict=True))
    return {
        "steps_per_second": round(statistics.median(rates), 3),
        "each": [round(rate, 3) for rate in rates],
        "processor_seconds_a_step": round(
            statistics.median(r.processor_seconds for r in theirs), 3
        ),
        "peak_mib": round(statistics.median(r.peak_mib for r in theirs)),
        "ours_is_faster": round(statistics.median(b.seconds / a.seconds for a, b in pairs), 2),
        "ours_takes_processor_time": round(
            statistics.median(a.processor_seconds / b.processor_seconds for a, b in pairs), 2
        ),
        "ours_takes_memory": round(statistics.median(a.peak_mib / b.peak_mib for a, b in pairs), 2),
    }


def write_folder(checkpoint: Path, folder: Path) -> None:
    """The same weights in diffusers' layout, for the script."""
    sys.path.insert(0, str(ROOT))
    from diffusers import DDPMScheduler

    from cntlora_core.model.loader import load_checkpoint

    model = load_checkpoint(checkpoint)
    model.unet.save_pretrained(folder / "unet")
    model.pictures.vae.save_pretrained(folder / "vae")
    model.prompts.encoders[0].save_pretrained(folder / "text_encoder")
    DDPMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False
    ).save_pretrained(folder / "scheduler")
    model.prompts.tokenizers[0].save_pretrained(folder / "tokenizer")
    index = {
        "_class_name": "StableDiffusionPipeline",
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "scheduler": ["diffusers", "DDPMScheduler"],
        "safety_checker": [None, None],
        "feature_extractor": [None, None],
        "requires_safety_checker": False,
    }
    (folder / "model_index.json").write_text(json.dumps(index))


if __name__ == "__main__":
    main()
