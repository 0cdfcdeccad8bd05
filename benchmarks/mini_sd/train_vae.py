"""Train the AutoencoderKL (4 times smaller, 4 channels) on the pre-training drawings, and cache their latents."""

from __future__ import annotations

import time

import numpy as np
import torch
from common import EMA, LATENT_STD, SCALING, SIZE, arguments, learning_rate, load, to_tensor
from diffusers import AutoencoderKL
from torch import Tensor
from torch.nn import functional as F

BATCH, PEAK_LR, KL_WEIGHT, L1_WEIGHT, SKIN_TONE_WEIGHT = 16, 2e-3, 3e-4, 0.25, 0.25
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
    """Flips for all; half of the batch is also zoomed, turned and shifted, has its colour channels permuted, and is shaded
    smoothly where it is not white, so that the VAE knows more than flat drawings."""
    n = len(x)
    x = torch.where((torch.rand(n) < 0.5).view(-1, 1, 1, 1), x.flip(-1), x)
    half = n // 2
    zoom, turn = 0.75 + 0.6 * torch.rand(half), (torch.rand(half) - 0.5) * 0.6
    rows = [zoom * turn.cos(), -zoom * turn.sin(), zoom * turn.sin(), zoom * turn.cos()]
    matrix = torch.cat([torch.stack(rows, 1).view(-1, 2, 2), (torch.rand(half, 2, 1) - 0.5) * 0.3], 2)
    grid = F.affine_grid(matrix, list(x[:half].shape), align_corners=False)
    moved = 1 - F.grid_sample(1 - x[:half], grid, padding_mode="zeros", align_corners=False)
    moved[::2] = torch.stack([picture[torch.randperm(3)] for picture in moved[::2]])
    light = F.interpolate(torch.rand(half, 1, 3, 3) * 0.9 + 0.4, size=x.shape[-2:], mode="bicubic", align_corners=True)
    drawn = ((1 - moved).amax(1, keepdim=True) > 0.05) & (torch.rand(half, 1, 1, 1) < 0.5)
    shaded = ((moved + 1) * light - 1).clamp(-1, 1)
    return torch.cat([torch.where(drawn, shaded, moved), x[half:]])


def step_loss(vae: AutoencoderKL, x: Tensor) -> Tensor:
    """MSE + 0.25 L1 + 3e-4 KL per latent dimension."""
    with torch.autocast("cpu", torch.bfloat16):
        posterior = vae.encode(x).latent_dist
        out = vae.decode(posterior.sample()).sample
    difference = out.float() - x
    kl = posterior.kl().float().mean() / (4 * (SIZE // 4) ** 2)
    return difference.square().mean() + L1_WEIGHT * difference.abs().mean() + KL_WEIGHT * kl


@torch.no_grad()
def psnr(vae: AutoencoderKL, images: np.ndarray) -> float:
    x = to_tensor(images)
    out = vae.decode(vae.encode(x).latent_dist.mode()).sample.clamp(-1, 1)
    return float((-10 * ((out - x) / 2).square().mean((1, 2, 3)).log10()).mean())


@torch.no_grad()
def encode(vae: AutoencoderKL, images: np.ndarray) -> Tensor:
    """Posterior mean and standard deviation, `[n, 2, 4, 16, 16]`, not scaled."""
    parts = [vae.encode(to_tensor(images[i : i + 64])).latent_dist for i in range(0, len(images), 64)]
    return torch.cat([torch.stack([p.mean, p.std], 1) for p in parts])


@torch.no_grad()
def whiten(vae: AutoencoderKL, means: Tensor) -> None:
    """Fold a shift and scale per channel into the two 1x1 convolutions beside the latents, so that latents * scaling_factor have
    mean 0 and variance 1: the pipeline knows only the scalar."""
    shift, scale = means.mean((0, 2, 3)), means.std((0, 2, 3)) / LATENT_STD
    into, out = vae.quant_conv, vae.post_quant_conv
    out.bias += out.weight[:, :, 0, 0] @ shift
    out.weight *= scale[None, :, None, None]
    into.weight[:4] /= scale[:, None, None, None]
    into.bias[:4] = (into.bias[:4] - shift) / scale
    into.bias[4:] -= 2 * scale.log()  # these are log-variances
    vae.register_to_config(scaling_factor=SCALING)


def main() -> None:
    args = arguments(__doc__, steps=2824).parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    images, rows = load(args.data, "pretrain")
    base = np.array([r["skin"] is None for r in rows])
    weights = np.where(base, 1.0, SKIN_TONE_WEIGHT)
    vae = AutoencoderKL(**CONFIG)
    ema = EMA(vae, 0.998)
    optimizer = torch.optim.AdamW(vae.parameters(), PEAK_LR, betas=(0.9, 0.99), weight_decay=0.0)
    rng = np.random.default_rng(args.seed)
    started = time.monotonic()
    for step in range(args.steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, args.steps, 100, PEAK_LR)
        loss = step_loss(vae, augment(to_tensor(images[rng.choice(len(images), BATCH, p=weights / weights.sum())])))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        ema.update()
        if (step + 1) % 250 == 0 or step + 1 == args.steps:
            print(f"{time.monotonic() - started:.0f} s, step {step + 1}: loss {loss.item():.5f}", flush=True)
    ema.swap()
    vae.eval()
    whiten(vae, encode(vae, images[base])[:, 0])
    vae.save_pretrained(args.work / "vae")
    torch.save((encode(vae, images) * SCALING).half(), args.work / "latents.pt")
    fluent, _ = load(args.data, "fluent")
    print(
        f"PSNR: pre-training {psnr(vae, images[base][:64]):.2f} dB, Fluent 3D (never seen) {psnr(vae, fluent[:64]):.2f} dB"
    )


if __name__ == "__main__":
    main()
