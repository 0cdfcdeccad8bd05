"""Draw a grid with a saved pipeline: a look at what it has learnt."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from diffusers import StableDiffusionPipeline
from PIL import Image

PROMPTS = [f"{name} emoji, {vendor} style" for name in (
    "grinning face", "red heart", "blue heart", "cat face", "dog face", "panda face", "lion face", "fox face",
    "automobile", "bus", "red apple", "hamburger", "evergreen tree", "house building", "penguin", "green cat face",
) for vendor in ("twitter", "google")]  # fmt: skip
COLUMNS = 8


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("pipeline", type=Path)
    parser.add_argument("--output", type=Path, default=Path("grid.png"))
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--guidance", type=float, default=4.0)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    pipe = StableDiffusionPipeline.from_pretrained(args.pipeline, torch_dtype=torch.float32, local_files_only=True)
    seeds = [torch.Generator().manual_seed(i) for i in range(len(PROMPTS))]
    pictures = pipe(PROMPTS, num_inference_steps=args.steps, guidance_scale=args.guidance, generator=seeds).images
    side = 2 * pictures[0].width
    grid = Image.new("RGB", (COLUMNS * side, -(-len(pictures) // COLUMNS) * side))
    for i, picture in enumerate(pictures):
        grid.paste(picture.resize((side, side), Image.Resampling.LANCZOS), (i % COLUMNS * side, i // COLUMNS * side))
    grid.save(args.output)


if __name__ == "__main__":
    main()
