"""Shared by the scripts that made the embedded miniature Stable Diffusion."""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

SIZE = 64  # px
SCALING = 0.5  # of the latents; not 1, so that code which forgets the VAE's scaling factor fails visibly
LATENT_STD = 1 / SCALING


def arguments(description: str, steps: int | None = None) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--data", type=Path, default=Path("mini-sd-build/data"), help="made by prepare_data.py")
    parser.add_argument("--work", type=Path, default=Path("mini-sd-build/work"), help="tokenizer, VAE, latents, model")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    if steps is not None:
        parser.add_argument("--steps", type=int, default=steps)
    return parser


def load(data: Path, name: str) -> tuple[np.ndarray, list[dict]]:
    """Pictures uint8 `[n, 64, 64, 3]` and one row of facts for each."""
    images = np.load(data / f"{name}.npz")["images"]
    rows = [json.loads(line) for line in (data / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]
    return images, rows


def to_tensor(images: np.ndarray) -> Tensor:
    """uint8 `[n, h, w, 3]` -> float `[n, 3, h, w]` in [-1, 1]."""
    return torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1


def learning_rate(step: int, steps: int, warm_up: int, peak: float, floor: float = 0.02) -> float:
    """Linear warm-up, then a cosine down to `floor` of the peak."""
    cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, step / steps)))
    return peak * min(1.0, (step + 1) / warm_up) * (floor + (1 - floor) * cosine)


class EMA:
    """Exponential moving average of a module's parameters."""

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.decay, self.updates = decay, 0
        self.live = list(module.parameters())
        self.average = [p.detach().clone() for p in self.live]

    @torch.no_grad()
    def update(self) -> None:
        self.updates += 1
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        torch._foreach_lerp_(self.average, [p.detach() for p in self.live], 1 - decay)

    @torch.no_grad()
    def swap(self) -> None:
        """Exchange live and averaged weights."""
        for live, average in zip(self.live, self.average, strict=True):
            held = live.detach().clone()
            live.copy_(average)
            average.copy_(held)
