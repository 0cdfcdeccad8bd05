"""Files that are written whole or not at all, and logs whose failure costs no run."""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

from .errors import OutputError


class Disk:
    """What the operating system does for a write, one method for each call that may fail. A test
    puts one in its place that does fail."""

    def open(self, path: Path, mode: str) -> IO[Any]:
        return path.open(mode)

    def write(self, file: IO[Any], data: bytes) -> None:
        file.write(data)
        file.flush()

    def sync(self, file: IO[Any]) -> None:
        os.fsync(file.fileno())

    def replace(self, source: Path, target: Path) -> None:
        os.replace(source, target)


DISK = Disk()


def atomic_write(
    path: str | os.PathLike[str],
    payload: bytes,
    *,
    overwrite: bool = True,
    verify: Callable[[Path], None] | None = None,
    disk: Disk = DISK,
) -> Path:
    """Write beside `path`, sync, look at it once more with `verify`, then rename into place: at any
    moment `path` is the old file or the new one. No partial file is left. Raises OutputError."""
    target = Path(path)
    try:
        partial = _partial(target)
        try:
            with disk.open(partial, "wb") as file:
                disk.write(file, payload)
                disk.sync(file)
            if verify:
                verify(partial)
            if not overwrite and target.exists():  # somebody may have made it meanwhile
                raise _exists(target)
            disk.replace(partial, target)
        finally:
            with suppress(OSError):
                partial.unlink(missing_ok=True)
    except (OSError, ValueError) as error:
        if isinstance(error, OutputError):
            raise
        raise OutputError(f"'{target}' could not be written ({reason(error)}).") from error
    return target


def _partial(target: Path) -> Path:
    """One name for each target, so that what a killed process left is overwritten; short, so that
    it fits wherever the target does."""
    digest = hashlib.sha256(os.fsencode(target.name)).hexdigest()[:16]
    return target.with_name(f".cntlora-{digest}.partial")


def remove_written(path: Path) -> None:
    """The file, and what a killed process left of it."""
    for file in (path, _partial(path)):
        with suppress(OSError):
            file.unlink(missing_ok=True)


def reason(error: Exception) -> str:
    """An operating system's error in a few words."""
    return (isinstance(error, OSError) and error.strerror) or str(error) or type(error).__name__


def _exists(target: Path) -> OutputError:
    return OutputError(f"The output '{target}' exists. Choose another name, or say --overwrite.")


def check_output(
    path: str | os.PathLike[str],
    *,
    overwrite: bool = False,
    suffix: str = ".safetensors",
    beside: Sequence[Path] = (),
) -> Path:
    """The output path, known to be writable before any work is done. `beside`: other files that
    will be written with it. Raises OutputError."""
    target = Path(path)
    folder = target.parent
    if suffix and target.suffix != suffix:
        raise OutputError(f"The output '{target}' must end in {suffix}.")
    for name in (target, *beside):
        _check_name(name)
    if not folder.is_dir():
        raise OutputError(
            f"The output folder '{folder}' does not exist. Create it or choose another."
        )
    if target.is_dir():
        raise OutputError(f"The output '{target}' is a folder. Give a file name.")
    if target.exists() and not overwrite:
        raise _exists(target)
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise OutputError(f"The output folder '{folder}' is not writable ({reason(error)}).") from (
            error
        )
    return target


def _check_name(path: Path) -> None:
    """The file system knows best which names it takes."""
    try:
        path.name.encode("utf-8")  # it stands in the file's metadata
        os.lstat(path)
    except (FileNotFoundError, NotADirectoryError):
        pass
    except (OSError, ValueError) as error:
        name = ascii(path.name)
        shown = name if len(name) < 80 else f"{name[:60]}...' ({len(path.name)} characters"
        raise OutputError(
            f"The name {shown}{')' if shown is not name else ''} cannot be used "
            f"({reason(error)}). Choose a shorter, plainer output name."
        ) from error


def check_space(path: Path, needed: int, what: str) -> None:
    """Refuse to start what could not be saved: `needed` bytes for `what`. Raises OutputError."""
    with suppress(OSError):  # a file system that does not tell is believed to have room
        free = shutil.disk_usage(path.parent).free
        if free < needed:
            raise OutputError(
                f"'{path.parent}' has {free / 1e6:.1f} MB free, and {what} needs "
                f"{needed / 1e6:.1f} MB. Free some space or choose another folder."
            )


def free_name(path: Path) -> Path:
    """`path`, or the first of `name_2`, `name_3`, ... that does not exist: nothing is
    overwritten."""
    candidate, number = path, 2
    while os.path.lexists(candidate):
        candidate = path.with_name(f"{path.stem}_{number}{path.suffix}")
        number += 1
    return candidate


def other_places(path: Path, folders: Sequence[Path]) -> Iterator[Path]:
    """Where to save what cannot be saved at `path`: under a free name beside it, then in each of
    `folders`, made where it is missing."""
    yield free_name(path)
    plain = path.stem.encode("ascii", "ignore").decode().replace("\0", "")[:60] or "lora"
    for folder in folders:
        with suppress(OSError):
            folder.mkdir(parents=True, exist_ok=True)
            yield free_name(folder / f"{plain}{path.suffix}")


def user_folders() -> list[Path]:
    """Where a user's programs may leave something when all else fails: the state folder, then the
    one for temporary files."""
    folders = []
    with suppress(RuntimeError, OSError):  # no home
        state = os.environ.get("XDG_STATE_HOME") or os.environ.get("LOCALAPPDATA")
        folders.append(Path(state or Path.home() / ".local" / "state") / "cntlora")
    with suppress(OSError):
        folders.append(Path(tempfile.gettempdir()) / "cntlora")
    return folders


class LineFile:
    """A log of lines, made at the first one. A write that fails ends the log and not the run:
    `write` then gives the reason, once."""

    def __init__(self, path: Path, *, append: bool = False, disk: Disk = DISK) -> None:
        self.path, self.append, self.disk = path, append, disk
        self.file: IO[Any] | None = None
        self.failed = False

    def write(self, line: str) -> str | None:
        if self.failed:
            return None
        whole = 0
        try:
            if self.file is None:
                if self.append:
                    _drop_half_line(self.path)
                self.file = self.disk.open(self.path, "ab" if self.append else "wb")
            whole = self.file.tell()
            self.disk.write(self.file, line.encode("utf-8", "replace") + b"\n")
        except OSError as error:
            self.failed = True
            if self.file is not None:
                self.close()
                with suppress(OSError):
                    os.truncate(self.path, whole)
            return reason(error)
        return None

    def close(self) -> None:
        if self.file is not None:
            with suppress(OSError):
                self.file.close()
            self.file = None


def _drop_half_line(path: Path) -> None:
    """What a killed process left at the end."""
    with suppress(FileNotFoundError):
        content = path.read_bytes()
        os.truncate(path, content.rfind(b"\n") + 1)
