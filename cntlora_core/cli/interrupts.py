"""Ctrl-C and a scheduler's SIGTERM: the run ends after the step it is in, its work kept."""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType
from typing import TYPE_CHECKING

from ..errors import Interrupted
from ..events import Event, Step, Training

if TYPE_CHECKING:
    from ..distributed import Group


class Interrupts:
    """An observer that raises Interrupted at the first event after a signal. Use as a context
    manager.

    A second signal raises KeyboardInterrupt at once, but not while steps are made: there it would
    leave half a step, and the whole one is over soon. However many come, the run is left once;
    those that come while its work is kept change nothing. The processes of `group` leave after the
    same step, whichever of them got the signal: one alone would leave the others waiting for it.
    """

    SIGNALS = (signal.SIGINT, signal.SIGTERM)

    def __init__(self) -> None:
        self.received: int | None = None
        self.group: Group | None = None
        self.stepping = False
        self.leaving = False
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
        for number, handler in self.before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def __call__(self, event: Event) -> None:
        self.stepping = self.stepping or isinstance(event, Training)
        received = self.received or 0
        if self.stepping and self.group and self.group.size > 1:
            if not isinstance(event, Step):
                return  # not every process is told of everything else
            received = _highest(received, self.group)
        if received:
            self._leave(received)

    def finish(self) -> None:
        """The run is over: what is left is to keep its work, which no signal stops."""
        self.leaving = True

    def _note(self, number: int, frame: FrameType | None) -> None:
        again = self.received is not None
        self.received = number
        if again and not self.stepping and not self.leaving:
            self.leaving = True
            raise KeyboardInterrupt  # not an Exception, which a library in between might swallow

    def _leave(self, number: int) -> None:
        if not self.leaving:
            self.leaving = True
            raise Interrupted("Interrupted.", 128 + number)


def _highest(own: int, group: Group) -> int:
    """Of all processes' numbers."""
    import torch

    from ..distributed import gathered

    return int(gathered(torch.tensor(float(own)), group).max())
