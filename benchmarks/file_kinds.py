"""What becomes of every kind of model file: python benchmarks/file_kinds.py [--memory]

Writes cut-down checkpoints (true names, a hundredth of the width) of many kinds into a temporary
folder, loads each, and prints a table in Markdown: what was made of it, or the sentence it was
refused with. `--memory` adds the peak host memory of loading full-size SD 1.5 files against their
size, a process each.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from file_variants import (
    Workshop,
    averaged,
    cast,
    diffusers_vae,
    empty_tokenizer,
    fewer_blocks,
    mixed_attention,
    part,
    pickled,
    renamed,
    scaled,
    shallow,
    sharded,
    variant,
    without,
)
from make_checkpoint import clip_vocabulary, write
from safetensors.torch import load_file
from torch import Tensor

from cntlora_core.errors import CheckpointError
from cntlora_core.model import loader, single_file
from cntlora_core.model.ldm_names import UNET_PREFIX, VAE_PREFIX
from cntlora_core.model.loader import MINI_SD_FOLDER, StableDiffusion, load_checkpoint

Made = tuple[Path, dict[str, Any]]  # a path, and options of load_checkpoint
TEXT = "cond_stage_model.transformer.text_model."


@dataclass(frozen=True)
class Kind:
    """`like`: the family whose weights it must come to, within `tolerance` of each; None: it
    is refused, and `says` is part of the sentence (of a notice, where it is accepted)."""

    make: Callable[[Workshop], Path | Made]
    like: str | None = None
    prediction: str = "epsilon"
    says: str = ""
    tolerance: float = 0.0


MARK = torch.zeros(0)
V, V_ZERO = "v", "v + zero terminal SNR"


def plain(family: str, **extra: Tensor) -> Callable[[Workshop], Path]:
    return lambda shop: shop.save(shop.base(family) | extra)


ACCEPTED: dict[str, Kind] = {
    "SD 1, fp16": Kind(plain("sd1"), "sd1"),
    "SD 2": Kind(plain("sd2"), "sd2"),
    "SD 2, v by its statistic": Kind(plain("sd2-v"), "sd2-v", V),
    "SDXL": Kind(plain("sdxl"), "sdxl"),
    "SDXL, `v_pred`": Kind(plain("sdxl", v_pred=MARK), "sdxl", V),
    "SDXL, `v_pred` and `ztsnr`": Kind(plain("sdxl", v_pred=MARK, ztsnr=MARK), "sdxl", V_ZERO),
    "SD 1, `v_pred`": Kind(plain("sd1", v_pred=MARK), "sd1", V),
    "SDXL, v by its metadata": Kind(
        lambda s: s.save(s.base("sdxl"), metadata={"modelspec.prediction_type": "v"}), "sdxl", V
    ),
    "SDXL, v by its file's name alone": Kind(
        lambda s: s.save(s.base("sdxl"), "merge_vPred"), "sdxl", says="looks like v-prediction"
    ),
    "SDXL Lightning by its name": Kind(
        lambda s: s.save(s.base("sdxl"), "dreamXL_lightningV2"), "sdxl", says="distilled"
    ),
    "fp32": Kind(lambda s: s.save(cast(s.base("sd1"), torch.float32)), "sd1"),
    "bf16": Kind(lambda s: s.save(cast(s.base("sd1"), torch.bfloat16)), "sd1", tolerance=0.01),
    "fp8 e4m3fn": Kind(
        lambda s: s.save(cast(s.base("sd1"), torch.float8_e4m3fn)), "sd1", tolerance=0.07
    ),
    "fp8 e5m2": Kind(
        lambda s: s.save(cast(s.base("sd1"), torch.float8_e5m2)), "sd1", tolerance=0.13
    ),
    "fp8 with `scale_weight`": Kind(
        lambda s: s.save(
            scaled(s.base("sd1"), "scale_weight")
            | {"scaled_fp8": torch.zeros(2, dtype=torch.float8_e4m3fn)}
        ),
        "sd1",
        tolerance=0.07,
    ),
    "fp8 e5m2 with `weight_scale`": Kind(
        lambda s: s.save(scaled(s.base("sd1"), "weight_scale", torch.float8_e5m2)),
        "sd1",
        tolerance=0.13,
    ),
    "mixed dtypes": Kind(
        lambda s: s.save(
            cast(cast(s.base("sd1"), torch.bfloat16, TEXT), torch.float32, VAE_PREFIX)
        ),
        "sd1",
        tolerance=0.01,
    ),
    "EMA weights alone": Kind(lambda s: s.save(renamed(s.base("sd1"), averaged)), "sd1"),
    "keys left by a merge": Kind(
        plain("sd1", **{"model_ema.decay": torch.ones(1), "lora_down.junk": torch.ones(3)}), "sd1"
    ),
    "text encoder without `text_model.`": Kind(
        lambda s: s.save(renamed(s.base("sd1"), lambda k: k.replace(".text_model.", "."))), "sd1"
    ),
    "VAE with `to_q` names": Kind(lambda s: s.save(renamed(s.base("sd1"), mixed_attention)), "sd1"),
    "VAE in a file beside": Kind(
        lambda s: (
            s.save(without(s.base("sd1"), VAE_PREFIX)),
            {"vae": s.save(part(s.base("sd1"), VAE_PREFIX), "vae")},
        ),
        "sd1",
    ),
    "VAE beside in diffusers' names": Kind(
        lambda s: (s.save(without(s.base("sd1"), VAE_PREFIX)), {"vae": diffusers_vae(s)}), "sd1"
    ),
    "UNet, VAE and text encoder in three files": Kind(
        lambda s: (
            s.save(part(s.base("sd1"), UNET_PREFIX)),
            {
                "vae": s.save(part(s.base("sd1"), VAE_PREFIX), "vae"),
                "text_encoders": [
                    s.save(part(s.base("sd1"), "cond_stage_model.transformer."), "clip_l")
                ],
            },
        ),
        "sd1",
    ),
    "SDXL with its text encoders beside": Kind(
        lambda s: (
            s.save(without(s.base("sdxl"), "conditioner.")),
            {
                "text_encoders": [
                    s.save(part(s.base("sdxl"), "conditioner.embedders.1.model."), "clip_g"),
                    s.save(part(s.base("sdxl"), "conditioner.embedders.0.transformer."), "clip_l"),
                ]
            },
        ),
        "sdxl",
    ),
    "diffusers folder": Kind(lambda s: s.folder_of(), "mini"),
    "folder with fp16 variants": Kind(lambda s: s.folder_of(variant), "mini"),
    "folder with shards": Kind(lambda s: s.folder_of(sharded), "mini"),
    "folder, `rescale_betas_zero_snr`": Kind(
        lambda s: s.scheduler(rescale_betas_zero_snr=True, prediction_type="v_prediction"),
        "mini",
        V_ZERO,
    ),
    "folder, `trained_betas`": Kind(lambda s: s.scheduler(trained_betas=[0.01] * 1000), "mini"),
    "folder with another VAE": Kind(
        lambda s: (
            s.folder_of(),
            {"vae": MINI_SD_FOLDER / "model/vae/diffusion_pytorch_model.safetensors"},
        ),
        "mini",
    ),
    "folder with a LCM scheduler": Kind(
        lambda s: s.scheduler(_class_name="LCMScheduler"), "mini", says="distilled"
    ),
}
REFUSED: dict[str, Kind] = {
    "no VAE": Kind(lambda s: s.save(without(s.base("sd1"), VAE_PREFIX)), says="holds no VAE"),
    "no text encoder": Kind(
        lambda s: s.save(without(s.base("sd1"), "cond_stage")), says="holds no text encoder"
    ),
    "SDXL with one text encoder": Kind(
        lambda s: s.save(without(s.base("sdxl"), "conditioner.embedders.1")),
        says="no text encoder 2 of sdxl",
    ),
    "UNet alone": Kind(lambda s: s.save(part(s.base("sd1"), UNET_PREFIX)), says="holds no VAE"),
    "Playground v2.5": Kind(
        plain("sdxl", edm_mean=torch.ones(4), edm_std=torch.ones(4)), says="a Playground v2.5 model"
    ),
    "CosXL": Kind(plain("sdxl", **{"edm_vpred.sigma_max": torch.ones(1)}), says="a CosXL model"),
    "another prediction by its metadata": Kind(
        lambda s: s.save(s.base("sd1"), metadata={"modelspec.prediction_type": "flow"}),
        says="predicts 'flow'",
    ),
    "SDXL with fewer layers": Kind(
        lambda s: s.save(shallow(s.base("sdxl"), 2)), says="is Segmind Vega: 2 layers"
    ),
    "SDXL with fewer blocks": Kind(
        lambda s: s.save(fewer_blocks(s.base("sdxl"), 6)), says="SDXL (KOALA or its like)"
    ),
    "SD 1 with fewer blocks": Kind(
        lambda s: s.save(fewer_blocks(s.base("sd1"), 8)), says="model (BK-SDM or its like)"
    ),
    "unCLIP": Kind(
        plain("sd2", **{f"{UNET_PREFIX}label_emb.0.0.weight": torch.ones(8, 8)}), says="unCLIP"
    ),
    "a weight missing": Kind(
        lambda s: s.save(without(s.base("sd1"), f"{UNET_PREFIX}middle_block.1.norm.weight")),
        says="is not complete",
    ),
    "NF4": Kind(
        plain("sdxl", **{f"{UNET_PREFIX}out.2.weight.quant_state.bitsandbytes__nf4": MARK}),
        says="is quantised",
    ),
    "NVFP4": Kind(
        plain("sdxl", **{f"{UNET_PREFIX}time_embed.0.weight_scale_2": torch.ones(1)}),
        says="is quantised",
    ),
    "folder, empty tokenizer": Kind(
        lambda s: s.folder_of(empty_tokenizer), says="does not belong to the text encoder"
    ),
    "folder, pickled weights": Kind(lambda s: s.folder_of(pickled), says="can run code"),
    "folder, EDM scheduler": Kind(
        lambda s: s.scheduler(_class_name="EDMEulerScheduler"), says="EDMEulerScheduler: EDM"
    ),
    "folder, flow matching": Kind(
        lambda s: s.scheduler(_class_name="FlowMatchEulerDiscreteScheduler"), says="flow-matching"
    ),
    "folder, an unknown key": Kind(
        lambda s: s.scheduler(snr_tilt=0.5), says="snr_tilt 0.5, which CNTLoRA does not know"
    ),
    "folder, continuous timesteps": Kind(
        lambda s: s.scheduler(timestep_type="continuous"), says="timestep_type 'continuous'"
    ),
}
KINDS = ACCEPTED | REFUSED


@dataclass(frozen=True)
class Outcome:
    model: StableDiffusion | None
    sentence: str


def outcome(shop: Workshop, kind: Kind) -> Outcome:
    """Make a file of the kind and load it."""
    made = kind.make(shop)
    path, options = made if isinstance(made, tuple) else (made, {})
    said: list[str] = []
    small = mock.patch.object(single_file, "config_of", shop.config)
    # The vocabulary takes longer than the rest, and has tests of its own.
    words = mock.patch.object(loader, "load_tokenizers", return_value=())
    with small, words:
        try:
            model = load_checkpoint(path, observer=lambda e: said.append(e.text), **options)
        except CheckpointError as error:
            return Outcome(None, str(error))
    return Outcome(model, " ".join(said))


def peak_over_size(path: Path, tokenizer: Path) -> float:
    """Peak memory of a process that loads a file, without what the libraries take, over the file's
    size."""
    command = [sys.executable, __file__, "--once", str(path), str(tokenizer)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return float(done.stdout.splitlines()[-1]) / path.stat().st_size


def load_once(path: str, tokenizer: str) -> None:
    from diffusers import AutoencoderKL, UNet2DConditionModel  # noqa: F401
    from transformers import CLIPTextModel  # noqa: F401

    before = _status("VmRSS")
    model = load_checkpoint(path, dtype=torch.float16, tokenizer=tokenizer)
    for module in (model.unet, model.pictures.vae, *model.prompts.encoders):
        for value in module.parameters():
            value.sum()  # maps are read when they are used
    print(_status("VmHWM") - before)


def _status(key: str) -> int:
    """Bytes of this process, now or at most; getrusage would count those of the one that
    started it."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))


