"""What a run reports while it works. An observer is any callable that takes an event.

Observers may raise to stop a run (ComfyUI's Cancel is an exception): nothing here or in the callers
swallows it.
"""

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, ClassVar


@dataclass(frozen=True)
class Event:
    type: ClassVar[str] = "event"

    def to_dict(self) -> dict[str, Any]:
        """Plain values, `type` first."""
        return {"type": self.type, **plain(asdict(self))}

    def to_json(self) -> str:
        """One line of JSON with `type` first."""
        return json.dumps(self.to_dict(), ensure_ascii=False, allow_nan=False)


def plain(value: Any) -> Any:
    """`value` as JSON can hold it: what is not a finite number is null."""
    if isinstance(value, dict):
        return {key: plain(held) for key, held in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(held) for held in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


@dataclass(frozen=True)
class Status(Event):
    """A new phase of the run, in plain words: `template` with `values` in its braces, apart, so
    that a page can say it in another language."""

    type: ClassVar[str] = "status"
    template: str
    values: Mapping[str, str | int] = field(default_factory=dict)

    @property
    def text(self) -> str:
        return self.template.format(**self.values) if self.values else self.template

    def to_dict(self) -> dict[str, Any]:
        return {**super().to_dict(), "text": self.text}


@dataclass(frozen=True)
class Notice(Event):
    """Something the user should know though the run goes on (a picture skipped, a rank clipped)."""

    type: ClassVar[str] = "warning"
    text: str


@dataclass(frozen=True)
class Progress(Event):
    """`done` of `total` units of `phase` are finished."""

    type: ClassVar[str] = "progress"
    phase: str
    done: int
    total: int


@dataclass(frozen=True)
class Base(Event):
    """Validation loss of the untouched model."""

    type: ClassVar[str] = "base"
    loss: float


@dataclass(frozen=True)
class Calibrated(Event):
    """The start was computed. Losses are on the calibration set; passes count single pictures."""

    type: ClassVar[str] = "calibrated"
    init: str
    base_loss: float | None  # None: nothing was measured (plain starts)
    loss: float | None
    step_size: float | None
    ranks: dict[str, int]
    energy: dict[str, float]
    forward_passes: int
    backward_passes: int
    seconds: float


@dataclass(frozen=True)
class Training(Event):
    """The adapters are attached and the first step, of `steps` in all, is next; `done` are made
    already (a resumed run)."""

    type: ClassVar[str] = "training"
    steps: int
    done: int


@dataclass(frozen=True)
class Resumed(Event):
    """What a run that goes on has behind it: the loss of every step, and its validations as (step,
    loss)."""

    type: ClassVar[str] = "resumed"
    losses: list[float]
    validations: list[tuple[int, float]]


@dataclass(frozen=True)
class Step(Event):
    """One optimiser step: `loss` is the mean over its batch."""

    type: ClassVar[str] = "step"
    step: int
    loss: float
    lr: float


@dataclass(frozen=True)
class Validation(Event):
    """Loss on fixed timesteps and noise after `step` optimiser steps (0: before the first)."""

    type: ClassVar[str] = "validation"
    step: int
    loss: float


@dataclass(frozen=True)
class Saved(Event):
    """A file was written and read back."""

    type: ClassVar[str] = "saved"
    path: str


@dataclass(frozen=True)
class Done(Event):
    """The run ended. `result` is what the command prints as its last line."""

    type: ClassVar[str] = "done"
    result: dict[str, Any] = field(default_factory=dict)


Observer = Callable[[Event], None]


def ignore(event: Event) -> None:
    """The observer for callers who do not want to know."""
