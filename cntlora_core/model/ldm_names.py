"""Where the original (LDM / SGM) checkpoints keep what diffusers and transformers call otherwise.

Every function takes the new name and gives the original one, so that a model can be filled
parameter by parameter.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

UNET_PREFIX = "model.diffusion_model."
VAE_PREFIX = "first_stage_model."

_TOP = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
    "mid_block.resnets.0": "middle_block.0",
    "mid_block.attentions.0": "middle_block.1",
    "mid_block.resnets.1": "middle_block.2",
}
_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_LAYER = re.compile(
    r"^(down|up)_blocks\.(\d+)\.(resnets|attentions|downsamplers|upsamplers)\.(\d+)\.?(.*)$"
)
_LAYERS = 2  # per block; an up block has one more, and a down block's sampler counts as one


def unet_name(name: str, *, attention_up_blocks: frozenset[int] = frozenset()) -> str:
    """A module or parameter of diffusers' UNet in the original numbering, without the prefix.

    `attention_up_blocks`: indices of the up blocks with attentions; there the upsampler comes
    third, else second.
    """
    match = _LAYER.match(name)
    if match is None:
        for new, old in _TOP.items():
            if name == new or name.startswith(f"{new}."):
                return _in_resnet(old + name[len(new) :])
        return name
    side, block, kind, layer, rest = match[1], int(match[2]), match[3], int(match[4]), match[5]
    if kind == "downsamplers":
        return f"input_blocks.{(_LAYERS + 1) * (block + 1)}.0.{rest.replace('conv', 'op', 1)}"
    if kind == "upsamplers":
        place = 2 if block in attention_up_blocks else 1
        return f"output_blocks.{(_LAYERS + 1) * block + _LAYERS}.{place}.{rest}"
    index = (_LAYERS + 1) * block + layer
    group = f"input_blocks.{index + 1}" if side == "down" else f"output_blocks.{index}"
    return _in_resnet(f"{group}.{0 if kind == 'resnets' else 1}.{rest}")


def attention_up_blocks(config: Mapping[str, Any]) -> frozenset[int]:
    """Indices of the up blocks with attentions, from diffusers' UNet configuration."""
    return frozenset(
        i for i, kind in enumerate(config["up_block_types"]) if kind.startswith("CrossAttn")
    )


def _in_resnet(name: str) -> str:
    for new, old in _RESNET.items():
        # A resnet's child stands right behind the block's number; transformer blocks have a norm1
        # too, deeper down.
        name = re.sub(
            rf"^((?:input_blocks|output_blocks)\.\d+\.0|middle_block\.[02])\.{new}\b",
            rf"\1.{old}",
            name,
        )
    return name


_VAE = (
    (re.compile(r"^(encoder)\.down_blocks\.(\d+)\.resnets\.(\d+)\."), r"\1.down.\2.block.\3."),
    (re.compile(r"^(encoder)\.down_blocks\.(\d+)\.downsamplers\.0\."), r"\1.down.\2.downsample."),
    (re.compile(r"^(decoder)\.up_blocks\.(\d+)\.resnets\.(\d+)\."), r"\1.up.\2.block.\3."),
    (re.compile(r"^(decoder)\.up_blocks\.(\d+)\.upsamplers\.0\."), r"\1.up.\2.upsample."),
    (re.compile(r"\.mid_block\.resnets\.0\."), ".mid.block_1."),
    (re.compile(r"\.mid_block\.resnets\.1\."), ".mid.block_2."),
    (re.compile(r"\.mid_block\.attentions\.0\."), ".mid.attn_1."),
    (re.compile(r"\.group_norm\."), ".norm."),
    (re.compile(r"\.to_([qkv])\."), r".\1."),
    (re.compile(r"\.to_out\.0\."), ".proj_out."),
    (re.compile(r"\.conv_norm_out\."), ".norm_out."),
    (re.compile(r"\.conv_shortcut\."), ".nin_shortcut."),
)


def vae_name(name: str, levels: int) -> str:
    """A parameter of diffusers' AutoencoderKL in the original numbering, without the prefix; up
    levels count downwards."""
    for pattern, replacement in _VAE:
        name = pattern.sub(replacement, name)
    return re.sub(r"^decoder\.up\.(\d+)\.", lambda m: f"decoder.up.{levels - 1 - int(m[1])}.", name)


CLIP_L_PREFIXES = {
    "sd1": "cond_stage_model.transformer.text_model.",
    "sdxl": "conditioner.embedders.0.transformer.text_model.",
}
OPEN_CLIP_PREFIXES = {
    "sd2": "cond_stage_model.model.",
    "sd2-v": "cond_stage_model.model.",
    "sdxl": "conditioner.embedders.1.model.",
}
_OPEN_CLIP = {
    "embeddings.token_embedding.weight": "token_embedding.weight",
    "embeddings.position_embedding.weight": "positional_embedding",
    "final_layer_norm.": "ln_final.",
    "encoder.layers.": "transformer.resblocks.",
    ".layer_norm1.": ".ln_1.",
    ".layer_norm2.": ".ln_2.",
    ".mlp.fc1.": ".mlp.c_fc.",
    ".mlp.fc2.": ".mlp.c_proj.",
    ".self_attn.out_proj.": ".attn.out_proj.",
    "text_projection.weight": "text_projection",
}
_QKV = re.compile(r"\.self_attn\.([qkv])_proj\.(weight|bias)$")


def open_clip_name(name: str) -> tuple[str, int | None]:
    """A parameter of transformers' CLIP text model (without `text_model.`) in OpenCLIP's names, and
    which third of the joined q, k, v matrix it is (None: the whole tensor)."""
    third = None
    match = _QKV.search(name)
    if match:
        third = "qkv".index(match[1])
        name = f"{name[: match.start()]}.attn.in_proj_{match[2]}"
    for new, old in _OPEN_CLIP.items():
        name = name.replace(new, old)
    return name, third


def text_prefix(family: str, index: int) -> tuple[str, bool]:
    """Where the family's text encoder number `index` stands, and whether it is in OpenCLIP's
    layout."""
    open_clip = family in ("sd2", "sd2-v") or index == 1
    return (OPEN_CLIP_PREFIXES if open_clip else CLIP_L_PREFIXES)[family], open_clip


def text_name(name: str, family: str, index: int) -> tuple[str, int | None]:
    """A parameter of transformers' CLIP text model in the original file, prefix included, and which
    third of a joined matrix it is."""
    prefix, open_clip = text_prefix(family, index)
    bare = name.removeprefix("text_model.")
    old, third = open_clip_name(bare) if open_clip else (bare, None)
    return prefix + old, third
