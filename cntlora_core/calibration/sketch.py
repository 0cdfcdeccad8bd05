"""Gradients of whole layers, known from what they do to a few random vectors.

G = E[delta x^T] `[m, d]` of a layer is needed for its leading directions alone. A pass adds to

    Y = G Omega  [m, k],    Z = Psi G  [l, d],    G ~ Q (Psi Q)^+ Z,    Q = orth(Y),    l = 2 k + 1

(Tropp, Yurtsever, Udell & Cevher 2017, algorithm 4), so that no `[m, d]` matrix is ever made, kept
or moved; of a layer that reads more than it says (d > m, as every 3x3 convolution) the same of G^T,
so that the longer side has the fewer vectors. Both are linear in G: passes and processes add up.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..distributed import Group
from ..lora.targets import Projection
from . import linalg
from .inputs import AT_ONCE, Inputs

# What G has beside the k directions that are kept comes to them as noise, k / (l - k) of it: in
# wide layers much, of 18 more than half of what was kept (docs/experiments.md).
OVERSAMPLING = 64
SKETCHING_BYTES = 4 * AT_ONCE  # what a layer takes in passing
SEED = 0  # of the random vectors; which they are matters little


@dataclass
class Sketches:
    """Of every layer that a gradient reached, `width` (k) directions; see above. fp32, where the
    passes are."""

    width: int
    sums: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    probes: dict[tuple[int, int, torch.device], Tensor] = field(default_factory=dict)

    def add(
        self, name: str, delta: Tensor, inputs: Inputs, scale: float = 1.0, counts: bool = True
    ) -> Tensor:
        """What pictures' gradients `delta` `[n, tokens, m]`, which are `scale` times what they
        should be, and `inputs` `[n, tokens, d]` bring; of any dtype, taken to fp32 in parts.

        Returns the norm of each picture's G `[n]` as Omega sees it, its square right in the mean.
        `counts`: off for what another process adds.
        """
        omega, psi = self._probes(inputs.width, delta.shape[-1], delta.device)
        sizes = len(delta), delta.shape[-1], omega.shape[-1]
        each = torch.empty(sizes, dtype=torch.float32, device=delta.device)
        if name not in self.sums:
            Z = torch.zeros(psi.shape[-1], inputs.width, device=delta.device)
            self.sums[name] = torch.zeros_like(each[0]), Z
        Y, Z = self.sums[name]
        for pictures, rows, own in inputs.parts(delta.shape[-1]):
            part = delta[pictures, rows].float()
            more = 1 if rows.start else 0  # to what a picture's first tokens gave
            each[pictures].baddbmm_(part.mT, own.answers(omega), beta=more, alpha=1 / scale)
            if counts:
                own.add_outer(Z, part @ psi, 1 / scale)
            del part, own  # before the next are made
        if counts:
            Y += each.sum(0) if len(each) > 1 else each[0]
        return torch.linalg.vector_norm(each, dim=(1, 2))

    def combine(self, group: Group) -> None:
        """The sums of all processes."""
        for sums in self.sums.values() if group.size > 1 else ():
            group.sum_([*sums])

    def get(
        self, projections: Sequence[Projection], tokens: Sequence[int]
    ) -> tuple[Tensor, Tensor]:
        """G of g projections of one shape that have seen so many tokens, of rank k, as a product:
        `[g, m, k]` and `[g, k, d]`.

        (Psi Q)^+ comes from its Gram matrix: Gaussian and twice as long as wide, its condition is a
        handful. Raises RuntimeError when nothing was seen: a hook that never fired is a bug.
        """
        names = [p.name for p in projections]
        if not self.sums.keys() >= set(names):
            raise RuntimeError("no tokens were recorded")
        Y, Z = (
            torch.stack(torch._foreach_div(sums, tokens))
            for sums in zip(*(self.sums[name] for name in names), strict=True)
        )
        omega, psi = self._probes(Z.shape[-1], Y.shape[-2], Y.device)
        if Z.shape[-1] > Y.shape[-2]:
            up, down = _product(Z.mT, Y.mT, omega)
            return down.mT, up.mT
        return _product(Y, Z, psi)

    def forget(self, projections: Sequence[Projection]) -> None:
        """Their memory back: nobody asks for them again."""
        for p in projections:
            del self.sums[p.name]

    def _probes(self, d: int, m: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """Omega and the transpose of Psi."""
        of_inputs, of_outputs = _counts(d, m, self.width)
        return self._probe(d, of_inputs, device), self._probe(m, of_outputs, device)

    def _probe(self, size: int, count: int, device: torch.device) -> Tensor:
        """`count` random vectors `[size, count]` that keep norms in the mean; all directions where
        there are no more than that."""
        key = size, count, device
        if key not in self.probes:
            generator = torch.Generator().manual_seed(SEED)
            drawn = torch.randn(size, count, generator=generator) / math.sqrt(count)
            self.probes[key] = torch.eye(size, device=device) if count >= size else drawn.to(device)
        return self.probes[key]


def sketch_bytes(projections: Sequence[Projection], width: int) -> int:
    """Of Y and Z, fp32."""
    return 4 * sum(sketch_numbers(p, width) for p in projections)


def sketch_numbers(projection: Projection, width: int) -> int:
    """Of Y and Z of a layer."""
    d, m = projection.in_features, projection.out_features
    of_inputs, of_outputs = _counts(d, m, width)
    return m * min(of_inputs, d) + d * min(of_outputs, m)


def _counts(d: int, m: int, width: int) -> tuple[int, int]:
    """Of random vectors for the inputs and for the outputs."""
    few, many = width, 2 * width + 1
    return (many, few) if d > m else (few, many)


def _product(Y: Tensor, Z: Tensor, psi: Tensor) -> tuple[Tensor, Tensor]:
    """Q and (Psi Q)^+ Z, `psi` the transpose of Psi."""
    Q = linalg.orthonormal(Y)
    seen = psi.T @ Q
    return Q, linalg.solve(seen.mT @ seen, seen.mT @ Z)


def sketch_width(rank: int) -> int:
    """Directions that a LoRA of this mean rank asks for: twice that, since layers take unequal
    parts, and some that are not kept."""
    return 2 * rank + OVERSAMPLING
