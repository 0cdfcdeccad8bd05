"""Which kind of model a file holds, told from names and shapes alone."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import CheckpointError
from .ldm_names import UNET_PREFIX
from .tensor_file import TensorSource

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
    conv_in = shapes.get(f"{UNET_PREFIX}input_blocks.0.0.weight")
    if conv_in is None or len(conv_in) != 4:
        raise CheckpointError(
            f"'{name}' is {_what(shapes)}, not a Stable Diffusion checkpoint (UNet, VAE and text "
            "encoder in one file)."
        )
    if conv_in[1] != 4:
        what = UNET_CHANNELS.get(conv_in[1], "another kind of model")
        raise CheckpointError(
            f"'{name}' is {what} ({conv_in[1]} input channels): CNTLoRA trains text-to-image "
            "models, with 4."
        )
    width = _context_width(shapes)
    if width == 768:
        return "sd1"
    if width == 1024:
        return "sd2"
    if width == 2048:
        return "sdxl"
    if width == 1280:
        raise CheckpointError(
            f"'{name}' is the SDXL refiner: choose the SDXL base model, which is what LoRAs are "
            "trained on."
        )
    raise CheckpointError(
        f"'{name}' is no Stable Diffusion 1, 2 or SDXL: its cross-attention reads {width} channels."
    )


def _context_width(shapes: Mapping[str, tuple[int, ...]]) -> int | None:
    end = "transformer_blocks.0.attn2.to_k.weight"
    return next(
        (s[1] for k, s in shapes.items() if k.startswith(UNET_PREFIX) and k.endswith(end)), None
    )


def _what(shapes: Mapping[str, tuple[int, ...]]) -> str:
    names = list(shapes)
    if not names:
        return "an empty file"
    for what, parts in FOREIGN:
        if any(part in name for name in names for part in parts):
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
