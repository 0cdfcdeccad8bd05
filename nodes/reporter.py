"""What a run reports, on its way to the page: progress on the node, a message, and a line in the
run's file."""

from __future__ import annotations

import json
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from PIL import Image

from ..cntlora_core.events import Event, Notice, Progress, Saved, Step, Training
from ..cntlora_core.files import DISK, Disk, LineFile, reason
from . import host

FREQUENT = (Step.type, Progress.type)
# seconds between messages of the frequent kind: they go together, so that the page stays quick
SEND_EVERY = 0.25


@dataclass(frozen=True)
class Run(Event):
    """A node began to work. `client`: the page that sent it; `folder`: where its pictures lie,
    under ComfyUI's temp folder; `steps`: 0 while they are auto; `started`: seconds since 1970;
    `before`: what nodes before it show."""

    type: ClassVar[str] = "run"
    node_class: str
    client: str
    steps: int
    started: float
    folder: str
    before: tuple[dict[str, str], ...]


@dataclass(frozen=True)
class Sample(Event):
    """A picture was drawn after `step` steps: `file` in the run's folder."""

    type: ClassVar[str] = "sample"
    step: int
    file: str


@dataclass(frozen=True)
class Kept(Event):
    """The weights given out are those after `step` steps."""

    type: ClassVar[str] = "kept"
    step: int


@dataclass(frozen=True)
class End(Event):
    """The node is done, or why it is not, in a sentence."""

    type: ClassVar[str] = "end"
    ok: bool
    text: str


def shown(*traces: dict[str, str]) -> dict[str, Any]:
    """The `ui` of a node: what it and the nodes before show, also when the cache answers for them.
    As text: the host counts every dictionary in a `ui` as a file that the run gave."""
    return {"cntlora_shown": [json.dumps(trace) for trace in traces]}


class Reporter:
    """An observer for one node. Raises on Cancel, so a run stops within one step.

    Every event becomes a line of `events_<run>.jsonl`, numbered, from which a page opened later
    rebuilds what it missed; a run that ComfyUI's cache gives again is still there.
    """

    def __init__(
        self,
        node: host.Identity,
        kind: str,
        steps: int = 0,
        *,
        before: tuple[dict[str, str], ...] = (),
        disk: Disk = DISK,
    ) -> None:
        self.node, self.kind, self.steps, self.sequence = node, kind, steps, 0
        self.run = f"{time.time_ns():x}"
        self.folder: Path = node.path
        with suppress(OSError):
            self.folder.mkdir(parents=True, exist_ok=True)
        self.unsent: list[dict[str, Any]] = []
        self.sent = 0.0
        self.saved = False
        self.show = host.progress_bar(node.node)
        path = self.folder / f"events_{self.run}_{node.client}.jsonl"
        self.lines = LineFile(path, disk=disk)
        self.note(Run(kind, node.client, steps, time.time(), node.folder, before))

    def __enter__(self) -> Reporter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: object
    ) -> None:
        try:
            self.note(End(kind is None, self._ending(error)))
        finally:
            self.lines.close()

    def _ending(self, error: BaseException | None) -> str:
        if isinstance(error, host.Cancelled):
            return "Cancelled; what was trained is kept" if self.saved else "Cancelled"
        return "Done" if error is None else str(error) or type(error).__name__

    def note(self, event: Event) -> None:
        """Tell without looking for Cancel: for what must be said while a cancelled run ends."""
        self.saved |= isinstance(event, Saved)
        self.sequence += 1
        line = {"run": self.run, "seq": self.sequence, "time": time.time(), **event.to_dict()}
        self.unsent.append(line)
        if failure := self.lines.write(json.dumps(line, ensure_ascii=False)):
            text = f"The run's events cannot be kept ({failure}): a reloaded page will lack them."
            self.note(Notice(text))
        if event.type in FREQUENT and time.monotonic() - self.sent < SEND_EVERY:
            return
        host.send({"v": 1, **self._source, "events": self.unsent})
        self.unsent, self.sent = [], time.monotonic()

    def __call__(self, event: Event) -> None:
        self.note(event)
        if isinstance(event, Training):
            self.steps = event.steps
        elif isinstance(event, Step):
            self.show(event.step, self.steps)
        elif isinstance(event, Progress) and not self.steps:
            # A finished phase is the start of the next one, not the end of the node.
            self.show(event.done % event.total, event.total)
        host.check_cancel()

    def picture(self, step: int, pictures: list[Image.Image]) -> None:
        """Samples after `step` steps, side by side."""
        width = sum(p.width for p in pictures)
        strip = Image.new("RGB", (width, max(p.height for p in pictures)))
        left = 0
        for p in pictures:
            strip.paste(p, (left, 0))
            left += p.width
        # Of one step there may be another, of the weights that are given out.
        name = f"{self.run}_{step:06d}_{self.sequence}.png"
        try:
            strip.save(self.folder / name)
        except OSError as error:
            self.note(Notice(f"'{name}' could not be written ({reason(error)})."))
            return
        self.note(Sample(step, name))

    def kept(self, step: int) -> None:
        """The weights given out are those after `step` steps."""
        self.note(Kept(step))

    @property
    def trace(self) -> dict[str, str]:
        """This run, as what comes of it names it."""
        return {**self._source, "run": self.run}

    @property
    def _source(self) -> dict[str, str]:
        return self.node.source(self.kind)
