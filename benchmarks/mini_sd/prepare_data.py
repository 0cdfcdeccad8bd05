"""Fetch the emoji packages with `npm pack` and make the arrays for pre-training and the subjects for fine-tuning.

Writes data/pretrain.{npz,jsonl} (Twitter and Google drawings), data/fluent.{npz,jsonl} (Microsoft Fluent 3D: never used in
pre-training) and subjects/<name>/{train,heldout}/*.png with metadata.jsonl.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import re
import subprocess
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from common import SIZE
from PIL import Image

PACKAGES = {
    "twitter": ("emoji-datasource-twitter", "16.0.0"),
    "google": ("emoji-datasource-google", "16.0.0"),
    "fluent": ("@lobehub/fluent-emoji-3d", "1.1.0"),
}
SKIN_TONES = {"1F3FB": "light", "1F3FC": "medium-light", "1F3FD": "medium", "1F3FE": "medium-dark", "1F3FF": "dark"}
LEFT_OUT = ("country-flag", "subdivision-flag", "family", "skin-tone")

# Subjects: class, pattern of the names, names that are held out (a pattern). Only names of the Fluent set count.
SUBJECTS = {
    "cat_faces": ("cat face", r"cat face with.*|.+ cat face.*", r"kissing|open mouth|weary"),
    "hearts": ("heart", r"(\w+ )?(heavy black |blue |brown |green |pink |purple |white |yellow |black |grey |light blue |orange )heart", r"^(black|grey|light blue|orange) heart"),
    "animal_faces": ("animal face", r"(bear|dog|fox|hamster|mouse|panda|tiger|cat|cow|lion|monkey|pig|rabbit|wolf) face|koala", r"^(cat|cow|lion|monkey|pig|rabbit|wolf) face"),
    "cars": ("car", r"(?!bus stop).*(automobile|taxi|police car|\bbus\b|trolleybus|minibus|ambulance|fire engine|delivery truck|recreational vehicle|racing car|pickup truck|articulated lorry).*", r"oncoming|minibus|ambulance"),
    "fruits": ("fruit", r"(grapes|melon|watermelon|tangerine|lemon|banana|pineapple|mango|red apple|green apple|pear|peach|cherries|strawberry|blueberries|kiwifruit|tomato|coconut)", r"melon|pear|tangerine|strawberry|mango"),
    "flowers": ("flower", r"(tulip|cherry blossom|rose|hibiscus|sunflower|blossom|bouquet|white flower|rosette|wilted flower|hyacinth|lotus)", r"rose$|blossom$|lotus"),
    "moons": ("moon", r".*\bmoon\b.*", r"waning|last quarter"),
    "clocks": ("clock", r"clock face.*", r"thirty"),
    "books": ("book", r".*\bbooks?\b.*|notebook.*|ledger", r"orange|ledger|books"),
    "balls": ("ball", r"(soccer ball|baseball|softball|basketball.*|volleyball|tennis racquet.*|bowling|rugby football|american football|billiards|yo yo)", r"volleyball|rugby|billiards"),
    "hand_signs": ("hand", r"(?!teacup).*(hand|thumbs|fist|victory).*", r"raised|left|down"),
    "smileys": ("smiley face", r"(grinning|smiling|winking|smirking|relieved|kissing|neutral|expressionless|pensive|confused) face.*", r"eyes|tongue|hugging"),
}  # fmt: skip
MOST_TRAINING, MOST_HELD_OUT = 8, 8


def archive(key: str, npm: Path) -> Path:
    """The package's tarball, fetched once."""
    package, version = PACKAGES[key]
    file = npm / f"{package.replace('@', '').replace('/', '-')}-{version}.tgz"
    if not file.exists():
        npm.mkdir(parents=True, exist_ok=True)
        subprocess.run(["npm", "pack", f"{package}@{version}", "--silent"], cwd=npm, check=True)
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
    """A picture with alpha -> uint8 `[64, 64, 3]` on white; resized with premultiplied alpha, which keeps edges clean."""
    rgba = np.asarray(Image.open(io.BytesIO(raw)).convert("RGBA")).astype(np.float32) / 255
    rgba[..., :3] *= rgba[..., 3:]
    side = SIZE - 2 * margin
    if rgba.shape[:2] != (side, side):
        channels = [Image.fromarray(rgba[..., c]).resize((side, side), Image.Resampling.LANCZOS) for c in range(4)]
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
        files = members(archive(vendor, npm), lambda n, v=vendor: f"/img/{v}/64/" in n and n.endswith(".png"))
        for entry in emoji:
            variants = [(entry["image"], None)]
            variants += [
                (v["image"], SKIN_TONES[s]) for s, v in entry.get("skin_variations", {}).items() if s in SKIN_TONES
            ]
            for image, skin in variants:
                raw = files.get(Path(image).stem.lower())
                if raw is not None:
                    yield on_white(raw), facts(entry, vendor, skin)


