"""Write a checkpoint of real shape and format with random weights: python
benchmarks/make_checkpoint.py sd1 out.safetensors

The file has the original (LDM / SGM) layout of SD 1.5, SD 2.1 or SDXL: UNet, VAE and text encoders.
Tensors are drawn and written one at a time, so it needs little memory. For loaders and trainers; it
draws nothing but noise.
"""

from __future__ import annotations

import argparse
import json
import struct
from collections.abc import Iterator
from pathlib import Path

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from cntlora_core.model.families import FAMILIES, config_of
from cntlora_core.model.ldm_names import (
    UNET_PREFIX,
    VAE_PREFIX,
    attention_up_blocks,
    text_places,
    unet_name,
    vae_name,
)
from cntlora_core.model.loader import MINI_SD_FOLDER
from cntlora_core.model.prediction import V_MARKS
from cntlora_core.model.tokenizers import CLIP_IDS, CLIP_SIZE

DTYPES = {
    "fp32": (torch.float32, "F32"),
    "fp16": (torch.float16, "F16"),
    "bf16": (torch.bfloat16, "BF16"),
}


def small_config(family: str) -> dict:
    """The family's grammar at a hundredth of its width. What the family is told by (context width)
    stays."""
    config = config_of(family)
    unet, vae = config["unet"], config["vae"]
    unet["block_out_channels"] = [8 * min(2**i, 4) for i in range(len(unet["block_out_channels"]))]
    unet["norm_num_groups"] = 4
    unet["attention_head_dim"] = 2
    if family == "sdxl":
        unet["transformer_layers_per_block"] = [1, 2, 3]
        unet["projection_class_embeddings_input_dim"] = 256 * 6 + 1280
    vae["block_out_channels"], vae["norm_num_groups"] = [8, 8, 16, 16], 4
    for text in config["text_encoders"]:
        text.update(num_hidden_layers=2, vocab_size=49408, intermediate_size=16)
    return config


def clip_vocabulary(folder: Path) -> Path:
    """A stand-in of CLIP's size and with its special ids: the mini SD's words, then fillers."""
    target = folder / "tokenizer"
    target.mkdir()
    source = MINI_SD_FOLDER / "model" / "tokenizer"
    words = json.loads((source / "vocab.json").read_text())
    plain = [w for w, _ in sorted(words.items(), key=lambda item: item[1])]
    plain = [w for w in plain if w not in CLIP_IDS]
    plain += [f"filler{i}</w>" for i in range(CLIP_SIZE - len(CLIP_IDS) - len(plain))]
    for word, place in sorted(CLIP_IDS.items(), key=lambda item: item[1]):
        plain.insert(place, word)
    (target / "vocab.json").write_text(json.dumps({w: i for i, w in enumerate(plain)}))
    (target / "merges.txt").write_text((source / "merges.txt").read_text())
    return target


def shapes_of(family: str, config: dict | None = None) -> dict[str, tuple[int, ...]]:
    """Original name -> shape, for the family's own configuration or a smaller one of the same
    grammar."""
    config = config or config_of(family)
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(config["unet"]).state_dict()
        vae = AutoencoderKL.from_config(config["vae"]).state_dict()
    attentive = attention_up_blocks(config["unet"])
    shapes = {
        UNET_PREFIX + unet_name(k, attention_up_blocks=attentive): tuple(v.shape)
        for k, v in unet.items()
    }
    levels = len(config["vae"]["block_out_channels"])
    for name, value in vae.items():
        old = vae_name(name, levels)
        linear = ".mid.attn_1." in old and old.endswith("weight") and value.ndim == 2
        shapes[VAE_PREFIX + old] = (*value.shape, 1, 1) if linear else tuple(value.shape)
    for index, text in enumerate(config["text_encoders"]):
        shapes |= _text_shapes(family, index, text)
    return shapes


def _text_shapes(family: str, index: int, config: dict) -> dict[str, tuple[int, ...]]:
    kind = CLIPTextModelWithProjection if index == 1 else CLIPTextModel
    with torch.device("meta"):
        state = kind(CLIPTextConfig(**config)).state_dict()
    shapes = {}
    for name, value in state.items():
        old, third = text_places(name, family, index)[0]
        shapes[old] = (
            (3 * value.shape[0], *value.shape[1:]) if third is not None else tuple(value.shape)
        )
    return shapes


def draw(name: str, shape: tuple[int, ...], generator: torch.Generator, family: str) -> Tensor:
    """Random weights that keep activations finite: norms are one, matrices have the usual fan-in
    scale."""
    if name in V_MARKS:
        return torch.randn(shape, generator=generator) * (0.2 if family == "sd2-v" else 0.02)
    if len(shape) == 1:
        is_norm = any(
            part in name for part in ("norm", ".ln_", "in_layers.0", "out_layers.0", "out.0")
        )
        return torch.ones(shape) if name.endswith("weight") and is_norm else torch.zeros(shape)
    fan_in = max(1, torch.Size(shape[1:]).numel())
    return torch.randn(shape, generator=generator) * fan_in**-0.5


def write(
    path: Path, family: str, *, dtype: str = "fp16", config: dict | None = None, seed: int = 0
) -> None:
    torch_dtype, code = DTYPES[dtype]
    shapes = shapes_of(family, config)
    header, place = {}, 0
    for name, shape in shapes.items():
        size = torch.Size(shape).numel() * torch_dtype.itemsize
        header[name] = {"dtype": code, "shape": list(shape), "data_offsets": [place, place + size]}
        place += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for part in _payload(shapes, torch_dtype, family, seed):
            file.write(part)


def _payload(
    shapes: dict[str, tuple[int, ...]], dtype: torch.dtype, family: str, seed: int
) -> Iterator[bytes]:
    generator = torch.Generator().manual_seed(seed)
    for name, shape in shapes.items():
        tensor = draw(name, shape, generator, family).to(dtype)
        yield tensor.contiguous().view(torch.uint8).numpy().tobytes()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("family", choices=FAMILIES)
    parser.add_argument("output", type=Path)
    parser.add_argument("--dtype", choices=DTYPES, default="fp16")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    write(args.output, args.family, dtype=args.dtype, seed=args.seed)
    print(f"{args.output}: {args.output.stat().st_size / 1e9:.2f} GB")


if __name__ == "__main__":
    main()
