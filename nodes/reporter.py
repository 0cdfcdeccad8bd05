"""What a run reports, on its way to the page: progress on the node, a message, and a line in the
run's file."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from PIL import Image

from ..cntlora_core.events import Event, Progress, Step, Training
from . import host

FREQUENT = ("step", "progress")
# seconds between messages of the frequent kind: they go together, so that the page stays quick
SEND_EVERY = 0.25


class Reporter:
    """An observer for one node. Raises on Cancel, so a run stops within one step.

    Every event becomes a line of `events_<run>.jsonl`, numbered, from which a page opened later
    rebuilds what it missed; a run that ComfyUI's cache gives again is still there.
    """

    def __init__(self, node: host.Identity, kind: str, title: str, steps: int = 0) -> None:
        self.node, self.kind, self.steps, self.sequence = node, kind, steps, 0
        self.run = f"{time.time_ns():x}"
        self.folder: Path = node.path
        self.folder.mkdir(parents=True, exist_ok=True)
        self.unsent: list[dict[str, Any]] = []
        self.sent = 0.0
        self.show = host.progress_bar(node.node)
        self.file = (self.folder / f"events_{self.run}.jsonl").open("w", encoding="utf-8")
        run = {
            "class": kind,
            "title": title,
            "steps": steps,
            "started": time.time(),
            "folder": node.folder,
        }
        self._send({"type": "run", **run})

    def __enter__(self) -> Reporter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: object
    ) -> None:
        try:
            cancelled = isinstance(error, host.Cancelled)
            text = (
                "Done"
                if kind is None
                else "Cancelled; what was trained is kept"
                if cancelled
                else str(error)
            )
            self._send({"type": "end", "ok": kind is None, "text": text})
        finally:
            self.file.close()

    def note(self, event: Event) -> None:
        """Tell without looking for Cancel: for what must be said while a cancelled run ends."""
        self._send(event.to_dict())

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
        name = f"{self.run}_{step:06d}.png"
        strip.save(self.folder / name)
        self._send({"type": "sample", "step": step, "file": name})

    def kept(self, step: int) -> None:
        """The weights given out are those after `step` steps."""
        self._send({"type": "kept", "step": step})

    def shown(self) -> dict[str, Any]:
        """The node's `ui`: which run made its outputs, also when the cache gives them again."""
        return {"cntlora_run": [{**self._source, "run": self.run}]}

    @property
    def _source(self) -> dict[str, str]:
        return {"workflow": self.node.workflow, "node": self.node.node, "class": self.kind}

    def _send(self, content: dict[str, Any]) -> None:
        self.sequence += 1
        event = {"run": self.run, "seq": self.sequence, "time": time.time(), **content}
        self.file.write(json.dumps(event, ensure_ascii=False) + "\n")
        self.file.flush()
        self.unsent.append(event)
        if event["type"] in FREQUENT and time.monotonic() - self.sent < SEND_EVERY:
            return
        host.send({"v": 1, **self._source, "events": self.unsent})
        self.unsent, self.sent = [], time.monotonic()
