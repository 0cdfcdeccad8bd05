"""What becomes of every kind of model file: python benchmarks/file_kinds.py [--memory]

Writes cut-down checkpoints (true names, a fortieth of the width) of many kinds into a temporary
folder, loads each, and prints a table in Markdown: what was made of it, or the sentence it was
refused with. `--memory` adds host memory against the file's size, of files some 20 times as wide
that a process each loads: the peak, and what the model holds in the end.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from file_memory import loaded_memory
from file_variants import (
    Workshop,
    averaged,
    cast,
    diffusers_vae,
    empty_tokenizer,
    fewer_blocks,
    in_fp32,
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
from torch import Tensor

from cntlora_core.errors import CheckpointError
from cntlora_core.model.ldm_names import UNET_PREFIX, VAE_PREFIX
from cntlora_core.model.loader import StableDiffusion, load_checkpoint

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
        lambda s: s.save(s.base("sdxl"), metadata={"modelspec.prediction_type": "v"}),
        "sdxl",
        V,
        says="not whether its schedule ends without any signal",
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
    "`.ckpt`": Kind(lambda s: s.pickle(s.base("sd1")), "sd1"),
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
    "folder in fp32": Kind(lambda s: s.folder_of(in_fp32), "mini"),
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
            {"vae": s.folder_of() / "vae/diffusion_pytorch_model.safetensors"},
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


def made(shop: Workshop, kind: Kind) -> Made:
    """A file of the kind."""
    path = kind.make(shop)
    return path if isinstance(path, tuple) else (path, {})


def outcome(shop: Workshop, kind: Kind) -> Outcome:
    """Make a file of the kind and load it."""
    path, options = made(shop, kind)
    said: list[str] = []
    with shop.known():
        try:
            model = load_checkpoint(path, observer=lambda e: said.append(e.text), **options)
        except CheckpointError as error:
            return Outcome(None, str(error))
    return Outcome(model, " ".join(said))


def row(title: str, kind: Kind, small: Workshop, wide: Workshop | None) -> str:
    """Of the table; with the memory of a wide file where a workshop makes some."""
    result = outcome(small, kind)
    model = result.model
    becomes = f"{model.family}, {model.schedule.prediction}" if model else "refused"
    if result.sentence:
        becomes += f": {result.sentence.replace(str(small.folder), '...')}"
    memory = ""
    if wide and model:
        memory = "{:.2f}, then {:.2f}".format(*loaded_memory(wide, *made(wide, kind)))
        wide.clear()
    return " | ".join([f"| {title}", becomes, *([memory] if wide else [])]) + " |"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--memory", action="store_true", help="of each kind too (minutes)")
    parser.add_argument("--width", type=int, default=16, help="of files for --memory; 40: in full")
    parser.add_argument("--only", default="", help="kinds whose title has this in it")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folders = [Path(name, size) for size in ("small", "wide")]
        for folder in folders:
            folder.mkdir()
        small, wide = Workshop(folders[0]), Workshop(folders[1], args.width)
        print("| kind of file | becomes |" + (" memory / file |" if args.memory else ""))
        print("|---|---|" + ("---|" if args.memory else ""))
        for title, kind in KINDS.items():
            if args.only in title:
                print(row(title, kind, small, wide if args.memory else None), flush=True)


if __name__ == "__main__":
    main()
