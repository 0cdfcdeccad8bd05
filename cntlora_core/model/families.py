"""Which kind of model a file holds, told from names and shapes alone."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import CheckpointError
from .ldm_names import UNET_PREFIX
from .tensor_file import TensorSource, refuse_packed

REFINER = "the SDXL refiner: choose the SDXL base model, which is what LoRAs are trained on."

FAMILIES = ("sd1", "sd2", "sd2-v", "sdxl")
CONFIGS = Path(__file__).parent / "configs"

# What is not a Stable Diffusion checkpoint: words for it, and a part of a tensor's name that gives
# it away.
FOREIGN = (
    (
        "a LoRA",
        (
            "lora_down.",
            "lora_up.",
            "lora_A.",
            "lora_B.",
            ".hada_w1",
            ".lokr_w1",
            "_lora.down",
            ".lora.down.",
        ),
    ),
    ("a ControlNet", ("control_model.", "controlnet_cond_embedding.", "input_hint_block.")),
    ("an IP-Adapter", ("ip_adapter.", "image_proj.")),
    ("a Flux model", ("double_blocks.",)),
    ("a Stable Diffusion 3 model", ("joint_blocks.", "transformer_blocks.0.attn.add_q_proj")),
    ("a PixArt model", ("adaln_single.",)),
    ("a Lumina or Z-Image model", ("cap_embedder.",)),
    ("a Qwen-Image model", ("txt_norm.", "txt_in.")),
    ("a Stable Cascade model", ("clip_txt_mapper.", "effnet_mapper.")),
    ("a T5 text encoder", ("encoder.block.0.layer.0.SelfAttention.",)),
    ("a video model", ("temporal_", "motion_modules.", "time_mixer", "patch_embedding.weight")),
)
# The UNet's first weight: in a checkpoint, alone in the original or diffusers' names, averaged.
CONV_IN = (
    f"{UNET_PREFIX}input_blocks.0.0.weight",
    "input_blocks.0.0.weight",
    "conv_in.weight",
    "model_ema.diffusion_modelinput_blocks00weight",
)
DEEPEST = r"(?:input_blocks\.?7\.?1|down_blocks\.2\.attentions\.0)"
INPUT_BLOCK = re.compile(r"(?<![a-z_])input_blocks\.?(\d+)\.0\.")
SHALLOW = {4: "SSD-1B", 2: "Segmind Vega"}  # layers in the deepest blocks -> whose they are
DISTILLED = re.compile(
    r"turbo|lightning|(?<![a-z])(?:lcm|tcd)(?![a-rt-z])|hyper(?![-_ ]?(?:real|photo))|dmd2",
    re.IGNORECASE,
)
UNET_WITHOUT_REST = ("input_blocks.0.0.weight", "down_blocks.0.resnets.0.norm1.weight")
UNET_CHANNELS = {
    5: "a depth-to-image model",
    7: "an upscaling model",
    8: "an image-editing (InstructPix2Pix) model",
    9: "an inpainting model",
}


def config_of(family: str) -> dict[str, Any]:
    """unet, vae, text_encoders (a list) and scheduler configurations of a family."""
    return json.loads((CONFIGS / f"{family}.json").read_text(encoding="utf-8"))


def detect_family(source: TensorSource) -> str:
    """`sd1`, `sd2` or `sdxl`. Raises CheckpointError that names what else it is."""
    name, shapes = source.path.name, source.shapes
    first = next((place for place in CONV_IN if place in shapes), None)
    conv_in, width = shapes.get(first or "", ()), _context_width(shapes)
    alone = first != CONV_IN[0]  # a whole checkpoint may hold leftovers of anything
    if len(conv_in) != 4 or width is None or (alone and _foreign(shapes)):
        raise CheckpointError(
            f"'{name}' is {_what(shapes)}, not a Stable Diffusion checkpoint (UNet, VAE and text "
            "encoder in one file)."
        )
    refuse_packed(source)
    if conv_in[1] != 4:
        what = UNET_CHANNELS.get(conv_in[1], "another kind of model")
        raise CheckpointError(
            f"'{name}' is {what} ({conv_in[1]} input channels): CNTLoRA trains text-to-image "
            "models, with 4."
        )
    if width in (768, 1024) and any(".label_emb." in f".{n}" for n in shapes):
        raise CheckpointError(
            f"'{name}' is an unCLIP model, which draws from another picture: choose a "
            "text-to-image checkpoint."
        )
    if width == 768:
        return "sd1"
    if width == 1024:
        return "sd2"
    if width == 2048:
        return "sdxl"
    if width == 1280:
        raise CheckpointError(f"'{name}' is {REFINER}")
    raise CheckpointError(
        f"'{name}' is no Stable Diffusion 1, 2 or SDXL: its cross-attention reads {width} channels."
    )


def check_depth(source: TensorSource, config: Mapping[str, Any]) -> None:
    """Raises CheckpointError for a UNet with fewer blocks, or an SDXL with fewer layers in its
    deepest ones, than diffusers' configuration says."""
    blocks = {int(m[1]) for name in source.shapes if (m := INPUT_BLOCK.search(name))}
    expected = (config["layers_per_block"] + 1) * len(config["block_out_channels"])
    if blocks and max(blocks) + 1 < expected:
        whose = "SDXL (KOALA" if "transformer_layers_per_block" in config else "model (BK-SDM"
        raise CheckpointError(
            f"'{source.path.name}' is a distilled {whose} or its like): {max(blocks) + 1} input "
            f"blocks of {expected}. Train on a full model; the LoRA can be used with both."
        )
    layers = config.get("transformer_layers_per_block")
    if layers is None:
        return
    inside = re.compile(DEEPEST + r"\.?transformer_blocks\.?(\d+)\.?norm1")
    found = {int(m[1]) for name in source.shapes if (m := inside.search(name))}
    if found and len(found) != layers[-1]:
        what = SHALLOW.get(len(found), "a distilled SDXL")
        raise CheckpointError(
            f"'{source.path.name}' is {what}: {len(found)} layers in its deepest blocks, SDXL has "
            f"{layers[-1]}. Train on SDXL itself or a full descendant of it."
        )


