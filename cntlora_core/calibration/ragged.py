"""Factors of unequal ranks worked on together: each layer's are brought to the largest rank by rows
and columns of zeros, so that the number of kernels is that of shapes and not of ranks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

MOST = 1 << 23  # numbers of both factors with their zeros that are worked on at once


@dataclass(frozen=True)
class Ragged:
    """Of g layers of one shape their `names` and `ranks`, of which R is the largest. Of all N rows
    together the `places` among g R and the layer `of` each `[N]`; `sources` `[2 g R]` is the other
    way, for weights and gradients, 2 N where there are zeros; `counts` are the ranks `[g]`."""

    names: Sequence[str]
    ranks: Sequence[int]
    places: Tensor
    of: Tensor
    sources: Tensor
    counts: Tensor

    @classmethod
    def make(cls, ranks: Mapping[str, int], device: torch.device) -> Ragged:
        """Of ranks by name."""
        names, own = zip(*ranks.items(), strict=True)
        most, total, count = max(own), max(own) * len(own), sum(own)
        places = torch.tensor([i * most + k for i, rank in enumerate(own) for k in range(rank)])
        of = torch.tensor([i for i, rank in enumerate(own) for _ in range(rank)])
        sources = torch.full((2, total), 2 * count)
        sources[:, places] = torch.arange(2 * count).view(2, count)
        parts = places, of, sources.flatten(), torch.tensor(own, dtype=torch.float32)
        return cls(names, own, *(part.to(device) for part in parts))

    @property
    def size(self) -> tuple[int, int, int]:
        """Weights and gradients, g, R."""
        return 2, len(self.ranks), max(self.ranks)

    def rows(self, weights: Sequence[Tensor], grads: Sequence[Tensor]) -> Tensor:
        """`[2, g, R, d]` of each layer's `[r, d]`."""
        zero = weights[0].new_zeros(1, weights[0].shape[1])
        every = torch.cat([*weights, *grads, zero])
        return every.index_select(0, self.sources).unflatten(0, self.size)

    def columns(self, weights: Sequence[Tensor], grads: Sequence[Tensor]) -> Tensor:
        """`[2, g, m, R]` of each layer's `[m, r]`."""
        zero = weights[0].new_zeros(weights[0].shape[0], 1)
        every = torch.cat([*weights, *grads, zero], 1)
        return every.index_select(1, self.sources).unflatten(1, self.size).permute(1, 2, 0, 3)

    def every_row(self, padded: Tensor) -> Tensor:
        """`[N, d]`, without the zeros of `padded` `[g, R, d]`."""
        return padded.flatten(0, 1).index_select(0, self.places)

    def every_column(self, padded: Tensor) -> Tensor:
        """`[m, N]`, without the zeros of `padded` `[g, m, R]`."""
        return padded.transpose(0, 1).flatten(1, 2).index_select(1, self.places)


def grouped(ranks: Mapping[str, int], width: int, device: torch.device) -> Iterator[Ragged]:
    """Layers of one shape, both widths together `width`, by ascending ranks, as many at a time as
    take `MOST` numbers."""
    group: dict[str, int] = {}
    for name, rank in ranks.items():
        if group and (len(group) + 1) * rank * width > MOST:
            yield Ragged.make(group, device)
            group = {}
        group[name] = rank
    yield Ragged.make(group, device)
