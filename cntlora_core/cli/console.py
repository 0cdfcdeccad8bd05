"""Observers for the command line: progress bars, and a JSON-lines file."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

from tqdm import tqdm

from ..events import (
    Base,
    Calibrated,
    Event,
    Notice,
    Observer,
    Progress,
    Saved,
    Status,
    Step,
    Training,
    Validation,
    ignore,
    plain,
)
from ..files import LineFile


class Console:
    """Shows a run on stderr: one bar per phase, one line per result. Use as a context manager."""

    def __init__(self) -> None:
        self.total_steps = self.made_before = 0
        self.bar: tqdm | None = None
        self.phase = ""

    def __enter__(self) -> Console:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._close()

    def __call__(self, event: Event) -> None:
        if isinstance(event, Progress):
            self._advance(event.phase, event.done, event.total)
        elif isinstance(event, Step):
            note = f"loss {event.loss:.4f}"
            self._advance("training", event.step, self.total_steps, note, self.made_before)
        elif isinstance(event, Validation) and event.step % self.total_steps_shown == 0:
            self._line(f"  step {event.step}: validation loss {event.loss:.5f}")
        elif isinstance(event, Status):
            self._close()
            self._line(event.text)
        elif isinstance(event, Training):
            self._close()
            self.total_steps, self.made_before = event.steps, event.done
            self._line(
                f"Training {event.steps} steps"
                + (f", going on after {event.done}" if event.done else "")
            )
        elif isinstance(event, Notice):
            self._line(f"Note: {event.text}")
        elif isinstance(event, Base):
            self._line(f"  base model: validation loss {event.loss:.5f}")
        elif (
            isinstance(event, Calibrated) and event.loss is not None and event.base_loss is not None
        ):
            self._close()
            change = 100 * (event.loss / event.base_loss - 1)
            self._line(
                f"calibrated in {event.seconds:.1f} s: loss on the calibration set {change:+.1f} %"
            )
        elif isinstance(event, Saved):
            self._close()
            self._line(f"Wrote {event.path}")

    @property
    def total_steps_shown(self) -> int:
        """Validation losses are printed a handful of times, not at every validation."""
        return max(1, self.total_steps // 2)

    def _advance(
        self, phase: str, done: int, total: int, note: str = "", made_before: int = 0
    ) -> None:
        """`made_before` were not made by this run, and say nothing of its speed."""
        if self.bar is None or self.phase != phase:
            self._close()
            self.phase = phase
            self.bar = tqdm(
                total=total,
                initial=made_before,
                desc=phase,
                file=sys.stderr,
                leave=False,
                dynamic_ncols=True,
            )
        if note:
            self.bar.set_postfix_str(note, refresh=False)
        self.bar.update(done - self.bar.n)

    def _line(self, text: str) -> None:
        tqdm.write(printable(text, sys.stderr), file=sys.stderr)

    def _close(self) -> None:
        if self.bar is not None:
            self.bar.close()
            self.bar, self.phase = None, ""


class EventFile:
    """Writes events to a file, one JSON object a line; progress ticks are left out. When the file
    cannot be written, `observer` is told and the run goes on."""

    def __init__(
        self, path: str | os.PathLike[str], observer: Observer = ignore, *, append: bool = False
    ) -> None:
        self.lines = LineFile(Path(path), append=append)
        self.observer = observer

    def __enter__(self) -> EventFile:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.lines.close()

    def __call__(self, event: Event) -> None:
        if isinstance(event, Progress):
            return
        if failure := self.lines.write(event.to_json()):
            self.observer(
                Notice(
                    f"The events can no longer be written to '{self.lines.path}' ({failure}); the "
                    "run goes on without."
                )
            )


def print_json(value: Any, indent: int | None = None) -> None:
    """On stdout, as it is read everywhere: no NaN, and escapes where the encoding lacks a
    character."""
    text = json.dumps(plain(value), indent=indent, ensure_ascii=False, allow_nan=False)
    if printable(text, sys.stdout) != text:
        text = json.dumps(plain(value), indent=indent, allow_nan=False)
    sys.stdout.write(text + "\n")


def printable(text: str, stream: TextIO) -> str:
    """`text` without what the stream's encoding lacks (a Windows console's, a Latin-1 locale's)."""
    encoding = stream.encoding or "utf-8"
    return text.encode(encoding, "backslashreplace").decode(encoding)


def broadcast(*observers: Observer) -> Observer:
    """An observer that tells all of `observers`, in order."""

    def tell(event: Event) -> None:
        for observer in observers:
            observer(event)

    return tell
