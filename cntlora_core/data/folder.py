"""Which files of a folder are pictures, and what lies beside each: its caption, its mask, kohya's
repeats."""

from __future__ import annotations

import os
import re
import unicodedata
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from ..errors import ImageError
from ..events import Notice, Observer, ignore

SUFFIXES = (
    *(".png", ".jpg", ".jpeg", ".jfif", ".webp", ".avif", ".heic", ".heif"),
    *(".bmp", ".tif", ".tiff", ".gif"),
)
CAPTION_SUFFIXES = (".txt", ".caption")
METADATA = "metadata.jsonl"  # captions of a whole folder, as diffusers and kohya's scripts write
MASK_ENDINGS = ("-masklabel", ".mask")  # cat-masklabel.png, cat.mask.png
MASK_FOLDERS = ("masks", "mask")
PASSED_OVER = ("thumbs.db", "ehthumbs.db", "desktop.ini", "__macosx")  # systems leave them behind
REPEATS = re.compile(r"([0-9]+)_.*")
MOST_ALONE = 8  # pictures of which one thing is said in a sentence each
MOST_REPEATS = 100  # a pass; a larger number is a year or a date


def counted(number: int, one: str, many: str) -> str:
    """`1 caption lacks`, `2 captions lack`."""
    return f"{number} {one if number == 1 else many}"


def by_reason(said: Mapping[str, list[str]]) -> Iterator[tuple[str, str]]:
    """Names and what is said of them, from sentences with their names: a few one by one, many
    together."""
    for text, names in said.items():
        quoted = [f"'{name}'" for name in names]
        for name in [some(quoted)] if len(names) > MOST_ALONE else quoted:
            yield name, text


@dataclass(frozen=True)
class PictureFile:
    """A picture's file and how often each pass shows it; the files of its caption and mask, where
    there are any, and the `metadata` that may have a line for it; the subfolder it came from, ""
    for none."""

    path: Path
    repeats: int = 1
    caption: Path | None = None
    mask: Path | None = None
    subfolder: str = ""
    metadata: Path | None = None

    @property
    def sources(self) -> tuple[Path, ...]:
        """Every file that is read for it."""
        return tuple(p for p in (self.path, self.caption, self.metadata, self.mask) if p)


def readable(name: object) -> str:
    """A file's name as text that any file and screen takes: what is no valid text is replaced."""
    text = str(name)
    with suppress(UnicodeEncodeError):  # half a letter, which is replaced below
        text = os.fsencode(text).decode("utf-8", "replace")
    return "".join(c if c.isprintable() else "\ufffd" for c in text)


def some(names: Iterable[str], most: int = 3) -> str:
    """The first of the names and how many more there are."""
    names = [readable(name) for name in names]
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def picture_files(
    folder: str | os.PathLike[str],
    observer: Observer = ignore,
    *,
    masks: str | os.PathLike[str] | None = None,
) -> list[PictureFile]:
    """The folder's pictures by name, then those of its subfolders named `10_anything` (kohya: ten
    times a pass); of plain subfolders only where there are no others. `masks` is a folder of masks
    with the pictures' names.

    What is left out is named in a Notice. Raises ImageError when the folder is missing or holds no
    picture.
    """
    path = Path(folder)
    shown = readable(path)
    if not path.is_dir():
        raise ImageError(
            f"The picture folder '{shown}' does not exist. Give a folder with 3-20 pictures of the "
            "subject."
        )
    extra = _Listing(Path(masks)) if masks else None
    root = _Listing(path)
    metadata = root.find(METADATA)
    files = _pictures(root, observer, masks=extra)
    plain = []
    for sub in root.folders:
        if sub.name.casefold() in MASK_FOLDERS:
            continue
        if match := REPEATS.fullmatch(sub.name):
            repeats = _repeats(sub, int(match[1]), observer)
            if repeats:
                files += _pictures(_Listing(sub), observer, repeats, sub.name, extra, metadata)
        else:
            plain.append(sub)
    files += _plain(plain, files, observer, extra, metadata)
    if metadata and not any(file.metadata == metadata for file in files):
        _tell_left_out(root, {_why_no_line(bool(files)): [metadata.name]}, observer)
    if not files:
        found = some(p.name for p in root.files)
        raise ImageError(
            f"No images in '{shown}': found 0 of {' '.join(SUFFIXES)}"
            f"{f', only {found}' if found else ''}. Put 3-20 pictures of the subject there."
        )
    return files


def _repeats(folder: Path, times: int, observer: Observer) -> int:
    name = readable(folder.name)
    if times == 0:
        observer(Notice(f"Left out the folder '{name}': its name says 0 times a pass."))
    if times <= MOST_REPEATS:
        return times
    observer(
        Notice(
            f"The folder '{name}' is shown once a pass: {times} times cannot be meant "
            f"(at most {MOST_REPEATS})."
        )
    )
    return 1


