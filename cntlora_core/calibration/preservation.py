"""Preservation through training: what calibration spares, training goes on to spare (derived here,
docs/method.md).

Calibration weighs a change D of a layer by lambda C_p in its metric. Training knows nothing of
metrics; it gets the same term as a second loss.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..lora.adapter import Adapters
from ..lora.targets import Projection
from .constraints import Metric
from .moments import Moments
from .second_moment import SecondMoment, moved

# Of calibration's lambda. Over three subjects and 60 steps a sixteenth halved what AdamW forgot for
# 0.00 to 0.02 of the loss; a quarter removed two thirds of it, but held back a subject that had
# more to learn.
PRESERVATION_SHARE = 1 / 16


@dataclass(frozen=True)
class Preservation:
    """The quadratic 1/2 sum over layers of tr(diag(w) D C_p D^T), D = B A, in units of the loss.

    By projection: `outputs` holds w `[m]`, `inputs` C_p, one for projections that read the same
    input.
    """

    outputs: Mapping[str, Tensor]
    inputs: Mapping[str, SecondMoment]

    def on(self, device: torch.device) -> Preservation:
        """On `device`; calibration leaves it on the host, where it may wait for its training."""
        shared = {id(C): moved(C, device) for C in self.inputs.values()}
        outputs = {name: w.to(device) for name, w in self.outputs.items()}
        return Preservation(outputs, {name: shared[id(C)] for name, C in self.inputs.items()})

    def loss(self, adapters: Adapters) -> Tensor:
        """Of the adapters as they are, a scalar. Costs products with C_p, none with the model."""
        terms = []
        for name, own in adapters.split(adapters.flat).items():
            w, C = self.outputs[name], self.inputs[name]
            up, down = own.up, own.down
            terms.append((up.T @ (w[:, None] * up) * (down @ C.matmul(down.T))).sum())
        return torch.stack(terms).sum() / 2


def preserve(
    projections: Sequence[Projection],
    metric: Metric,
    subject: Moments,
    *,
    step: float,
    pictures: int,
) -> Preservation | None:
    """From what calibration measured on the prior, if it did, and, with gradients, on `pictures` of
    the subject.

    The sweep's quadratic model of the mean loss along its own update, <G, D> + 1/(2 step)
    tr(S D K D^T) for each token, has its minimum at `step`; its term of C_p, with the diagonal of
    the metric's P for S and its weight for lambda, is what training keeps small.
    """
    if not metric.prior:
        return None
    outputs, inputs = {}, {}
    for p in projections:
        curvature = metric.P(p, subject).diagonal()
        passed = subject.passed(p) / pictures
        outputs[p.name] = PRESERVATION_SHARE * metric.weight * passed / step * curvature
        inputs[p.name] = metric.prior.C(p)
    return Preservation(outputs, inputs).on(torch.device("cpu"))
