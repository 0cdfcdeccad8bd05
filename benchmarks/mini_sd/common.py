"""Shared by the scripts that made the embedded miniature Stable Diffusion."""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

SIZE = 64  # px
SCALING = (
    0.5  # of the latents; not 1, so that code which forgets the VAE's scaling factor fails visibly
)
BUILD = Path("mini-sd-build")


def arguments(
    description: str | None, output: Path, steps: int | None = None
) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, default=BUILD / "data", help="made by prepare_data.py")
    parser.add_argument("--output", type=Path, default=output)
    if steps is not None:
        parser.add_argument("--steps", type=int, default=steps)
        parser.add_argument("--seed", type=int, default=0)
        # Beside another busy process two threads were 20 times slower than one; and sums depend on
        # the number of threads.
        parser.add_argument("--threads", type=int, default=2, help="1 when the machine is shared")
    return parser


def start(args: argparse.Namespace) -> None:
    """Equal seeds and threads give equal weights on one machine: no learning rate reads the
    clock."""
    for name in ("steps", "threads"):
        if (value := getattr(args, name, 1)) < 1:
            raise SystemExit(f"--{name} is {value}: give at least 1.")
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)


def record(folder: Path, args: argparse.Namespace, **results: Any) -> None:
    """Write settings and results beside the weights, without paths."""
    settings = {k: v for k, v in vars(args).items() if not isinstance(v, Path)}
    text = json.dumps(settings | {"torch": str(torch.__version__)} | results, indent=1)
    (folder / "recipe.json").write_text(text + "\n", encoding="utf-8")


def load(data: Path, name: str) -> tuple[np.ndarray, list[dict]]:
    """Pictures uint8 `[n, 64, 64, 3]` and one row of facts for each."""
    try:
        images = np.load(data / f"{name}.npz")["images"]
        lines = (data / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
    except FileNotFoundError as error:
        raise SystemExit(
            f"'{error.filename}' is missing. Run prepare_data.py first, or give its --data."
        ) from error
    return images, [json.loads(line) for line in lines]


def to_tensor(images: np.ndarray) -> Tensor:
    """uint8 `[n, h, w, 3]` -> float `[n, 3, h, w]` in [-1, 1]."""
    return torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1


def move(x: Tensor, zoom: Tensor, turn: Tensor, shift: Tensor) -> Tensor:
    """Resample pictures `[n, 3, h, w]` on white: `zoom`, `turn` (radians) `[n]`, `shift` `[n, 2]`
    (half a side is 1)."""
    rows = [zoom * turn.cos(), -zoom * turn.sin(), zoom * turn.sin(), zoom * turn.cos()]
    matrix = torch.cat([torch.stack(rows, 1).view(-1, 2, 2), shift.unsqueeze(2)], 2)
    grid = F.affine_grid(matrix, list(x.shape), align_corners=False)
    return 1 - F.grid_sample(1 - x, grid, padding_mode="zeros", align_corners=False)


def shade(x: Tensor, darkest: float = 0.4, brightest: float = 1.3) -> Tensor:
    """Half of the pictures get a smooth light where they are not white, so that not all of them are
    flat."""
    n = len(x)
    light = torch.rand(n, 1, 3, 3) * (brightest - darkest) + darkest
    light = F.interpolate(light, size=x.shape[-2:], mode="bicubic", align_corners=True)
    drawn = ((1 - x).amax(1, keepdim=True) > 0.05) & (torch.rand(n, 1, 1, 1) < 0.5)
    return torch.where(drawn, ((x + 1) * light - 1).clamp(-1, 1), x)


def learning_rate(step: int, steps: int, warm_up: int, peak: float, floor: float = 0.02) -> float:
    """Linear warm-up, then a cosine down to `floor` of the peak."""
    cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, step / steps)))
    return peak * min(1.0, (step + 1) / warm_up) * (floor + (1 - floor) * cosine)


def report_due(step: int, steps: int) -> bool:
    return (step + 1) % 250 == 0 or step + 1 == steps


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