def _plain(
    folders: list[Path],
    others: list[PictureFile],
    observer: Observer,
    masks: _Listing | None,
    metadata: Path | None,
) -> list[PictureFile]:
    """The pictures of plain subfolders where there are no others; else those are told and left."""
    files = []
    for folder in folders:
        listing = _Listing(folder)
        count = sum(p.suffix.lower() in SUFFIXES for p in listing.files)
        name, pictures = readable(folder.name), counted(count, "picture", "pictures")
        if count and others:
            observer(
                Notice(
                    f"Left out the folder '{name}' with {pictures}: call it '1_{name}' to "
                    "train on them too."
                )
            )
        elif count:
            observer(Notice(f"The pictures are those of the subfolder '{name}' ({count})."))
            files += _pictures(listing, observer, 1, folder.name, masks, metadata)
    return files


class _Listing:
    """A folder's entries by name, but for what systems leave behind."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        try:
            entries = sorted(p for p in folder.iterdir() if not _passed_over(p.name))
        except OSError as error:
            raise ImageError(
                f"The folder '{readable(folder)}' cannot be read ({error.strerror})."
            ) from error
        self.folders = [p for p in entries if p.is_dir()]
        self.files = [p for p in entries if p.is_file()]
        self.broken = [p for p in entries if not p.is_dir() and not p.is_file()]
        self._by_name = {same_name(p.name): p for p in reversed(self.files)}
        self._by_name |= {p.name: p for p in self.files}  # the exact name comes first

    def find(self, *names: str) -> Path | None:
        """The first file there is, whatever its case and its accents' encoding."""
        for name in names:
            if found := self._by_name.get(name) or self._by_name.get(same_name(name)):
                return found
        return None


def _passed_over(name: str) -> bool:
    return name.startswith(".") or name.casefold() in PASSED_OVER


def same_name(name: str) -> str:
    """The same for names that differ only in case or in how their accents are written."""
    return unicodedata.normalize("NFC", name).casefold()


def _pictures(
    listing: _Listing,
    observer: Observer,
    repeats: int = 1,
    subfolder: str = "",
    masks: _Listing | None = None,
    metadata: Path | None = None,
) -> list[PictureFile]:
    """`metadata`: that of the folder above, for where there is none."""
    pictures = [p for p in listing.files if p.suffix.lower() in SUFFIXES and not _unmasked(p.stem)]
    stems = {same_name(p.stem) for p in pictures}
    beside = [_Listing(f) for f in listing.folders if f.name.casefold() in MASK_FOLDERS]
    listings = [*([masks] if masks else []), *beside]
    captions = [_caption(path, listing) for path in pictures]
    metadata = None if all(captions) else listing.find(METADATA) or metadata
    files = [
        PictureFile(path, repeats, caption, _mask(path, listing, listings), subfolder, metadata)
        for path, caption in zip(pictures, captions, strict=True)
    ]
    used = {source for file in files for source in file.sources}
    if not subfolder and (whole := listing.find(METADATA)):
        used.add(whole)  # of subfolders' pictures it may be too
    for read in (listing, *beside):
        _tell_unused(read, used, stems, observer)
    return files


def _caption(path: Path, beside: _Listing) -> Path | None:
    return beside.find(*(f"{of}{end}" for of in (path.stem, path.name) for end in CAPTION_SUFFIXES))


def _unmasked(stem: str) -> str:
    """The stem of the picture whose mask would be called so, "" for other names."""
    for ending in MASK_ENDINGS:
        if stem.lower().endswith(ending):
            return stem[: -len(ending)]
    return ""


def _mask(path: Path, beside: _Listing, folders: list[_Listing]) -> Path | None:
    names = [f"{path.stem}{ending}{suffix}" for ending in MASK_ENDINGS for suffix in SUFFIXES]
    if found := beside.find(*names):
        return found
    same = [path.name, *(f"{path.stem}{suffix}" for suffix in SUFFIXES), *names]
    return next((found for folder in folders if (found := folder.find(*same))), None)


def _tell_unused(listing: _Listing, used: set[Path], stems: set[str], observer: Observer) -> None:
    """Names each file of the folder that nothing reads, with the reason. `stems`: of the pictures
    that it may belong to."""
    kinds: dict[str, list[str]] = {}
    for path in listing.files:
        if path not in used:
            kinds.setdefault(_why_unused(path, stems), []).append(path.name)
    if listing.broken:
        kinds["a link that leads nowhere, or no file"] = [p.name for p in listing.broken]
    _tell_left_out(listing, kinds, observer)


def _tell_left_out(listing: _Listing, kinds: dict[str, list[str]], observer: Observer) -> None:
    for reason, names in kinds.items():
        where = readable(listing.folder.name)
        observer(Notice(f"Left out {some(names, 8)} of '{where}': {reason}."))


def _why_no_line(pictures: bool) -> str:
    return "every picture beside it has a caption file" if pictures else "no picture is beside it"


def _why_unused(path: Path, stems: set[str]) -> str:
    of = {same_name(name) for name in (path.stem, Path(path.stem).stem, _unmasked(path.stem))}
    if same_name(path.name) == METADATA:
        return _why_no_line(bool(stems))
    if path.suffix.lower() in CAPTION_SUFFIXES:
        return "a second caption of one picture" if of & stems else "no picture has that name"
    if path.suffix.lower() in SUFFIXES:
        return "a second mask of one picture" if of & stems else "a mask of no picture here"
    return "no kind of picture or caption that is read"
