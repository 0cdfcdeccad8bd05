"""Caption files of any program: text beside a picture, a folder's metadata.jsonl."""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Iterable
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
    elif b"\0" in raw:  # ASCII letters in UTF-16 have it as every other byte
        encoding = "utf-16-be" if raw[:1] == b"\0" else "utf-16-le"
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
        """The caption and the name of the file it stood in; None and "" without one."""
        if file.caption is None:
            return None, ""
        if file.caption.name.casefold() != METADATA:
            text = self._text(file.caption)
            return text, readable(file.caption.name) if text else ""
        if file.caption not in self._tables:
            self._tables[file.caption] = self._table(file.caption)
        text = self._tables[file.caption].pop(same_name(file.path.name), None)
        return text, METADATA if text else ""

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
        """Captions by file name: a line is `{"file_name": ..., "text": ...}`, or kohya's
        `{"cat.png": {"caption": ..., "tags": ...}}`."""
        try:
            lines = _lines(_read(path, MAX_METADATA))
        except (OSError, ValueError) as error:
            self._left_out(f"{METADATA} was", error)
            return {}
        table: dict[str, str] = {}
        wrong = []
        for number, line in enumerate(lines, 1):
            try:
                table |= dict(_entries(json.loads(line))) if line.strip() else {}
            except (ValueError, RecursionError):
                wrong.append(str(number))
        if wrong:
            self.observer(
                Notice(
                    f'{METADATA}: line {some(wrong)} was left out. A line is {{"file_name": '
                    '"cat.png", "text": "a cat"}.'
                )
            )
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


def _entries(row: Any) -> Iterable[tuple[str, str]]:
    """File names and captions of a line; paths are cut to their last part."""
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
            yield same_name(re.split(r"[/\\]", name)[-1]), caption
