"""Where the original (LDM / SGM) checkpoints keep what diffusers and transformers call otherwise.

Every function takes the new name and gives the original one, so that a model can be filled
parameter by parameter. The `*_places` functions give every place where files keep it, the usual one
first: whole checkpoints, files of one part alone, and what mergers and converters made of the
names.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

Place = tuple[str, int | None]  # a name in a file, and which third of the tensor (None: all of it)

UNET_PREFIX = "model.diffusion_model."
VAE_PREFIX = "first_stage_model."
EMA_PREFIX = "model_ema."

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


def unet_places(name: str, attention_up_blocks: frozenset[int]) -> list[Place]:
    """In a checkpoint, in a file of the UNet alone (original or diffusers' names), and as averaged
    weights, whose names lost their dots."""
    old = unet_name(name, attention_up_blocks=attention_up_blocks)
    averaged = EMA_PREFIX + f"diffusion_model.{old}".replace(".", "")
    return [(place, None) for place in (UNET_PREFIX + old, old, name, averaged)]


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


# diffusers' names of the VAE's attention, as some files mix them into the original ones, and as
# its first versions had them.
_ATTENTION = {".q.": ".to_q.", ".k.": ".to_k.", ".v.": ".to_v.", ".proj_out.": ".to_out.0."}
_OLD_ATTENTION = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}


def vae_places(name: str, levels: int) -> list[Place]:
    """In a checkpoint, in a VAE's own file, in diffusers' names."""
    old = vae_name(name, levels)
    mixed = _replace(old, _ATTENTION) if ".mid.attn_1." in old else old
    bare = (old, mixed, name, _replace(name, _OLD_ATTENTION))
    return [(place, None) for place in (VAE_PREFIX + old, VAE_PREFIX + mixed, *bare)]


CLIP_L_PREFIXES = {
    "sd1": "cond_stage_model.transformer.",
    "sdxl": "conditioner.embedders.0.transformer.",
}
OPEN_CLIP_PREFIXES = {
    "sd2": ("cond_stage_model.model.", "conditioner.embedders.0.model."),
    "sd2-v": ("cond_stage_model.model.", "conditioner.embedders.0.model."),
    "sdxl": ("conditioner.embedders.1.model.",),
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


def text_places(name: str, family: str, index: int) -> list[Place]:
    """A parameter of transformers' CLIP text model number `index`: in a checkpoint (old merges have
    no `text_model.`), then in a file of its own, in OpenCLIP's or transformers' names."""
    bare = name.removeprefix("text_model.")  # transformers' later versions leave it out
    alone: list[Place] = [(f"text_model.{bare}", None), (bare, None)]
    if family in ("sd2", "sd2-v") or index == 1:
        old, third = open_clip_name(bare)
        return [(p + old, third) for p in (*OPEN_CLIP_PREFIXES[family], "")] + alone
    prefix = CLIP_L_PREFIXES[family]
    return [(prefix + place, None) for place, _ in alone] + alone


def _replace(name: str, parts: Mapping[str, str]) -> str:
    for old, new in parts.items():
        name = name.replace(old, new)
    return name
