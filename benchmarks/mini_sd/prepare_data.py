"""Fetch the emoji packages with `npm pack` and make the arrays for pre-training and the subjects
for fine-tuning.

    python benchmarks/mini_sd/prepare_data.py --output DIR

Writes data/pretrain.{npz,jsonl} (Twitter and Google drawings), data/emojione.{npz,jsonl} (EmojiOne,
for the VAE and the UNet only), data/fluent.{npz,jsonl} (Microsoft Fluent 3D: never used in
pre-training) and subjects/<name>/{train,heldout}/*.png with
metadata.jsonl.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import re
import shutil
import subprocess
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from common import BUILD, SIZE
from PIL import Image
from subjects import SUBJECTS, make_subjects


@dataclass(frozen=True)
class Package:
    name: str
    version: str
    sha256: str  # of the tarball that `npm pack` fetches


PACKAGES = {
    "twitter": Package(
        "emoji-datasource-twitter",
        "16.0.0",
        "f64a530c63bca463bd8317fdc4615ce63a53a0c65018e4ce2d848aaba7a28877",
    ),
    "google": Package(
        "emoji-datasource-google",
        "16.0.0",
        "fb5fd131b362aab7a55542d2a147a79708cce0a8b1c1bbacd470172708b5c438",
    ),
    "emojione": Package(
        "emojione",
        "2.2.7",
        "5fe002738e6e276f49ac37783799d2feab99a6131fdedccfa56569d745449ae5",
    ),
    "fluent": Package(
        "@lobehub/fluent-emoji-3d",
        "1.1.0",
        "c1bb7eee7de090205a232518a9ab4adb3df458bfbe8a1f78232991194c8b2e58",
    ),
}
SKIN_TONES = {
    "1F3FB": "light",
    "1F3FC": "medium-light",
    "1F3FD": "medium",
    "1F3FE": "medium-dark",
    "1F3FF": "dark",
}
LEFT_OUT = ("country-flag", "subdivision-flag", "family", "skin-tone")


def archive(package: Package, npm: Path) -> Path:
    """The package's tarball, fetched once and checked every time. Raises SystemExit when it is not
    the recorded one."""
    file = npm / f"{package.name.replace('@', '').replace('/', '-')}-{package.version}.tgz"
    if not file.exists():
        command = shutil.which("npm")
        if command is None:
            raise SystemExit(
                f"'{file}' is missing and npm was not found. Install Node.js, or put the tarball "
                "there."
            )
        npm.mkdir(parents=True, exist_ok=True)
        subprocess.run(
            [command, "pack", f"{package.name}@{package.version}", "--silent"], cwd=npm, check=True
        )
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    if digest != package.sha256:
        raise SystemExit(
            f"'{file}' has SHA-256 {digest}, not {package.sha256}. Delete it to fetch it again."
        )
    return file


def members(file: Path, wanted: Callable[[str], bool]) -> dict[str, bytes]:
    """Contents of the tarball's wanted files by base name without suffix."""
    found = {}
    with tarfile.open(file) as tar:
        for member in tar:
            if member.isfile() and wanted(member.name):
                handle = tar.extractfile(member)
                assert handle is not None
                found[Path(member.name).stem.lower()] = handle.read()
    return found


def on_white(raw: bytes, margin: int = 0) -> np.ndarray:
    """A picture with alpha -> uint8 `[64, 64, 3]` on white; resized with premultiplied alpha, which
    keeps edges clean."""
    rgba = np.asarray(Image.open(io.BytesIO(raw)).convert("RGBA")).astype(np.float32) / 255
    rgba[..., :3] *= rgba[..., 3:]
    side = SIZE - 2 * margin
    if rgba.shape[:2] != (side, side):
        channels = [
            Image.fromarray(rgba[..., c]).resize((side, side), Image.Resampling.LANCZOS)
            for c in range(4)
        ]
        rgba = np.clip(np.stack([np.asarray(c) for c in channels], -1), 0, 1)
    out = np.ones((SIZE, SIZE, 3), np.float32)
    out[margin : margin + side, margin : margin + side] = rgba[..., :3] + 1 - rgba[..., 3:]
    return (np.clip(out, 0, 1) * 255 + 0.5).astype(np.uint8)


def words(name: str) -> str:
    return " ".join(re.sub(r"[_\-,]", " ", name.lower()).split())


def facts(entry: dict, vendor: str, skin: str | None) -> dict:
    return {
        "name": words(entry["name"] or entry["short_name"]),
        "short": words(entry["short_name"]),
        "vendor": vendor,
        "category": entry["category"],
        "unified": entry["unified"],
        "skin": skin,
    }


def pretraining(emoji: list[dict], npm: Path) -> Iterator[tuple[np.ndarray, dict]]:
    for vendor in ("twitter", "google"):
        files = members(
            archive(PACKAGES[vendor], npm),
            lambda n, v=vendor: f"/img/{v}/64/" in n and n.endswith(".png"),
        )
        for entry in emoji:
            variants = [(entry["image"], None)]
            variants += [
                (v["image"], SKIN_TONES[s])
                for s, v in entry.get("skin_variations", {}).items()
                if s in SKIN_TONES
            ]
            for image, skin in variants:
                raw = files.get(Path(image).stem.lower())
                if raw is not None:
                    yield on_white(raw), facts(entry, vendor, skin)


def emojione(emoji: list[dict], npm: Path) -> Iterator[tuple[np.ndarray, dict]]:
    """Its file names leave joiners and variation selectors out."""
    files = members(
        archive(PACKAGES["emojione"], npm),
        lambda n: n.startswith("package/assets/png/") and n.endswith(".png"),
    )
    for entry in emoji:
        raw = files.get(re.sub("-(fe0f|200d)(?=-|$)", "", entry["unified"].lower()))
        if raw is not None:
            yield on_white(raw), facts(entry, "emojione", None)


def fluent(emoji: list[dict], npm: Path) -> Iterator[tuple[np.ndarray, dict]]:
    files = members(archive(PACKAGES["fluent"], npm), lambda n: n.endswith(".webp"))
    plain = {key.replace("-fe0f", ""): raw for key, raw in files.items()}
    for entry in emoji:
        key = entry["unified"].lower()
        raw = files.get(key) or plain.get(key.replace("-fe0f", ""))
        if raw is not None:
            yield on_white(raw, margin=1), facts(entry, "fluent3d", None)


def save(rows: Iterator[tuple[np.ndarray, dict]], data: Path, name: str) -> None:
    images, about = zip(*rows, strict=True)
    np.savez(data / f"{name}.npz", images=np.stack(images))
    (data / f"{name}.jsonl").write_text(
        "".join(json.dumps(r) + "\n" for r in about), encoding="utf-8"
    )
    print(f"{name}: {len(images)} pictures")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, default=BUILD)
    parser.add_argument(
        "--npm", type=Path, help="where the tarballs are or shall be (default: OUTPUT/npm)"
    )
    args = parser.parse_args()
    npm, data = args.npm or args.output / "npm", args.output / "data"
    data.mkdir(parents=True, exist_ok=True)
    with tarfile.open(archive(PACKAGES["twitter"], npm)) as tar:
        handle = tar.extractfile("package/emoji.json")
        assert handle is not None
        emoji = [e for e in json.load(handle) if e["subcategory"] not in LEFT_OUT]
    save(pretraining(emoji, npm), data, "pretrain")
    save(emojione(emoji, npm), data, "emojione")
    save(fluent(emoji, npm), data, "fluent")
    make_subjects(data, args.output / "subjects", SUBJECTS)


if __name__ == "__main__":
    main()
