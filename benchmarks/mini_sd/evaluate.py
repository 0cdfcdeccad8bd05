"""Measure a saved pipeline: the VAE's fidelity, the use of the caption, and the gap between the
drawing styles.

python benchmarks/mini_sd/evaluate.py cntlora_core/mini_sd/model --data DIR
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path

import numpy as np
import torch
from common import BUILD, load, start, to_tensor
from diffusers import StableDiffusionPipeline
from torch import Tensor
from train_vae import encode, psnr

COUNT = 64  # pictures
TIMESTEPS = (100, 300, 500, 700, 900, 980)
VENDORS = ("twitter", "google", "fluent3d")


def picture_names(rows: list[dict]) -> dict[str, dict[str, int]]:
    """Emoji -> index of the drawing of every vendor; skin tones left out."""
    found: dict[str, dict[str, int]] = {}
    for i, row in enumerate(rows):
        if not row["skin"]:
            found.setdefault(row["unified"], {})[row["vendor"]] = i
    return found


@torch.no_grad()
def epsilon_mse(
    pipe: StableDiffusionPipeline, latents: Tensor, captions: list[str], seed: int
) -> dict[int, float]:
    """Error by timestep for scaled latents `[n, 4, 16, 16]`, with the same noise for equal
    seeds."""
    ids = pipe.tokenizer(
        captions, padding="max_length", truncation=True, return_tensors="pt"
    ).input_ids
    text = pipe.text_encoder(ids.to(pipe.device))[0]
    generator = torch.Generator().manual_seed(seed)
    errors = {}
    for t in TIMESTEPS:
        level = float(pipe.scheduler.alphas_cumprod[t])
        noise = torch.randn(latents.shape, generator=generator).to(latents.device)
        noisy = level**0.5 * latents + (1 - level) ** 0.5 * noise
        times = torch.full((len(latents),), t, device=latents.device)
        predicted = pipe.unet(noisy, times, text, return_dict=False)[0]
        errors[t] = (predicted - noise).square().mean().item()
    return errors


def measure(pipe: StableDiffusionPipeline, images: np.ndarray, rows: list[dict], seed: int) -> dict:
    """`images` uint8 `[n, 64, 64, 3]` of all vendors; the same emoji are measured in every vendor's
    drawing."""
    common = [v for v in picture_names(rows).values() if len(v) == len(VENDORS)]
    chosen = random.Random(seed).sample(common, min(COUNT, len(common)))
    gap, errors, scale = {}, {}, pipe.vae.config.scaling_factor
    for vendor in VENDORS:
        index = [c[vendor] for c in chosen]
        latents = encode(pipe.vae, to_tensor(images[index]).to(pipe.device))[:, 0] * scale
        captions = [f"{rows[i]['name']} emoji, {vendor.removesuffix('3d')} style" for i in index]
        right = epsilon_mse(pipe, latents, captions, seed)
        gap[vendor] = round(sum(right.values()) / len(right), 4)
        if vendor == VENDORS[0]:
            others = captions[1:] + captions[:1]
            errors = {"right": right, "another's": epsilon_mse(pipe, latents, others, seed)}
            errors["empty"] = epsilon_mse(pipe, latents, [""] * len(captions), seed)
    caption = {k: {t: round(v, 4) for t, v in e.items()} for k, e in errors.items()}
    psnrs = {v: round(psnr(pipe.vae, images[[c[v] for c in chosen]]), 2) for v in VENDORS}
    return {"vae_psnr_db": psnrs, "epsilon_mse": gap, "epsilon_mse_by_caption": caption}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("pipeline", type=Path)
    parser.add_argument("--data", type=Path, default=BUILD / "data", help="made by prepare_data.py")
    parser.add_argument("--seed", type=int, default=0, help="of the emoji and of the noise")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    start(args)
    images, rows = zip(load(args.data, "pretrain"), load(args.data, "fluent"), strict=True)
    pipe = StableDiffusionPipeline.from_pretrained(
        args.pipeline, torch_dtype=torch.float32, local_files_only=True
    ).to(args.device)
    print(
        json.dumps(measure(pipe, np.concatenate(images), [*rows[0], *rows[1]], args.seed), indent=1)
    )


if __name__ == "__main__":
    main()
