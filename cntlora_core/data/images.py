"""Folders -> pictures with their masks and captions. What cannot be used is named in a
sentence."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from PIL import Image

from ..errors import ImageError
from ..events import Notice, Observer, ignore
from ..files import reason
from .caption_files import CaptionReader
from .decoding import Said, UnusableError, decode, mask_file
from .folder import PictureFile, by_reason, picture_files, readable
from .stored import Room, StoredImage

Held = Image.Image | StoredImage


@dataclass(frozen=True)
class Picture:
    """A readable picture of the subject: RGB, upright, transparent parts on white.

    `mask` (mode L, 255 = subject) is its mask file, else its alpha channel; `caption` is None when
    it has none of its own. `caption_file` and `mask_file` are where they stood. `digest` is a
    SHA-256 over the files and how they were read. `group` tells the subfolders of one folder apart.
    Of a large folder some stay on disk (`held`, `held_mask`).
    """

    name: str
    held: Held
    digest: str
    held_mask: Held | None = None
    caption: str | None = None
    repeats: int = 1
    caption_file: str = ""
    group: str = ""
    mask_file: str = ""

    @property
    def size(self) -> tuple[int, int]:
        """Width and height, px."""
        return self.held.size

    @property
    def image(self) -> Image.Image:
        return _read(self.held)

    @property
    def mask(self) -> Image.Image | None:
        return None if self.held_mask is None else _read(self.held_mask)


def _read(held: Held) -> Image.Image:
    return held.read() if isinstance(held, StoredImage) else held


def find_pictures(
    folder: str | os.PathLike[str],
    observer: Observer = ignore,
    *,
    masks: str | os.PathLike[str] | None = None,
) -> list[Picture]:
    """All usable pictures of a folder. Raises ImageError when the folder is missing or nothing
    usable is in it."""
    return open_pictures(picture_files(folder, observer, masks=masks), observer)


def open_pictures(files: Iterable[PictureFile], observer: Observer = ignore) -> list[Picture]:
    """All usable pictures. Unusable ones are named in a Notice and left out; ImageError when none
    is left."""
    files = list(files)
    captions, room = CaptionReader(observer), Room()
    pictures = []
    skipped: dict[str, list[str]] = {}
    told: dict[str, list[str]] = {}
    for file in files:
        name = readable(file.path.name)
        try:
            picture, notices = _open(file, captions, room)
        except UnusableError as error:
            skipped.setdefault(str(error), []).append(name)
            continue
        pictures.append(picture)
        for text in notices:
            told.setdefault(text, []).append(name)
    for names, text in by_reason(skipped):
        observer(Notice(f"Skipped {names}: {text}."))
    for names, text in by_reason(told):
        observer(Notice(f"{names}: {text}."))
    if not pictures:
        where = f"'{readable(files[0].path.parent)}'" if files else "the folder"
        raise ImageError(
            f"No images in {where}: none of {len(files)} could be used. Put 3-20 pictures of the "
            "subject there."
        )
    captions.finish()
    return pictures


def _open(file: PictureFile, captions: CaptionReader, room: Room) -> tuple[Picture, list[str]]:
    """The picture and what is to be told of it. Raises UnusableError."""
    said = Said()
    caption, source = captions.of(file)  # first: a line is no stranger's for a damaged picture
    image, alpha = decode(file.path, said)
    shape = file.mask and mask_file(file.mask, image.size, said)
    mask = shape or alpha
    digest = _digest(file.path, said)
    if shape:
        digest.update(b"mask" + shape.tobytes())
    picture = Picture(
        readable(file.path.name),
        image,
        digest.hexdigest(),
        mask,
        caption,
        file.repeats,
        source,
        group=file.subfolder,
        mask_file=readable(file.mask.name) if file.mask and shape else "",
    )
    if not room.takes(image.size):
        picture = _on_disk(picture, file, from_file=bool(shape))
    return picture, said.notices


def _digest(path: Path, said: Said) -> Any:
    """Of the file, and of what was done to it: a cache must not give what an earlier version made
    of it."""
    try:
        digest = hashlib.sha256(path.read_bytes())
    except OSError as error:
        raise UnusableError(f"it cannot be read ({reason(error)})") from error
    for text in said.changes:
        digest.update(text.encode())
    return digest


def _on_disk(picture: Picture, file: PictureFile, *, from_file: bool) -> Picture:
    """The same, read again when it is used. `from_file`: its mask has a file of its own."""
    size, path = picture.size, file.path
    held = StoredImage.of(path, size, lambda: decode(path, Said())[0])
    mask: Held | None = None
    if from_file and file.mask:
        shape = file.mask
        mask = StoredImage.of(shape, size, lambda: mask_file(shape, size, Said()))
    elif picture.held_mask is not None:
        mask = StoredImage.of(path, size, lambda: decode(path, Said())[1])
    return replace(picture, held=held, held_mask=mask)
