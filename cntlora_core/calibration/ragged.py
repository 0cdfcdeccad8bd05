"""Factors of unequal ranks worked on together: each layer's are brought to the largest rank by rows
and columns of zeros, so that the number of kernels is that of shapes and not of ranks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from ..lora.targets import Projection
from .moments import alike, at_a_time


@dataclass(frozen=True)
class Ragged:
    """Of g layers of one width their `names` and `ranks`, of which R is the largest. Of all N rows
    together the `places` among g R and the layer `of` each `[N]`; `sources` `[g 2 R]` is the other
    way, for weights and gradients, 2 N where there are zeros; `counts` are the ranks `[g]`, `zero`
    is a row of it `[1, d]`."""

    names: Sequence[str]
    ranks: Sequence[int]
    places: Tensor
    of: Tensor
    sources: Tensor
    counts: Tensor
    zero: Tensor

    @classmethod
    def make(cls, ranks: Mapping[str, int], width: int, device: torch.device) -> Ragged:
        """Of ranks by name."""
        names, own = zip(*ranks.items(), strict=True)
        most, total, count = max(own), max(own) * len(own), sum(own)
        places = torch.tensor([i * most + k for i, rank in enumerate(own) for k in range(rank)])
        of = torch.tensor([i for i, rank in enumerate(own) for _ in range(rank)])
        sources = torch.full((2, total), 2 * count)
        sources[:, places] = torch.arange(2 * count).view(2, count)
        sources = sources.view(2, len(own), most).transpose(0, 1)
        zero = torch.zeros(1, width)
        parts = places, of, sources.flatten(), torch.tensor(own, dtype=torch.float32), zero
        return cls(names, own, *(part.to(device) for part in parts))

    def rows(self, weights: Sequence[Tensor], grads: Sequence[Tensor]) -> Tensor:
        """`[g, 2 R, d]` of each layer's `[r, d]`, the weights before the gradients."""
        every = torch.cat([*weights, *grads, self.zero])
        return every.index_select(0, self.sources).unflatten(0, (len(self.ranks), -1))

    def every_row(self, padded: Tensor) -> Tensor:
        """`[N, d]`, without the zeros of `padded` `[g, R, d]`."""
        return padded.flatten(0, 1).index_select(0, self.places)


@dataclass(frozen=True)
class Together:
    """Layers that step together, in two orders: their B by output widths, their A by input widths.
    The place of each of `up` among `down` is `to_up` `[L]`, `to_down` is the other way; `of_up` and
    `of_down` say the layer of each row `[N]`."""

    up: Sequence[Ragged]
    down: Sequence[Ragged]
    to_up: Tensor
    to_down: Tensor
    of_up: Tensor
    of_down: Tensor

    @classmethod
    def make(
        cls, projections: Sequence[Projection], ranks: Mapping[str, int], device: torch.device
    ) -> Together:
        up, down = (
            [
                group
                for own, layers in alike(projections, width, len(projections))
                for group in grouped({p.name: ranks[p.name] for p in layers}, own[0], device)
            ]
            for width in (output_width, input_width)
        )
        B, A = ([name for group in groups for name in group.names] for groups in (up, down))
        places = ({name: i for i, name in enumerate(names)} for names in (A, B))
        to_up, to_down = (
            torch.tensor([place[name] for name in names]).to(device)
            for place, names in zip(places, (B, A), strict=True)
        )
        return cls(up, down, to_up, to_down, _every_of(up), _every_of(down))

    def factors(self) -> list[str]:
        """Their names, in their orders."""
        sides = (self.up, "B"), (self.down, "A")
        return [f"{name}.{half}" for groups, half in sides for own in groups for name in own.names]


def together(
    projections: Sequence[Projection], ranks: Mapping[str, int], device: torch.device
) -> Iterator[Together]:
    """All layers by ascending ranks R, as many at a time as have `MOST` numbers in R x R."""
    by_rank = sorted(projections, key=lambda p: ranks[p.name])
    for group in at_a_time(by_rank, lambda p: ranks[p.name] ** 2):
        yield Together.make(group, ranks, device)


def grouped(ranks: Mapping[str, int], width: int, device: torch.device) -> Iterator[Ragged]:
    """Layers of one `width`, by ascending ranks, as many at a time as take `MOST` numbers."""
    for names in at_a_time(ranks, lambda name: ranks[name] * width):
        yield Ragged.make({name: ranks[name] for name in names}, width, device)


def output_width(p: Projection) -> tuple[int, bool]:
    """Layers of one are worked on together."""
    return p.out_features, p.diagonal_out


def input_width(p: Projection) -> tuple[int, int, bool]:
    """The same of inputs."""
    return p.in_features, p.channels_in, p.diagonal_in


def _every_of(groups: Sequence[Ragged]) -> Tensor:
    starts = accumulate((len(layers.names) for layers in groups), initial=0)
    return torch.cat([layers.of + start for layers, start in zip(groups, starts, strict=False)])