def distilled(name: str, *hints: str) -> str | None:
    """A sentence for a model that, by its name or other `hints`, was distilled to draw in a few
    steps."""
    match = next((m for text in (name, *hints) if (m := DISTILLED.search(text))), None)
    if match is None:
        return None
    return (
        f"'{name}' looks like a distilled model ({match[0]}): training undoes its few steps. Train "
        "on the model it was made from; the LoRA can be used with both."
    )


def _context_width(shapes: Mapping[str, tuple[int, ...]]) -> int | None:
    end = "transformer_blocks0attn2to_kweight"  # averaged weights lost the dots of their names
    found = (s for k, s in shapes.items() if k.replace(".", "").endswith(end))
    return next((s[1] for s in found if len(s) == 2), None)


def _foreign(shapes: Mapping[str, tuple[int, ...]]) -> str | None:
    return next(
        (what for what, parts in FOREIGN if any(p in name for name in shapes for p in parts)), None
    )


def _what(shapes: Mapping[str, tuple[int, ...]]) -> str:
    names = list(shapes)
    if not names:
        return "an empty file"
    if what := _foreign(shapes):
        return what
    if any(n in ("emb_params", "clip_l", "clip_g") or "string_to_param" in n for n in names):
        return "a textual-inversion embedding"
    if any(
        n.removeprefix(UNET_PREFIX).removeprefix("diffusion_model.") in UNET_WITHOUT_REST
        for n in names
    ):
        return "a UNet alone"
    if any(
        n.endswith("decoder.conv_in.weight") or n.endswith("encoder.conv_in.weight") for n in names
    ):
        return "a VAE alone"
    if any("text_model.encoder." in n or "transformer.resblocks." in n for n in names):
        return "a text encoder alone"
    if any(n.startswith(("model.0.", "body.0.", "conv_first.")) for n in names):
        return "an upscaling model"
    return f"an unknown model (it holds '{names[0]}')"
