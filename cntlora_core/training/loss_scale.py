"""What the loss is multiplied by, so that fp16 gradients do not underflow."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

# As torch's GradScaler, which asks the device at every step whether it may make it.
FIRST = 65536.0
BACKOFF = 0.5
GROWTH = 2.0
PATIENCE = 2000  # steps without an overflow after which a larger scale is tried
LEAST = 2.0**-10  # what overflows even so is no number at any scale


@dataclass
class LossScale:
    """`value` is 1 and stays 1 where it is not `moving`; else it is lowered after a gradient that
    overflowed, and raised after `good` steps without one."""

    moving: bool
    value: float = 1.0
    good: int = 0

    @classmethod
    def start(cls, moving: bool) -> LossScale:
        return cls(moving, FIRST if moving else 1.0)

    @property
    def can_fall(self) -> bool:
        """Whether a gradient that is no number may be one at a lower scale."""
        return self.moving and self.value > LEAST

    def update(self, finite: bool) -> None:
        """After a step, or one that was left out because its gradient was not `finite`."""
        if not self.moving:
            return
        self.good = self.good + 1 if finite else 0
        if not finite:
            self.value *= BACKOFF
        elif self.good == PATIENCE:
            self.value, self.good = self.value * GROWTH, 0

    def state_dict(self) -> dict[str, Any]:
        return {"scale": self.value, "_growth_tracker": self.good} if self.moving else {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Also of torch's GradScaler, whose names these are."""
        self.value, self.good = float(state["scale"]), int(state["_growth_tracker"])