def fluent(emoji: list[dict], npm: Path) -> Iterator[tuple[np.ndarray, dict]]:
    files = members(archive("fluent", npm), lambda n: n.endswith(".webp"))
    plain = {key.replace("-fe0f", ""): raw for key, raw in files.items()}
    for entry in emoji:
        key = entry["unified"].lower()
        raw = files.get(key) or plain.get(key.replace("-fe0f", ""))
        if raw is not None:
            yield on_white(raw, margin=1), facts(entry, "fluent3d", None)


def save(rows: Iterator[tuple[np.ndarray, dict]], data: Path, name: str) -> None:
    images, about = zip(*rows, strict=True)
    np.savez(data / f"{name}.npz", images=np.stack(images))
    (data / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in about), encoding="utf-8")
    print(f"{name}: {len(images)} pictures")


def make_subject(images: np.ndarray, rows: list[dict], name: str, folder: Path) -> tuple[int, int]:
    """Write a subject's training and held-out pictures; returns how many of each."""
    class_name, pattern, held_out = SUBJECTS[name]
    chosen = [(i, r["name"]) for i, r in enumerate(rows) if re.fullmatch(pattern, r["name"])]
    parts = {
        "train": [c for c in chosen if not re.search(held_out, c[1])][:MOST_TRAINING],
        "heldout": [c for c in chosen if re.search(held_out, c[1])][:MOST_HELD_OUT],
    }
    for part, pictures in parts.items():
        (folder / name / part).mkdir(parents=True, exist_ok=True)
        lines = []
        for i, text in pictures:
            file = f"{text.replace(' ', '_')}.png"
            Image.fromarray(images[i]).save(folder / name / part / file)
            about = {"file_name": file, "text": f"{text} emoji, fluent style", "name": text}
            prompts = {"prompt": f"a sks {class_name} emoji", "class_prompt": f"a {class_name} emoji"}
            lines.append(json.dumps(about | prompts) + "\n")
        (folder / name / part / "metadata.jsonl").write_text("".join(lines), encoding="utf-8")
    return len(parts["train"]), len(parts["heldout"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("mini-sd-build"))
    output = parser.parse_args().output
    npm, data = output / "npm", output / "data"
    data.mkdir(parents=True, exist_ok=True)
    with tarfile.open(archive("twitter", npm)) as tar:
        handle = tar.extractfile("package/emoji.json")
        assert handle is not None
        emoji = [e for e in json.load(handle) if e["subcategory"] not in LEFT_OUT]
    save(pretraining(emoji, npm), data, "pretrain")
    save(fluent(emoji, npm), data, "fluent")
    for key in PACKAGES:
        digest = hashlib.sha256(archive(key, npm).read_bytes()).hexdigest()
        print(f"{'@'.join(PACKAGES[key])}: sha256 {digest}")
    images = np.load(data / "fluent.npz")["images"]
    rows = [json.loads(line) for line in (data / "fluent.jsonl").read_text(encoding="utf-8").splitlines()]
    for name in SUBJECTS:
        print(name, make_subject(images, rows, name, output / "subjects"))


if __name__ == "__main__":
    main()
