"""How strongly a LoRA shall act (derived here, docs/method.md, "Strength").

What is fitted to a few pictures owes part of its fit to what they alone have, and goes too far for
any other: on pictures that were left out the loss, over the strength that the LoRA is given, is a
parabola whose minimum lies below 1, the lower the less there was to learn.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..lora.adapter import LoRA, attached_lora, scaled

if TYPE_CHECKING:
    from ..model.loader import StableDiffusion

LEAST = 0.25  # no LoRA is given out weaker
FLAT = 1e-6  # a bend below it, as a share of the loss, is rounding
APART = 0.7  # of two strengths that are compared
NEAR = 0.05  # of a strength another that needs no look of its own: the parabola is flat there


@dataclass
class Strength:
    """`value` is what the LoRA is given out at; `base` the validation loss of the untouched
    model."""

    base: float
    value: float = 1.0

    @property
    def other(self) -> float:
        """Another strength to look at, well inside [0, 1] and well away from `value`."""
        return self.value * APART if self.value > APART else self.value / APART

    def learn(self, loss: Callable[[float], float]) -> tuple[float, float]:
        """Take the strength where the parabola through the untouched model and two looks, at this
        strength and another, is least; a third look is made there where it is not NEAR. Returns the
        best look: (strength, loss)."""
        looks = [(s, loss(s)) for s in (self.value, self.other)]
        best = least([(0.0, self.base), *looks])
        if best is not None:
            self.value = min(max(best, LEAST), 1.0)
            if min(abs(self.value - s) for s, _ in looks) > NEAR:
                looks.append((self.value, loss(self.value)))
        return min(looks, key=lambda look: look[1] if math.isfinite(look[1]) else math.inf)


def fitted_strength(
    model: StableDiffusion, lora: LoRA, validate: Callable[[], float], base: float
) -> tuple[float, float]:
    """(strength, validation loss) of a LoRA that no training validates."""

    def at(strength: float) -> float:
        with attached_lora(model.unet, scaled(lora, strength)):
            return validate()

    return Strength(base).learn(at)


def least(points: list[tuple[float, float]]) -> float | None:
    """Where the parabola through three points (x, y) is least; None where it has no minimum."""
    (x0, y0), (x1, y1), (x2, y2) = points
    first, second = (y1 - y0) / (x1 - x0), (y2 - y1) / (x2 - x1)
    bend = (second - first) / (x2 - x0)
    if not bend > FLAT * abs(y0) or not math.isfinite(bend):
        return None
    return (x0 + x1) / 2 - first / (2 * bend)
