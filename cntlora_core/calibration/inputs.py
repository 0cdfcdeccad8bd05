"""What layers read of pictures, as rows `[n, tokens, d]`: tokens as they come, or the patches of a
convolution, which are made only where they are asked for."""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterator
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from ..lora.targets import Projection
from ..model.convolution import Convolution

AT_ONCE = 1 << 24  # numbers in fp32 of a layer's inputs and gradients that are worked on together


class Inputs(Protocol):
    """Of n pictures, in any dtype."""

    @property
    def x(self) -> Tensor: ...

    @property
    def tokens(self) -> int: ...

    @property
    def width(self) -> int:
        """d."""

    @property
    def layout(self) -> Hashable:
        """Of inputs that are alike in it an index says the same rows."""

    def index(self, places: Tensor) -> Tensor:
        """What `at` wants for the rows at `places` `[p]` of every picture."""

    def at(self, index: Tensor) -> Tensor:
        """Those rows, `[n, p, d]`."""

    def parts(self, beside: int) -> Iterator[tuple[slice, slice, Inputs]]:
        """In fp32, some pictures and rows at a time, as many as `AT_ONCE` takes with `beside`
        numbers to each row."""

    def answers(self, vectors: Tensor) -> Tensor:
        """The rows' products with `vectors` `[d, k]`, `[n, tokens, k]`."""

    def add_outer(self, sums: Tensor, answers: Tensor, alpha: float) -> None:
        """`alpha` times the sum of `answers` `[n, tokens, k]` times their rows, added to `sums`
        `[k, d]`."""


@dataclass(frozen=True)
class Tokens:
    """x `[n, tokens, d]`."""

    x: Tensor

    @property
    def width(self) -> int:
        return self.x.shape[-1]

    @property
    def tokens(self) -> int:
        return self.x.shape[1]

    @property
    def layout(self) -> Hashable:
        return self.tokens

    def index(self, places: Tensor) -> Tensor:
        return places

    def at(self, index: Tensor) -> Tensor:
        return self.x[:, index]

    def parts(self, beside: int) -> Iterator[tuple[slice, slice, Inputs]]:
        n, tokens, d = self.x.shape
        most = max(1, AT_ONCE // (d + beside))
        pictures, rows = max(1, most // tokens), min(tokens, most)
        for first in range(0, n, pictures):
            for start in range(0, tokens, rows):
                part = slice(first, first + pictures), slice(start, start + rows)
                yield *part, Tokens(self.x[part].float())

    def answers(self, vectors: Tensor) -> Tensor:
        return self.x @ vectors

    def add_outer(self, sums: Tensor, answers: Tensor, alpha: float) -> None:
        sums.addmm_(answers.flatten(0, 1).T, self.x.flatten(0, 1), alpha=alpha)


@dataclass(frozen=True)
class Patches:
    """x `[n, channels, height, width]`, with a row for every place of the outputs."""

    x: Tensor
    convolution: Convolution

    @property
    def width(self) -> int:
        down, right = self.convolution.kernel
        return self.x.shape[1] * down * right

    @property
    def tokens(self) -> int:
        return math.prod(self.convolution.size(self.x))

    @property
    def layout(self) -> Hashable:
        return self.convolution, self.x.shape[2:]

    def index(self, places: Tensor) -> Tensor:
        return self.convolution.index(self.x, places)

    def at(self, index: Tensor) -> Tensor:
        return self.convolution.patches(self.x, index)

    def parts(self, beside: int) -> Iterator[tuple[slice, slice, Inputs]]:
        each = self.x[0].numel() + beside * self.x[0, 0].numel()
        pictures = max(1, AT_ONCE // each)
        for first in range(0, len(self.x), pictures):
            own = slice(first, first + pictures)
            yield own, slice(0, None), Patches(self.x[own].float(), self.convolution)

    def answers(self, vectors: Tensor) -> Tensor:
        return self.convolution(self.x, vectors.T).flatten(2).mT

    def add_outer(self, sums: Tensor, answers: Tensor, alpha: float) -> None:
        places = answers.mT.unflatten(2, self.convolution.size(self.x))
        sums.add_(self.convolution.outer(self.x, places), alpha=alpha)


def inputs_of(projection: Projection, x: Tensor) -> Inputs:
    """Of what its module is given."""
    if projection.convolution:
        return Patches(x, projection.convolution)
    return Tokens(x.reshape(len(x), -1, x.shape[-1]))


def outputs_of(projection: Projection, y: Tensor) -> Tensor:
    """What its module returns, or a gradient of that, as rows `[n, tokens, m]`."""
    if projection.convolution:
        return y.flatten(2).mT
    return y.reshape(len(y), -1, y.shape[-1])
