"""The running mean of weights over the steps of a training."""

from __future__ import annotations

from torch import Tensor

AVERAGING = 0.95  # of the mean that stays at every step, once the first steps are forgotten


class RunningAverage:
    """Less noise than the last step's weights. `value` is the mean, `count` the steps in it.

    The horizon grows with the steps (a quarter of the mean stays at the first), up to 1 / (1 -
    `decay`) of them; 0 is no averaging.
    """

    def __init__(self, start: Tensor, decay: float = AVERAGING) -> None:
        self.value, self.decay, self.count = start.clone(), decay, 0

    def add(self, weights: Tensor) -> None:
        kept = min(self.decay, (1 + self.count) / (4 + self.count))
        self.value.lerp_(weights, 1 - kept)
        self.count += 1
