"""Train the AutoencoderKL (4 times smaller, 4 channels) on the pre-training drawings.

    python benchmarks/mini_sd/train_vae.py --steps 9000 --data DIR --output DIR

Writes a diffusers folder.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from common import (
    BUILD,
    SCALING,
    SIZE,
    arguments,
    cumulative,
    draw,
    load,
    load_drawings,
    move,
    record,
    shade,
    start,
    to_tensor,
)
from diffusers import AutoencoderKL
from torch import Tensor
from training import Plan, Training, add_arguments, bf16, plan

BATCH, PEAK_LR, WARM_UP, EMA_DECAY = 64, 2e-3, 200, 0.998
KL_WEIGHT, L1_WEIGHT, EDGE_WEIGHT, SKIN_TONE_WEIGHT = 3e-4, 0.25, 0.25, 0.25
CHUNK = 64  # pictures coded at once when nothing is learnt
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
    """Flips for all; half of the batch is also zoomed, turned, shifted and shaded, and a half of
    those have colour channels permuted."""
    n, half, device = len(x), len(x) // 2, x.device
    x = torch.where(torch.rand(n, 1, 1, 1, device=device) < 0.5, x.flip(-1), x)
    zoom, turn, shift = torch.rand(4, half, device=device).split((1, 1, 2))
    moved = move(
        x[:half],
        0.75 + 0.6 * zoom[0],
        (turn[0] - 0.5) * 0.6,
        (shift.T - 0.5) * 0.3,
        mode="bicubic",
    )
    order = torch.rand(half, 3, device=device).argsort(1).view(half, 3, 1, 1)
    permuted = moved.gather(1, order.expand_as(moved))
    moved = torch.where(torch.rand(half, 1, 1, 1, device=device) < 0.5, permuted, moved)
    return torch.cat([shade(moved), x[half:]])


def step_loss(vae: AutoencoderKL, x: Tensor) -> Tensor:
    """MSE + 0.25 L1 + 0.25 L1 of the differences between neighbours, which keeps eyes and mouths
    sharp, + 3e-4 KL per latent dimension."""
    with bf16(x.device):
        posterior = vae.encode(x).latent_dist
        out = vae.decode(posterior.sample()).sample
    wrong = out.float() - x
    edges = wrong.diff(dim=-1).abs().mean() + wrong.diff(dim=-2).abs().mean()
    kl = posterior.kl().float().mean() / (4 * (SIZE // 4) ** 2)
    flat = wrong.square().mean() + L1_WEIGHT * wrong.abs().mean()
    return flat + EDGE_WEIGHT * edges + KL_WEIGHT * kl


def train(
    vae: AutoencoderKL, images: np.ndarray, rows: list[dict], plan: Plan, *, batch: int
) -> AutoencoderKL:
    """Train in place, up to the averaged weights. `images` uint8 `[n, 64, 64, 3]`."""
    device = vae.device
    pictures = torch.as_tensor(images, device=device)
    shares = cumulative([SKIN_TONE_WEIGHT if r["skin"] else 1.0 for r in rows], device)

    def loss() -> tuple[Tensor, Tensor]:
        total = step_loss(vae, augment(to_tensor(pictures[draw(shares, batch)])))
        return total, total

    groups = [{"params": list(vae.parameters()), "peak": PEAK_LR, "weight_decay": 0.0}]
    Training(vae.train(), groups, loss, plan).run()
    return vae.eval()


def reconstruct(vae: AutoencoderKL, x: Tensor) -> Tensor:
    """Pictures `[n, 3, 64, 64]` through the latents, without their noise."""
    return vae.decode(vae.encode(x).latent_dist.mode()).sample.clamp(-1, 1)


@torch.no_grad()
def psnr(vae: AutoencoderKL, images: np.ndarray) -> float:
    """dB, the mean over pictures uint8 `[n, 64, 64, 3]`."""
    found = []
    for part in to_tensor(images).to(vae.device).split(CHUNK):
        wrong = (reconstruct(vae, part) - part) / 2
        found.append(-10 * wrong.square().mean((1, 2, 3)).log10())
    return float(torch.cat(found).mean())


@torch.no_grad()
def encode(vae: AutoencoderKL, x: Tensor) -> Tensor:
    """Posterior mean and standard deviation of pictures `[n, 3, 64, 64]`, `[n, 2, 4, 16, 16]`, not
    scaled."""
    parts = [vae.encode(part).latent_dist for part in x.split(CHUNK)]
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


def finish(vae: AutoencoderKL, images: np.ndarray, rows: list[dict]) -> None:
    """Whiten on the drawings that are no skin tones."""
    base = np.array([r["skin"] is None for r in rows])
    whiten(vae, encode(vae, to_tensor(images[base]).to(vae.device))[:, 0])


def fidelity(vae: AutoencoderKL, data: Path) -> dict[str, float]:
    """PSNR on 64 drawings that it learnt and 64 of the unseen style."""
    rng, results = np.random.default_rng(0), {}
    for name in ("pretrain", "fluent"):
        images, _ = load(data, name)
        picked = images[rng.choice(len(images), min(64, len(images)), replace=False)]
        results[f"psnr_{name}_db"] = round(psnr(vae, picked), 2)
    return results


def main() -> None:
    parser = arguments(__doc__, BUILD / "vae", steps=9000)
    add_arguments(parser, BATCH)
    args = parser.parse_args()
    start(args)
    images, rows = load_drawings(args.data)
    vae = AutoencoderKL(**CONFIG).to(args.device)
    train(vae, images, rows, plan(args, WARM_UP, EMA_DECAY), batch=args.batch_size)
    finish(vae, images, rows)
    vae.save_pretrained(args.output)
    results = fidelity(vae, args.data)
    record(args.output, args, **results)
    print(results)


if __name__ == "__main__":
    main()
