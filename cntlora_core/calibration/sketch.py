"""Gradients of whole layers, known from what they do to a few random vectors.

G = E[delta x^T] `[m, d]` of a layer is needed for its leading directions alone. A pass adds to

    Y = G Omega  [m, k],    Z = Psi G  [l, d],    G ~ Q (Psi Q)^+ Z,    Q = orth(Y)

(Tropp, Yurtsever, Udell & Cevher 2017, algorithm 4), so that no `[m, d]` matrix is ever made, kept
or moved. Both are linear in G: passes and processes add up.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..distributed import Group
from ..lora.adapter import Factors
from ..lora.targets import Projection
from . import linalg

OVERSAMPLING = 18
SEED = 0  # of the random vectors; which they are matters little


@dataclass
class Sketches:
    """Of every layer that a gradient reached, `width` (k) directions; see above. fp32, where the
    passes are."""

    width: int
    sums: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    tokens: dict[str, int] = field(default_factory=dict)
    probes: dict[tuple[int, int, torch.device], Tensor] = field(default_factory=dict)

    def add(self, name: str, delta: Tensor, x: Tensor, counts: bool = True) -> Tensor:
        """What pictures' gradients `delta` `[n, tokens, m]` and inputs `x` `[n, tokens, d]` bring.

        Returns the squared norm of each picture's G `[n]` as Omega sees it, right in the mean.
        `counts`: off for what another process adds.
        """
        omega = self._probe(x.shape[-1], self.width, x.device)
        psi = self._probe(delta.shape[-1], 2 * self.width + 1, x.device)
        each = delta.mT @ (x @ omega)
        Y, Z = each.sum(0), ((delta @ psi).mT @ x).sum(0)
        if name not in self.sums:
            self.sums[name], self.tokens[name] = (torch.zeros_like(Y), torch.zeros_like(Z)), 0
        if counts:
            for total, part in zip(self.sums[name], (Y, Z), strict=True):
                total += part
            self.tokens[name] += delta.shape[:-1].numel()
        return each.square().sum((1, 2))

    def combine(self, group: Group) -> None:
        """The sums of all processes."""
        if group.size == 1:
            return
        for name, sums in self.sums.items():
            count = torch.tensor([float(self.tokens[name])])
            group.sum_([*sums, count])
            self.tokens[name] = int(count)

    def get(self, projection: Projection) -> Factors:
        """G, of rank k, as a product. Raises RuntimeError when nothing was seen: a hook that never
        fired is a bug."""
        if projection.name not in self.sums:
            raise RuntimeError("no tokens were recorded")
        Y, Z = (part / self.tokens[projection.name] for part in self.sums[projection.name])
        Q = linalg.qr(Y)[0]
        psi = self._probe(len(Y), 2 * self.width + 1, Y.device)
        q, r = linalg.qr(psi.T @ Q)
        return Factors(Q, linalg.triangular_solve(r, q.T @ Z, upper=True))

    def _probe(self, size: int, count: int, device: torch.device) -> Tensor:
        """`count` random vectors `[size, count]` that keep norms in the mean; all directions where
        there are no more than that."""
        key = size, count, device
        if key not in self.probes:
            generator = torch.Generator().manual_seed(SEED)
            drawn = torch.randn(size, count, generator=generator) / math.sqrt(count)
            self.probes[key] = (torch.eye(size) if count >= size else drawn).to(device)
        return self.probes[key]


def sketch_bytes(projections: Sequence[Projection], width: int) -> int:
    """Of Y and Z, fp32."""
    return 4 * sum(
        p.out_features * min(width, p.in_features)
        + p.in_features * min(2 * width + 1, p.out_features)
        for p in projections
    )


def sketch_width(rank: int) -> int:
    """Directions that a LoRA of this mean rank asks for: twice that, since layers take unequal
    parts, and some that are not kept."""
    return 2 * rank + OVERSAMPLING
