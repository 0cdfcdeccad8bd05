"""Draw a grid with a saved pipeline (DDIM): a look at what it has learnt.

python benchmarks/mini_sd/sample.py cntlora_core/mini_sd/model --output grid.png
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from common import start
from diffusers import StableDiffusionPipeline
from PIL import Image

NAMES = (
    "grinning face",
    "red heart",
    "blue heart",
    "cat face",
    "dog face",
    "panda face",
    "lion face",
    "fox face",
    "automobile",
    "bus",
    "red apple",
    "hamburger",
    "evergreen tree",
    "house building",
    "penguin",
    "green cat face",
)
PROMPTS = [f"{name} emoji, {vendor} style" for name in NAMES for vendor in ("twitter", "google")]
COLUMNS = 8


def sheet(pictures: list[Image.Image], columns: int = COLUMNS) -> Image.Image:
    """Pictures of one size side by side, twice as large."""
    side = 2 * pictures[0].width
    grid = Image.new("RGB", (columns * side, -(-len(pictures) // columns) * side), "white")
    for i, picture in enumerate(pictures):
        large = picture.resize((side, side), Image.Resampling.LANCZOS)
        grid.paste(large, (i % columns * side, i // columns * side))
    return grid


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("pipeline", type=Path)
    parser.add_argument("--output", type=Path, default=Path("grid.png"))
    parser.add_argument(
        "--prompt", action="append", help="instead of the built-in prompts; may be repeated"
    )
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--guidance", type=float, default=4.0)
    parser.add_argument(
        "--seed", type=int, default=0, help="of the first picture; the others count up"
    )
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    start(args)
    prompts = args.prompt or PROMPTS
    pipe = StableDiffusionPipeline.from_pretrained(
        args.pipeline, torch_dtype=torch.float32, local_files_only=True
    )
    seeds = [torch.Generator().manual_seed(args.seed + i) for i in range(len(prompts))]
    pictures = pipe(
        prompts, num_inference_steps=args.steps, guidance_scale=args.guidance, generator=seeds
    ).images
    args.output.parent.mkdir(parents=True, exist_ok=True)
    sheet(pictures).save(args.output)


if __name__ == "__main__":
    main()