def memory_table(shop: Workshop) -> None:
    print("\n| SD 1.5, full size | size | peak memory / size |\n|---|---|---|")
    path, tokenizer = shop.path("full.safetensors"), clip_vocabulary(shop.folder)
    write(path, "sd1", dtype="fp16")
    _tell_memory("fp16", path, tokenizer)
    small = torch.float8_e4m3fn
    for title, change in {
        "fp8": lambda state: cast(state, small),
        "fp8, scaled": lambda state: scaled(state, "scale_weight"),
    }.items():
        made = shop.save(change(load_file(path)))
        _tell_memory(title, made, tokenizer)
        made.unlink()


def _tell_memory(title: str, path: Path, tokenizer: Path) -> None:
    ratio = peak_over_size(path, tokenizer)
    print(f"| {title} | {path.stat().st_size / 1e9:.2f} GB | {ratio:.2f} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--memory", action="store_true", help="of full-size files too (3 GB disk)")
    parser.add_argument("--once", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.once:
        load_once(*args.once)
        return
    with tempfile.TemporaryDirectory() as name:
        shop = Workshop(Path(name))
        print("| kind of file | becomes |\n|---|---|")
        for title, kind in KINDS.items():
            result = outcome(shop, kind)
            model = result.model
            text = f"{model.family}, {model.schedule.prediction}" if model else "refused"
            sentence = result.sentence.replace(str(shop.folder), "...")
            print(f"| {title} | {text}{': ' if sentence else ''}{sentence} |")
        if args.memory:
            memory_table(shop)


if __name__ == "__main__":
    main()
