"""Shuffled tags: whether they cost likeness, and what their variants take, on the embedded model.

    python benchmarks/tags.py --subjects subjects/hearts subjects/smileys --seeds 0 1
    python benchmarks/tags.py --variants subjects/hearts

The captions are tags made from the pictures' names. The held-out loss, a share of the untouched
model's, is that of the weights that are kept; once with the tags as they were written, once with
all but the first the other way round, which nobody trained on in that order.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from dataclasses import replace
from pathlib import Path

from cntlora_core.config import CalibrationConfig, DataConfig, TrainConfig
from cntlora_core.data.dataset import encode_subject
from cntlora_core.data.images import Picture, find_pictures
from cntlora_core.defaults import MINI_SD, resolve
from cntlora_core.lora.adapter import attached_lora
from cntlora_core.model.loader import StableDiffusion, load_checkpoint
from cntlora_core.run.runs import run_training
from cntlora_core.training.validation import validation_loss

WAYS = {
    "in order": DataConfig(),
    "shuffled": DataConfig(shuffle_tags=True),
    "shuffled, 0.1 left out": DataConfig(shuffle_tags=True, tag_dropout=0.1),
}
COUNTS = (1, 4, 16)
TOKENS = 77
WIDTHS = {"SD 1.5": 768, "SD 2": 1024, "SDXL": 2048 + 1280 / TOKENS}  # a token's, SDXL's pooled too


def pictures(folder: Path, *, backwards: bool = False) -> list[Picture]:
    """With captions like `sks, blue, heart, emoji, fluent style`."""
    lines = (folder / "metadata.jsonl").read_text("utf-8").splitlines()
    names = {row["file_name"]: row["name"] for row in map(json.loads, lines)}
    found = []
    for picture in find_pictures(folder):
        tags = [*dict.fromkeys(names[picture.name].split()), "emoji", "fluent style"]
        tags = tags[::-1] if backwards else tags
        found.append(replace(picture, caption=", ".join(["sks", *tags])))
    return found


def losses(model: StableDiffusion, folder: Path, way: str, seed: int) -> list[float]:
    """Of the kept weights, shares of the untouched model's: tags as written, the other way
    round."""
    subject = encode_subject(model, pictures(folder / "train"), "", WAYS[way])
    looks = [
        validation_loss(
            model,
            encode_subject(model, pictures(folder / "heldout", backwards=backwards), ""),
            8,
        )
        for backwards in (False, True)
    ]
    base = [look() for look in looks]
    calibration = CalibrationConfig(seed=seed)
    training = resolve(TrainConfig(seed=seed), model.name, "target", subject.picture_count)
    run = run_training(model, subject, calibration, training, validate=looks[0])
    with attached_lora(model.unet, run.lora):
        return [look() / untouched for look, untouched in zip(looks, base, strict=True)]


def variants(model: StableDiffusion, folder: Path) -> None:
    """Seconds and bytes of so many variants a picture, here and from the shapes of real models."""
    found = pictures(folder / "train")
    print(
        "| variants | seconds, embedded model | MB a 1000 pictures in 16 bits: " + ", ".join(WIDTHS)
    )
    for count in COUNTS:
        data = DataConfig(shuffle_tags=True, caption_variants=count)
        seconds = []
        for _ in range(5):
            began = time.perf_counter()
            encode_subject(model, found, "", data)
            seconds.append(time.perf_counter() - began)
        sizes = [1000 * count * TOKENS * width * 2 / 1e6 for width in WIDTHS.values()]
        cells = ", ".join(f"{size:.0f}" for size in sizes)
        print(f"| {count} | {statistics.median(seconds):.2f} ({len(found)} pictures) | {cells}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--subjects", type=Path, nargs="*", default=[], metavar="DIR")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--variants", type=Path, metavar="DIR", help="what variants take")
    args = parser.parse_args()
    model = load_checkpoint(MINI_SD)
    if args.variants:
        variants(model, args.variants)
    for folder in args.subjects:
        for way in WAYS:
            found = [losses(model, folder, way, seed) for seed in args.seeds]
            written, turned = (statistics.mean(column) for column in zip(*found, strict=True))
            print(f"| {folder.name} | {way} | {written:.3f} | {turned:.3f} |", flush=True)


if __name__ == "__main__":
    main()
