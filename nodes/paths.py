"""Names from a workflow JSON -> paths inside one folder. The JSON may be a stranger's."""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Iterable
from contextlib import suppress
from pathlib import Path

from ..cntlora_core.data.folder import readable
from ..cntlora_core.errors import SettingError

# Windows opens a device for these names whatever the ending, so a shared workflow must not hold
# them on any system.
_DEVICES = {
    "CON",
    "PRN",
    "AUX",
    "NUL",
    *(f"{d}{n}" for d in ("COM", "LPT") for n in "0123456789¹²³"),
}
LONGEST = 200  # bytes of a name: systems take 255, and an ending comes to it
_FORBIDDEN = re.compile(r'[\x00-\x1f<>:"|?*]')


def inside(root: str | os.PathLike[str], name: str, known: Collection[str] = ()) -> Path:
    """`root`/`name`, which need not exist. Raises SettingError for a name that leads out of `root`
    or is no plain name: absolute, `..`, drive letters, device names, or a link to another place.
    What the system itself lists there (`known`) may be called as it is."""
    parts = [name] if name in known else re.split(r"[/\\]", name)
    if name not in known and not all(_plain(part) for part in parts):
        raise SettingError(
            f"'{_shown(name)}' is not a name inside '{Path(root).name}': use a file or folder name "
            "such as 'my_cat'."
        )
    path = Path(root, *parts)
    if not path.resolve().is_relative_to(Path(root).resolve()):
        raise SettingError(
            f"'{name}' is a link to a place outside '{Path(root).name}': copy the files there "
            "instead."
        )
    return path


def stamps(paths: Iterable[str | os.PathLike[str]]) -> str:
    """What changes when one of the files does, or comes, or goes."""
    seen = []
    for path in paths:
        with suppress(OSError):  # gone since it was listed
            stat = os.stat(path)
            seen.append((os.fspath(path), stat.st_size, stat.st_mtime_ns))
    return repr(seen)


def _shown(name: str) -> str:
    """What a sentence can hold of it."""
    return readable(name if len(name) <= 80 else f"{name[:60]}...")


def _plain(part: str) -> bool:
    try:
        length = len(os.fsencode(part))
    except UnicodeEncodeError:  # half a letter
        return False
    stem = part.split(".")[0].rstrip().upper()
    return not (
        part in ("", ".", "..")
        or length > LONGEST
        or part != part.strip(" ").rstrip(".")
        or _FORBIDDEN.search(part)
        or stem in _DEVICES
    )
