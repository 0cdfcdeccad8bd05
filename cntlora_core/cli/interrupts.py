"""Ctrl-C and a scheduler's SIGTERM: the run ends after the step it is in, its work kept."""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType

from ..errors import Interrupted
from ..events import Event


class Interrupts:
    """An observer that raises Interrupted at the first event after a signal. Use as a context
    manager; a second signal acts as if there were none of this."""

    SIGNALS = (signal.SIGINT, signal.SIGTERM)

    def __init__(self) -> None:
        self.received: int | None = None
        self.before: dict[int, object] = {}

    def __enter__(self) -> Interrupts:
        if threading.current_thread() is threading.main_thread():
            self.before = {number: signal.signal(number, self._note) for number in self.SIGNALS}
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._restore()

    def __call__(self, event: Event) -> None:
        if self.received is not None:
            raise Interrupted("Interrupted.", 128 + self.received)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.received = number
        self._restore()

    def _restore(self) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]
