"""Train the AutoencoderKL (4 times smaller, 4 channels) on the pre-training drawings, and cache
their latents.

    python benchmarks/mini_sd/train_vae.py --steps 2824 --data DIR --output DIR

Writes a diffusers folder and, in it, latents.safetensors: the posterior's mean and standard
deviation, scaled, `[n, 2, 4, 16, 16]`.
"""

from __future__ import annotations

import time

import numpy as np
import torch
from common import (
    BUILD,
    EMA,
    SCALING,
    SIZE,
    arguments,
    learning_rate,
    load,
    move,
    record,
    report_due,
    shade,
    start,
    to_tensor,
)
from diffusers import AutoencoderKL
from safetensors.torch import save_file
from torch import Tensor

BATCH, PEAK_LR, WARM_UP, EMA_DECAY = 16, 2e-3, 100, 0.998
KL_WEIGHT, L1_WEIGHT, SKIN_TONE_WEIGHT = 3e-4, 0.25, 0.25
CONFIG = {
    "in_channels": 3,
    "out_channels": 3,
    "down_block_types": ("DownEncoderBlock2D",) * 3,
    "up_block_types": ("UpDecoderBlock2D",) * 3,
    "block_out_channels": (24, 48, 64),
    "layers_per_block": 1,
    "latent_channels": 4,
    "norm_num_groups": 8,
    "sample_size": SIZE,
}


def augment(x: Tensor) -> Tensor:
    """Flips for all; half of the batch is also zoomed, turned, shifted and shaded, and has colour
    channels permuted."""
    n, half = len(x), len(x) // 2
    x = torch.where((torch.rand(n) < 0.5).view(-1, 1, 1, 1), x.flip(-1), x)
    zoom, turn, shift = (
        0.75 + 0.6 * torch.rand(half),
        (torch.rand(half) - 0.5) * 0.6,
        (torch.rand(half, 2) - 0.5) * 0.3,
    )
    moved = move(x[:half], zoom, turn, shift)
    moved[::2] = torch.stack([picture[torch.randperm(3)] for picture in moved[::2]])
    return torch.cat([shade(moved), x[half:]])


def step_loss(vae: AutoencoderKL, x: Tensor) -> Tensor:
    """MSE + 0.25 L1 + 3e-4 KL per latent dimension."""
    with torch.autocast("cpu", torch.bfloat16):
        posterior = vae.encode(x).latent_dist
        out = vae.decode(posterior.sample()).sample
    difference = out.float() - x
    kl = posterior.kl().float().mean() / (4 * (SIZE // 4) ** 2)
    return difference.square().mean() + L1_WEIGHT * difference.abs().mean() + KL_WEIGHT * kl


def train(images: np.ndarray, rows: list[dict], *, steps: int, seed: int = 0) -> AutoencoderKL:
    """From nothing to the averaged weights. `images` uint8 `[n, 64, 64, 3]`."""
    weights = np.array([SKIN_TONE_WEIGHT if r["skin"] else 1.0 for r in rows])
    rng = np.random.default_rng(seed)
    vae = AutoencoderKL(**CONFIG)
    ema = EMA(vae, EMA_DECAY)
    optimizer = torch.optim.AdamW(vae.parameters(), PEAK_LR, betas=(0.9, 0.99), weight_decay=0.0)
    started = time.monotonic()
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps, WARM_UP, PEAK_LR)
        batch = images[rng.choice(len(images), BATCH, p=weights / weights.sum())]
        loss = step_loss(vae, augment(to_tensor(batch)))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        ema.update()
        if report_due(step, steps):
            print(
                f"{time.monotonic() - started:.0f} s, step {step + 1}: loss {loss.item():.5f}",
                flush=True,
            )
    ema.swap()
    return vae.eval()


@torch.no_grad()
def psnr(vae: AutoencoderKL, images: np.ndarray) -> float:
    """dB, the mean over pictures uint8 `[n, 64, 64, 3]`."""
    x = to_tensor(images)
    out = vae.decode(vae.encode(x).latent_dist.mode()).sample.clamp(-1, 1)
    return float((-10 * ((out - x) / 2).square().mean((1, 2, 3)).log10()).mean())


@torch.no_grad()
def encode(vae: AutoencoderKL, images: np.ndarray) -> Tensor:
    """Posterior mean and standard deviation, `[n, 2, 4, 16, 16]`, not scaled."""
    parts = [
        vae.encode(to_tensor(images[i : i + 64])).latent_dist for i in range(0, len(images), 64)
    ]
    return torch.cat([torch.stack([p.mean, p.std], 1) for p in parts])


@torch.no_grad()
def whiten(vae: AutoencoderKL, means: Tensor) -> None:
    """Fold a shift and scale per channel into the two 1x1 convolutions beside the latents, so that
    latents * scaling_factor have mean 0 and variance 1: the pipeline knows only the scalar. `means`
    `[n, 4, h, w]`."""
    shift, scale = means.mean((0, 2, 3)), means.std((0, 2, 3)) * SCALING
    into, out = vae.quant_conv, vae.post_quant_conv
    out.bias += out.weight[:, :, 0, 0] @ shift
    out.weight *= scale[None, :, None, None]
    into.weight[:4] /= scale[:, None, None, None]
    into.bias[:4] = (into.bias[:4] - shift) / scale
    into.bias[4:] -= 2 * scale.log()  # these are log-variances
    vae.register_to_config(scaling_factor=SCALING)


def main() -> None:
    args = arguments(__doc__, BUILD / "vae", steps=2824).parse_args()
    start(args)
    images, rows = load(args.data, "pretrain")
    fluent, _ = load(args.data, "fluent")
    vae = train(images, rows, steps=args.steps, seed=args.seed)
    base = np.array([r["skin"] is None for r in rows])
    whiten(vae, encode(vae, images[base])[:, 0])
    vae.save_pretrained(args.output)
    save_file(
        {"latents": (encode(vae, images) * SCALING).half()}, args.output / "latents.safetensors"
    )
    rng = np.random.default_rng(0)
    picked = {
        k: v[rng.choice(len(v), 64, replace=False)]
        for k, v in (("pretrain", images), ("fluent", fluent))
    }
    results = {f"psnr_{k}_db": round(psnr(vae, v), 2) for k, v in picked.items()}
    record(args.output, args, **results)
    print(results)


if __name__ == "__main__":
    main()
