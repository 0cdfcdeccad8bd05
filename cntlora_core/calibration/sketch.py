"""Gradients of whole layers, of which the leading directions are kept.

G = E[delta x^T] `[m, d]` of a layer is needed for its leading directions alone. So of the sum S of
all passes stays

    S ~ Q R,    Q [m, k] orthonormal,    R = Q^T S [k, d]

and every pass is joined by one step of subspace iteration: the columns of Q R and what is new are
asked for along the rows that are known (derived here, docs/method.md). No `[m, d]` matrix is ever
made, kept or moved.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn.functional import normalize

from ..distributed import Group, gathered
from ..lora.targets import Projection
from . import linalg
from .inputs import AT_ONCE, Inputs

OVERSAMPLING = 32
FOR_NORMS = 26  # random vectors that a picture's gradient is measured by
SKETCHING_BYTES = 4 * AT_ONCE  # what a layer takes in passing
ELSEWHERE = 0.1  # of a row that is asked along is random: what no row knew is met too
JOINING = 2  # steps of the iteration that make one sum of several processes'
SEED = 0  # of the random vectors; which they are matters little


@dataclass
class Sketches:
    """Of every layer that a gradient reached, `width` (k) directions, Q and R; see above. fp32,
    where the passes are."""

    width: int
    sums: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    probes: dict[tuple[int, int, torch.device], Tensor] = field(default_factory=dict)

    def add(
        self, name: str, delta: Tensor, inputs: Inputs, scale: float = 1.0, counts: bool = True
    ) -> Tensor:
        """What pictures' gradients `delta` `[n, tokens, m]`, which are `scale` times what they
        should be, and `inputs` `[n, tokens, d]` bring; of any dtype, taken to fp32 in parts.

        Returns the norm of each picture's G `[n]` as random vectors see it, its square right in the
        mean. `counts`: off for what another process adds.
        """
        (n, _, m), d, device = delta.shape, inputs.width, delta.device
        if name not in self.sums:
            k = min(self.width, m, d)
            self.sums[name] = torch.zeros(m, k, device=device), torch.zeros(k, d, device=device)
        Q, R = self.sums[name]
        omega = self._probe(d, FOR_NORMS, device)
        rows = torch.cat([omega, self._along(R)], 1)
        each = torch.empty(n, m, rows.shape[1], dtype=torch.float32, device=device)
        for pictures, places, own in inputs.parts(m):
            part = delta[pictures, places].float()
            more = 1 if places.start else 0  # to what a picture's first tokens gave
            each[pictures].baddbmm_(part.mT, own.answers(rows), beta=more, alpha=1 / scale)
            del part, own  # before the next are made
        seen = omega.shape[1]
        norms = torch.linalg.vector_norm(each[..., :seen], dim=(1, 2))
        if counts:
            columns = torch.addmm(each[..., seen:].sum(0), Q, R @ rows[:, seen:])
            basis = linalg.orthonormal(columns)
            kept = (basis.mT @ Q) @ R
            for pictures, places, own in inputs.parts(m):
                own.add_outer(kept, delta[pictures, places].float() @ basis, 1 / scale)
                del own
            self.sums[name] = basis, kept
        return norms

    def combine(self, group: Group) -> None:
        """The sums of all processes, the same on each."""
        for name, (Q, R) in self.sums.items() if group.size > 1 else ():
            self.sums[name] = self._joined(gathered(Q, group), gathered(R, group))

    def get(
        self, projections: Sequence[Projection], tokens: Sequence[int]
    ) -> tuple[Tensor, Tensor]:
        """G of g projections of one shape that have seen so many tokens, of rank k, as a product:
        `[g, m, k]`, orthonormal, and `[g, k, d]`.

        Raises RuntimeError when nothing was seen: a hook that never fired is a bug.
        """
        names = [p.name for p in projections]
        if not self.sums.keys() >= set(names):
            raise RuntimeError("no tokens were recorded")
        Q = torch.stack([self.sums[name][0] for name in names])
        return Q, torch.stack(torch._foreach_div([self.sums[name][1] for name in names], tokens))

    def forget(self, projections: Sequence[Projection]) -> None:
        """Their memory back: nobody asks for them again."""
        for p in projections:
            del self.sums[p.name]

    def _joined(self, Q: Tensor, R: Tensor) -> tuple[Tensor, Tensor]:
        """The sum of the products of `Q` `[n, m, k]` and `R` `[n, k, d]`, as one of rank k."""
        rows = R[0]
        for _ in range(JOINING):
            basis = linalg.orthonormal((Q @ (R @ self._along(rows))).sum(0))
            rows = ((basis.mT @ Q) @ R).sum(0)
        return basis, rows

    def _along(self, R: Tensor) -> Tensor:
        """The rows that are known, a little turned, as columns `[d, k]`."""
        (k, d), tiny = R.shape, torch.finfo(R.dtype).tiny
        elsewhere = self._probe(d, self.width, R.device)[:, :k]
        known = normalize(R.mT, dim=0, eps=tiny)
        return known + ELSEWHERE * normalize(elsewhere, dim=0)

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
    """Of Q and R, fp32."""
    return 4 * sum(sketch_numbers(p, width) for p in projections)


def sketch_numbers(projection: Projection, width: int) -> int:
    """Of Q and R of a layer."""
    d, m = projection.in_features, projection.out_features
    return min(width, m, d) * (m + d)


def sketch_width(rank: int) -> int:
    """Directions that a LoRA of this mean rank asks for: twice that, since layers take unequal
    parts, and some that are not kept."""
    return 2 * rank + OVERSAMPLING
