"""The closed form again and again, a batch at a time: natural-gradient steps on a LoRA's factors
(derived here, docs/method.md).

A sweep solves for the update that the loss asks for at the base model. One batch later the answer
differs a little: so each further batch is measured with the LoRA attached, its moments join the
sweep's, and both factors take a step in the metric that all batches so far make up. No optimiser
state, no learning rate: the step is the sweep's, shrinking with the number of batches.

The moments of the very batch belong into the metric. Without them the first steps run off along
directions that the base model's gradients had hardly any of; with them no step can be long where
the gradient is new.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..data.batches import Batch
from ..distributed import Group
from ..events import Observer, Progress
from ..lora.adapter import Adapters, Factors, LoRA, attached_lora
from ..lora.targets import Projection
from ..model.gradient_checkpointing import recomputing_activations
from .closed_form import cholesky, damped, natural_step, unit_response
from .constraints import Metric
from .measure import gradient_scale
from .moments import ON_DEVICE, Moments, moment_bytes, record

if TYPE_CHECKING:
    from ..model.loader import StableDiffusion

# Share of the sweep's step that a batch takes, and the batches after which it has shrunk by the
# square root of 2. Shares of 0.15 to 0.5 were within the noise of each other over six subjects;
# from 0.8 on some overshoot.
STEP_SHARE = 0.4
LASTING = 8
# of the running mean over steps that is the result: less noise than the last step's factors
AVERAGING = 0.8


def refine(
    model: StableDiffusion,
    projections: Sequence[Projection],
    lora: LoRA,
    moments: Moments,
    metric: Metric,
    step: float,
    batches: Iterable[Batch],
    count: int,
    *,
    gradient_checkpointing: bool,
    observer: Observer,
    group: Group,
) -> LoRA:
    """`lora` after a natural-gradient step for each of `count` batches, this process's parts of
    them.

    `moments` are the sweep's, and may take in those of the batches; `step` is the sweep's step
    size. Stops where loss or gradient are not numbers. Rows of A leave with unit response.
    """
    storage = model.device if moment_bytes(projections) <= ON_DEVICE else torch.device("cpu")
    moments = moments.on(storage)
    with (
        attached_lora(model.unet, lora, trainable=True) as adapters,
        recomputing_activations(model.unet, gradient_checkpointing),
    ):
        average = [p.detach().clone() for p in adapters.parameters()]
        for done, batch in enumerate(batches):
            finite = _measure(model, projections, adapters, moments, batch, storage, group)
            if not finite:
                break
            share = STEP_SHARE * step / (1 + done / LASTING) ** 0.5
            _step(projections, adapters, moments, metric, share)
            keep = min(AVERAGING, (1 + done) / (4 + done))  # the first steps are soon forgotten
            torch._foreach_lerp_(average, [p.detach() for p in adapters.parameters()], 1 - keep)
            observer(Progress("refining", done + 1, count))
        with torch.no_grad():
            torch._foreach_copy_([p.detach() for p in adapters.parameters()], average)
        refined = adapters.factors()
    return {
        p.name: Factors(
            *unit_response(refined[p.name].up, refined[p.name].down, moments.C(p).cpu())
        )
        for p in projections
    }


def _measure(
    model: StableDiffusion,
    projections: Sequence[Projection],
    adapters: Adapters,
    moments: Moments,
    batch: Batch,
    storage: torch.device,
    group: Group,
) -> bool:
    """Leave the batch's gradients in the adapters, per token, and its moments in `moments`; False
    when they are not numbers."""
    parameters = adapters.parameters()
    for parameter in parameters:
        parameter.grad = None
    scale = gradient_scale(model.dtype)
    recording = record(
        model.unet, projections, backward=True, cross=False, storage=storage, loss_scale=scale
    )
    with recording as seen, torch.enable_grad():
        losses = batch.loss(model)
        (losses.sum() * scale).backward()
    total, gradients = losses.detach().sum()[None], _gradients(parameters)
    group.sum_([total, *gradients])
    seen.combine(group)
    if not torch.isfinite(total + torch.stack(torch._foreach_norm(gradients)).sum()):
        return False
    for p in projections:
        layer = adapters.layers[p.name]
        torch._foreach_div_(_gradients([layer.up, layer.down]), seen.tokens(p) * scale)
    moments.merge(seen)
    return True


def _gradients(parameters: Iterable[Tensor]) -> list[Tensor]:
    return [p.grad for p in parameters if p.grad is not None]


@torch.no_grad()
def _step(
    projections: Sequence[Projection],
    adapters: Adapters,
    moments: Moments,
    metric: Metric,
    share: float,
) -> None:
    held = ""
    for p in sorted(
        projections, key=lambda p: p.input_key
    ):  # those that read the same input share its K
        up, down = adapters.layers[p.name].up, adapters.layers[p.name].down
        if up.grad is None or down.grad is None:  # nothing of the loss passes through this layer
            continue
        if p.input_key != held:
            held, K = p.input_key, metric.K(p, moments, up)
            L = cholesky(K)
        P = damped(moments.S(p).to(up), metric.rho)
        step_up, step_down = natural_step(up, down, up.grad, down.grad, P, K, L)
        up.sub_(share * step_up)
        down.sub_(share * step_down)
