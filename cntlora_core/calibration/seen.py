"""What passes leave behind: rows of layers' inputs and of the gradients that came back."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..distributed import Group, gathered

ROWS = 64  # of each picture's tokens that a pass keeps, of a layer's input and of its gradient


@dataclass
class Seen:
    """What passes left behind, by key: rows `[pictures, n, d]` in their own dtype (of a `diagonal`
    the mean square's root `[1, 1, d]`), which are `scales` times what they should be, and of each
    pass the `counts` that they stand for: of an input pictures, of a gradient tokens."""

    rows: dict[str, list[Tensor]] = field(default_factory=dict)
    counts: dict[str, list[int]] = field(default_factory=dict)
    scales: dict[str, float] = field(default_factory=dict)
    diagonal: set[str] = field(default_factory=set)

    def add(self, key: str, rows: Tensor, count: int, diagonal: bool, scale: float) -> None:
        if diagonal:
            n, full = rows.shape[:2].numel(), torch.float32
            rows = torch.linalg.vector_norm(rows, dim=(0, 1), keepdim=True, dtype=full) / n**0.5
            self.diagonal.add(key)
        self.rows.setdefault(key, []).append(rows)
        self.counts.setdefault(key, []).append(count)
        self.scales[key] = scale

    def extend(self, other: Seen) -> None:
        """With what further passes of the same scale left."""
        for key, rows in other.rows.items():
            self.rows.setdefault(key, []).extend(rows)
            self.counts.setdefault(key, []).extend(other.counts[key])
        self.scales |= other.scales
        self.diagonal |= other.diagonal

    def weights(self, key: str) -> list[float]:
        """Of a row of each pass in the mean over all: passes of pictures of other sizes, of which
        as many rows are kept, stand for other counts."""
        counts, kept = self.counts[key], [part.shape[:2].numel() for part in self.rows[key]]
        usual = sum(counts) / sum(kept)
        return [count / rows / usual for count, rows in zip(counts, kept, strict=True)]

    def together(self, group: Group) -> Seen:
        """What all processes saw, each as many pictures, in the order that they share them in.
        Pictures are of several sizes and prompts of several lengths: what a process has more or
        fewer tokens of weighs so."""
        if group.size == 1:
            return self
        parts = [
            (k, part, n)
            for k in self.rows
            for part, n in zip(self.rows[k], self.counts[k], strict=True)
        ]
        kept = [part.shape[1] for _, part, _ in parts]
        own = torch.tensor(
            [[n for *_, n in parts], kept, [n * n for n in kept]], dtype=torch.float64
        )
        every = own.clone()
        group.sum_([every])
        alike = (every[1] ** 2 == group.size * every[2]).tolist()  # as many rows in all processes
        weights = (own[0] * group.size / every[0]).sqrt().tolist()
        seen = Seen(scales=self.scales, diagonal=self.diagonal)
        for (key, part, _), count, same, weight in zip(
            parts, map(int, every[0].tolist()), alike, weights, strict=True
        ):
            rows = part.float() if same else _as_many(part.float())
            rows = gathered(rows if weight == 1 else rows * weight, group)
            seen.rows.setdefault(key, []).append(rows.transpose(0, 1).flatten(0, 1))
            seen.counts.setdefault(key, []).append(count)
        return seen


def _as_many(rows: Tensor) -> Tensor:
    """`ROWS` rows of each picture `[n, r, d]`, with the same mean of squares: some of fewer stand
    there again, each copy for a part of one."""
    n = rows.shape[1]
    if n >= ROWS:
        return rows
    at = torch.arange(ROWS, device=rows.device) % n
    times = at.bincount(minlength=n)[at]
    return rows[:, at] * (ROWS / n / times)[:, None].sqrt()
