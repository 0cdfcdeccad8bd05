"""Pictures that stay on disk: thousands of photographs do not fit in memory."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from ..errors import ImageError
from ..files import reason
from .decoding import UnusableError
from .folder import readable

HELD_PIXELS = 500_000_000  # of one folder: 1.5 GB; what comes after is read again when it is used


@dataclass(frozen=True)
class StoredImage:
    """A picture that is read whenever it is asked for. `size`: width and height, px."""

    path: Path
    size: tuple[int, int]
    stamp: tuple[int, int]
    load: Callable[[], Image.Image | None]

    @classmethod
    def of(
        cls, path: Path, size: tuple[int, int], load: Callable[[], Image.Image | None]
    ) -> StoredImage:
        return cls(path, size, _stamp(path), load)

    def read(self) -> Image.Image:
        """Raises ImageError when the file is not what it was."""
        why = "it has changed since the folder was read"
        try:
            if _stamp(self.path) == self.stamp and (image := self.load()) is not None:
                return image
        except OSError as error:
            why = reason(error)
        except UnusableError as error:
            why = str(error)
        raise ImageError(
            f"'{readable(self.path.name)}' can be used no more ({readable(why)}). Leave the "
            "folder as it is while pictures are encoded, and start again."
        )


def _stamp(path: Path) -> tuple[int, int]:
    about = path.stat()
    return about.st_size, about.st_mtime_ns


class Room:
    """How many pixels of a folder are held in memory."""

    def __init__(self) -> None:
        self.left = HELD_PIXELS

    def takes(self, size: tuple[int, int]) -> bool:
        self.left -= size[0] * size[1]
        return self.left >= 0
