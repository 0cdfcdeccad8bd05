"""Runs that go on: where Train LoRA keeps what it needs for it, and which one it goes on with."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from ..cntlora_core.config import RunConfig
from ..cntlora_core.errors import SettingError
from ..cntlora_core.files import DISK, Disk
from ..cntlora_core.training.resume import SUFFIX, RunSnapshots
from . import host
from .host import io
from .paths import inside
from .widgets import widgets_of

GO_ON, AFRESH = "go on", "start afresh"
REMOVE = "remove all"  # no choice any more: whoever shared a workflow would have removed them


def choices() -> list[str]:
    """For the widget: what to do, then the unfinished runs, the newest first."""
    files = sorted(_files(), key=lambda path: path.stat().st_mtime, reverse=True)
    return [GO_ON, AFRESH, *(path.name.removesuffix(SUFFIX) for path in files)]


def widgets() -> list[Any]:
    """Of the Train node."""
    return [
        *widgets_of(RunConfig, "checkpoint_every"),
        host.advanced(io.Combo)(
            "unfinished",
            options=choices(),
            default=GO_ON,
            optional=True,
            tooltip="Runs that were stopped, in output/cntlora-unfinished. go on: with the one of "
            "these very settings, where there is one; it ends as if it had never stopped. start "
            "afresh: from step 0. Files that are not wanted any more may be deleted there.",
        ),
    ]


def snapshots(
    choice: str, called: str, identity: Mapping[str, Any], every: int, disk: Disk = DISK
) -> RunSnapshots:
    """The checkpoints of a run that is `called` so and has this identity. A run of the same
    identity ends the same whether it goes on or not, so going on is what happens unasked.

    Raises SettingError for a choice that is no unfinished run, OutputError for a file of its name
    that is none.
    """
    named = choice not in (GO_ON, AFRESH, REMOVE)
    path = inside(host.unfinished_folder(), (choice if named else _name(called, identity)) + SUFFIX)
    if named and not path.is_file():
        raise SettingError(
            f"'{choice}' is no unfinished run: it ended, or was removed. Choose '{GO_ON}' or "
            f"'{AFRESH}'."
        )
    with suppress(OSError):  # a checkpoint that cannot be written is told when it is due
        path.parent.mkdir(parents=True, exist_ok=True)
    goes_on = choice not in (AFRESH, REMOVE)
    kept = RunSnapshots(path, identity, every, resume=goes_on, overwrite=True, disk=disk)
    kept.check()
    return kept


def _files() -> list[Path]:
    return [path for path in host.unfinished_folder().glob(f"*{SUFFIX}") if path.is_file()]


def _name(called: str, identity: Mapping[str, Any]) -> str:
    """The same for the same run, and for people: its words, its model."""
    text = json.dumps(dict(identity), sort_keys=True)
    words = re.sub(r"[^A-Za-z0-9]+", "_", f"{called}_{identity['checkpoint']}").strip("_")[:60]
    return f"{words or 'run'}_{hashlib.sha256(text.encode()).hexdigest()[:8]}"
