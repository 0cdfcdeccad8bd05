"""A folder of pictures, as people keep them: captions beside them, kohya's repeats, phone
rotations, transparency."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from ..errors import ImageError
from ..events import Notice, Observer, ignore

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
MIN_SIDE = 16  # px; below this there is nothing to learn from
MAX_PIXELS = 100_000_000  # a decompression bomb, not a photograph
MAX_CAPTION = 10_000  # bytes; CLIP reads 75 tokens of it
REPEATS = re.compile(r"(\d{1,4})_.*")
NEAR = 3  # of 255: mean difference of thumbnails up to which two pictures count as near-duplicates


@dataclass(frozen=True)
class PictureFile:
    """A picture's file, the file its caption would be in, and how often each pass shows it."""

    path: Path
    repeats: int = 1

    @property
    def caption(self) -> Path:
        return self.path.with_suffix(".txt")


@dataclass(frozen=True)
class Picture:
    """A readable picture of the subject: RGB, upright, transparent parts on white.

    `mask` is its alpha channel (mode L, 255 = subject) when it has one; `caption` is None when it
    has none of its own.
    """

    name: str
    image: Image.Image
    digest: str  # SHA-256 of the file
    mask: Image.Image | None = None
    caption: str | None = None
    repeats: int = 1


def picture_files(folder: str | os.PathLike[str]) -> list[PictureFile]:
    """The folder's pictures by name, then those of its subfolders named `10_anything` (kohya: ten
    times a pass).

    Raises ImageError when the folder is missing or holds no picture.
    """
    path = Path(folder)
    if not path.is_dir():
        raise ImageError(
            f"The picture folder '{path}' does not exist. Give a folder with 3-20 pictures of the "
            "subject."
        )
    files = [PictureFile(file) for file in _pictures_in(path)]
    for sub in sorted(p for p in path.iterdir() if p.is_dir()):
        if match := REPEATS.fullmatch(sub.name):
            files += [PictureFile(file, max(1, int(match[1]))) for file in _pictures_in(sub)]
    if not files:
        raise ImageError(
            f"No images in '{path}': found 0 of {' '.join(SUFFIXES)}. Put 3-20 pictures of the "
            "subject there."
        )
    return files


def _pictures_in(folder: Path) -> list[Path]:
    return sorted(p for p in folder.iterdir() if p.suffix.lower() in SUFFIXES and p.is_file())


def open_pictures(files: Iterable[PictureFile], observer: Observer = ignore) -> list[Picture]:
    """All usable pictures. Unusable ones are named in a Notice and left out; ImageError when none
    is left."""
    files = list(files)
    pictures = []
    for file in files:
        try:
            pictures.append(_open(file, observer))
        except ImageError as error:
            observer(Notice(str(error)))
    if not pictures:
        where = f"'{files[0].path.parent}'" if files else "the folder"
        raise ImageError(
            f"No images in {where}: none of {len(files)} could be used. Put 3-20 pictures of the "
            "subject there."
        )
    return pictures


def find_pictures(folder: str | os.PathLike[str], observer: Observer = ignore) -> list[Picture]:
    """All usable pictures of a folder. Raises ImageError when the folder is missing or nothing
    usable is in it."""
    return open_pictures(picture_files(folder), observer)


def _open(file: PictureFile, observer: Observer) -> Picture:
    name = file.path.name
    try:
        with Image.open(file.path) as opened:
            width, height = opened.size
            if min(width, height) < MIN_SIDE:
                raise ImageError(
                    f"Skipped '{name}': {width}x{height} px is too small (at least {MIN_SIDE} px a "
                    "side)."
                )
            if width * height > MAX_PIXELS:
                raise ImageError(
                    f"Skipped '{name}': {width}x{height} px is too large (at most 100 megapixels)."
                )
            image, mask = _on_white(ImageOps.exif_transpose(opened))
        digest = hashlib.sha256(file.path.read_bytes()).hexdigest()
    except ImageError:
        raise
    except (OSError, ValueError, SyntaxError, MemoryError, Image.DecompressionBombError) as error:
        reason = str(error).rstrip(".") or type(error).__name__
        raise ImageError(f"Skipped '{name}': it cannot be read ({reason}).") from error
    return Picture(name, image, digest, mask, _caption(file.caption, observer), file.repeats)


def _on_white(image: Image.Image) -> tuple[Image.Image, Image.Image | None]:
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        rgba = image.convert("RGBA")
        white = Image.new("RGBA", rgba.size, "white")
        return Image.alpha_composite(white, rgba).convert("RGB"), rgba.getchannel("A")
    return image.convert("RGB"), None


def _caption(path: Path, observer: Observer) -> str | None:
    if not path.is_file():
        return None
    try:
        with path.open("rb") as file:
            raw = file.read(MAX_CAPTION + 1)
        if len(raw) > MAX_CAPTION:
            raise ValueError(f"more than {MAX_CAPTION} bytes")
        return " ".join(raw.decode("utf-8-sig").split()) or None
    except (OSError, ValueError) as error:
        reason = "not UTF-8 text" if isinstance(error, UnicodeDecodeError) else str(error)
        observer(Notice(f"The caption '{path.name}' was left out: it cannot be read ({reason})."))
        return None


# --- words ----------------------------------------------------------------------------------------


def fill_words(text: str, trigger: str, class_name: str) -> str:
    """`{trigger}` and `{class}` filled in, spaces tidied."""
    return " ".join(text.replace("{trigger}", trigger).replace("{class}", class_name).split())


def with_words(pictures: Iterable[Picture], trigger: str, class_name: str) -> list[Picture]:
    """The pictures with `{trigger}` and `{class}` of their captions filled in."""
    return [
        p if p.caption is None else replace(p, caption=fill_words(p.caption, trigger, class_name))
        for p in pictures
    ]


# --- a look at the data before training -----------------------------------------------------------


def check_pictures(pictures: Iterable[Picture], resolution: int) -> list[str]:
    """What a person would want to know before training on these, a sentence each; empty when all is
    well."""
    pictures = list(pictures)
    findings = []
    if len(pictures) < 3:
        findings.append(f"Only {len(pictures)} pictures: 3-20 teach a subject better.")
    small = [p.name for p in pictures if min(p.image.size) < resolution]
    if small:
        findings.append(
            f"{len(small)} of {len(pictures)} are smaller than {resolution} px: {_some(small)}."
        )
    captioned = sum(p.caption is not None for p in pictures)
    if 0 < captioned < len(pictures):
        missing = [p.name for p in pictures if p.caption is None]
        findings.append(
            f"{len(missing)} have no caption of their own and take the prompt: {_some(missing)}."
        )
    pairs = near_duplicates(pictures)
    if pairs:
        named = [f"'{a}' and '{b}'" for a, b in pairs]
        findings.append(
            f"{len(pairs)} pairs look almost the same, which teaches them twice: {_some(named)}."
        )
    return findings


def near_duplicates(pictures: Iterable[Picture]) -> list[tuple[str, str]]:
    """Pairs of names whose 16 x 16 thumbnails differ by at most 3 of 255 on average: a copy,
    another size, another compression."""
    seen: list[tuple[str, np.ndarray]] = []
    pairs = []
    for picture in pictures:
        small = np.asarray(picture.image.resize((16, 16), Image.Resampling.BOX), dtype=np.float32)
        pairs += [
            (name, picture.name) for name, other in seen if np.abs(small - other).mean() <= NEAR
        ]
        seen.append((picture.name, small))
    return pairs


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
