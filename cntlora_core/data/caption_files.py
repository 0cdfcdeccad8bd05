"""Caption files of any program: text beside a picture, a folder's metadata.jsonl."""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any

from ..events import Notice, Observer
from .folder import METADATA, PictureFile, counted, readable, same_name, some

MAX_CAPTION = 10_000  # bytes; CLIP reads 75 tokens of it
MAX_METADATA = 20_000_000  # bytes
FILE_KEYS = ("file_name", "image_path", "image", "path", "file")
TEXT_KEYS = ("text", "caption", "prompt")


def decode_text(raw: bytes) -> str:
    """Text in UTF-8 or UTF-16, with or without a byte order mark, on one line.

    Raises ValueError for other bytes.
    """
    encoding = "utf-8-sig"
    if raw.startswith((b"\xff\xfe", b"\xfe\xff")):
        encoding = "utf-16"
    elif b"\0" in raw.rstrip(b"\0"):  # ASCII letters in UTF-16 have it as every other byte
        high_first = raw[::2].count(b"\0") > raw[1::2].count(b"\0")
        encoding = "utf-16-be" if high_first else "utf-16-le"
    else:
        raw = raw.rstrip(b"\0")  # which some programs end a text with
    try:
        text = raw.decode(encoding)
    except UnicodeDecodeError as error:
        raise ValueError("neither UTF-8 nor UTF-16 text") from error
    if any(unicodedata.category(c) == "Cc" and not c.isspace() for c in text):
        raise ValueError("no text: it has control characters")
    return " ".join(text.split())


class CaptionReader:
    """Captions of picture files; each metadata.jsonl is read once. What is left out is told."""

    def __init__(self, observer: Observer) -> None:
        self.observer = observer
        self._tables: dict[Path, dict[str, str]] = {}

    def of(self, file: PictureFile) -> tuple[str | None, str]:
        """The caption and the name of the file it stood in, its own before a line of metadata;
        None and "" without one."""
        line = self._line(file)
        if file.caption and (text := self._text(file.caption)):
            return text, readable(file.caption.name)
        return line, METADATA if line else ""

    def _line(self, file: PictureFile) -> str | None:
        if file.metadata is None:
            return None
        if file.metadata not in self._tables:
            self._tables[file.metadata] = self._table(file.metadata)
        name = file.path.relative_to(file.metadata.parent).as_posix()
        return self._tables[file.metadata].pop(same_name(name), None)

    def finish(self) -> None:
        """Tell which lines no picture has taken."""
        for table in self._tables.values():
            if table:
                are = counted(
                    len(table), f"caption of {METADATA} is", f"captions of {METADATA} are"
                )
                self.observer(Notice(f"{are} of no picture here: {some(table)}."))

    def _text(self, path: Path) -> str | None:
        try:
            text = decode_text(_read(path, MAX_CAPTION))
        except (OSError, ValueError) as error:
            self._left_out(f"The caption '{readable(path.name)}' was", error)
            return None
        if not text:
            self.observer(Notice(f"The caption '{readable(path.name)}' is empty."))
        return text or None

    def _table(self, path: Path) -> dict[str, str]:
        """Captions by a picture's place in the folder: a line is `{"file_name": ..., "text": ...}`,
        or kohya's `{"cat.png": {"caption": ..., "tags": ...}}`."""
        try:
            lines = _lines(_read(path, MAX_METADATA))
            folders = {same_name(p.name) for p in path.parent.iterdir() if p.is_dir()}
        except (OSError, ValueError) as error:
            self._left_out(f"{METADATA} was", error)
            return {}
        table: dict[str, str] = {}
        wrong, again = [], []
        for number, line in enumerate(lines, 1):
            try:
                found = dict(_entries(json.loads(line), folders)) if line.strip() else {}
                again += [name for name in found if name in table]
                table |= found
            except (ValueError, RecursionError):
                wrong.append(str(number))
        if wrong:
            self.observer(
                Notice(
                    f'{METADATA}: line {some(wrong)} was left out. A line is {{"file_name": '
                    '"cat.png", "text": "a cat"}.'
                )
            )
        if again:
            many = counted(len(again), "picture has", "pictures have")
            self.observer(Notice(f"{METADATA}: {many} a second line, which counts: {some(again)}."))
        return table

    def _left_out(self, what: str, error: Exception) -> None:
        self.observer(Notice(f"{what} left out: it cannot be read ({readable(error)})."))


def _read(path: Path, most: int) -> bytes:
    with path.open("rb") as file:
        raw = file.read(most + 1)
    if len(raw) > most:
        raise ValueError(f"more than {most} bytes")
    return raw


def _lines(raw: bytes) -> list[str]:
    encoding = "utf-16" if raw.startswith((b"\xff\xfe", b"\xfe\xff")) else "utf-8-sig"
    try:
        return raw.decode(encoding).split("\n")  # JSON may hold what splitlines takes for more
    except UnicodeDecodeError as error:
        raise ValueError("neither UTF-8 nor UTF-16 text") from error


def _entries(row: Any, folders: Collection[str]) -> Iterable[tuple[str, str]]:
    """File names and captions of a line."""
    if not isinstance(row, dict):
        raise ValueError("no object")
    file = next((row[key] for key in FILE_KEYS if isinstance(row.get(key), str)), None)
    rows = {file: row} if file else {k: v for k, v in row.items() if isinstance(v, dict)}
    if not rows:
        raise ValueError("no file name")
    for name, values in rows.items():
        text = next((values[key] for key in TEXT_KEYS if isinstance(values.get(key), str)), "")
        tags = values.get("tags")
        parts = [text, tags if isinstance(tags, str) else ""]
        caption = decode_text(", ".join(p for p in parts if p).encode("utf-8", "replace"))
        if caption:
            yield _place(same_name(name), folders), caption


def _place(name: str, folders: Collection[str]) -> str:
    """Of a line's file: its name, in one of the `folders` if it says so. The rest of a path is of
    the computer that it was written on."""
    *_, above, last = ["", *re.split(r"[/\\]", name)]
    return f"{above}/{last}" if above in folders else last
