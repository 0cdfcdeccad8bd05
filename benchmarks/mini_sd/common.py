"""Shared by the scripts that made the embedded miniature Stable Diffusion."""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
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
        parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return parser


def start(args: argparse.Namespace) -> None:
    """Equal seeds and threads give equal weights on one CPU: no learning rate reads the clock."""
    for name in ("steps", "threads", "batch_size", "copies", "save_every"):
        if (value := getattr(args, name, 1)) < 1:
            raise SystemExit(f"--{name.replace('_', '-')} is {value}: give at least 1.")
    torch.set_num_threads(args.threads)
    torch.backends.cudnn.benchmark = True  # shapes never change
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


def load_drawings(data: Path) -> tuple[np.ndarray, list[dict]]:
    """Everything that the VAE and the UNet learn from: Twitter's, Google's and EmojiOne's
    drawings."""
    (images, rows), (more, about) = load(data, "pretrain"), load(data, "emojione")
    return np.concatenate([images, more]), rows + about


def to_tensor(images: np.ndarray | Tensor) -> Tensor:
    """uint8 `[n, h, w, 3]` -> float `[n, 3, h, w]` in [-1, 1], on the same device."""
    return torch.as_tensor(images).permute(0, 3, 1, 2).float() / 127.5 - 1


def cumulative(weights: list[float], device: torch.device | str) -> Tensor:
    """Weights -> the shares up to each, for `draw`. `[n]`, the last is 1."""
    sums = torch.tensor(weights, dtype=torch.float64).cumsum(0)
    return (sums / sums[-1]).to(device)


def draw(shares: Tensor, n: int) -> Tensor:
    """n indices with replacement. Unlike torch.multinomial it never waits for a GPU."""
    chance = torch.rand(n, dtype=torch.float64, device=shares.device)
    return torch.searchsorted(shares, chance, right=True)


def move(x: Tensor, zoom: Tensor, turn: Tensor, shift: Tensor, mode: str = "bilinear") -> Tensor:
    """Resample pictures `[n, 3, h, w]` on white: `zoom`, `turn` (radians) `[n]`, `shift` `[n, 2]`
    (half a side is 1). `mode` "bicubic" keeps them sharper."""
    rows = [zoom * turn.cos(), -zoom * turn.sin(), zoom * turn.sin(), zoom * turn.cos()]
    matrix = torch.cat([torch.stack(rows, 1).view(-1, 2, 2), shift.unsqueeze(2)], 2)
    grid = F.affine_grid(matrix, list(x.shape), align_corners=False)
    drawn = F.grid_sample(1 - x, grid, mode, padding_mode="zeros", align_corners=False)
    return (1 - drawn).clamp(-1, 1)


def shade(x: Tensor, darkest: float = 0.4, brightest: float = 1.3, share: float = 0.5) -> Tensor:
    """A share of the pictures gets a smooth light where they are not white, so that not all of them
    are flat."""
    n = len(x)
    light = torch.rand(n, 1, 3, 3, device=x.device) * (brightest - darkest) + darkest
    light = F.interpolate(light, size=x.shape[-2:], mode="bicubic", align_corners=True)
    chosen = torch.rand(n, 1, 1, 1, device=x.device) < share
    drawn = ((1 - x).amax(1, keepdim=True) > 0.05) & chosen
    return torch.where(drawn, ((x + 1) * light - 1).clamp(-1, 1), x)


def learning_rate(step: int, steps: int, warm_up: int, peak: float, floor: float = 0.02) -> float:
    """Linear warm-up, then a cosine down to `floor` of the peak."""
    cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, step / steps)))
    return peak * min(1.0, (step + 1) / warm_up) * (floor + (1 - floor) * cosine)


def report_due(step: int, steps: int) -> bool:
    return (step + 1) % 250 == 0 or step + 1 == steps
