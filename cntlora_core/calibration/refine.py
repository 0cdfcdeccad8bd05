"""The closed form again and again, a few pictures at a time (derived here, docs/method.md).

A sweep solves for the update that the loss asks for at the base model. One batch later the answer
differs a little: so each further batch is measured with the LoRA attached, its moments join the
sweep's, and both factors take a natural-gradient step in the metric that all batches so far make
up.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from ..data.batches import Batch
from ..distributed import Group
from ..events import Observer, Progress
from ..lora.adapter import Factors, LoRA, attached_lora
from ..lora.averaging import RunningAverage
from ..model.gradient_checkpointing import recomputing_activations
from .closed_form import rescaled, response
from .measure import gradient_scale
from .natural import NaturalGradient, NaturalStart

if TYPE_CHECKING:
    from ..model.loader import StableDiffusion


def refine(
    model: StableDiffusion,
    lora: LoRA,
    start: NaturalStart,
    batches: Iterable[Batch],
    count: int,
    *,
    at_once: int,
    gradient_checkpointing: bool,
    observer: Observer,
    group: Group,
) -> tuple[LoRA, NaturalStart]:
    """`lora` after a natural-gradient step for each of `count` batches, this process's parts of
    them, `at_once` pictures in a pass, averaged over the steps; and what further steps start from.

    Stops where the gradient is not a number. Rows of A leave with unit response, those of the live
    weights at the same scale.
    """
    scale = gradient_scale(model.dtype)
    with (
        attached_lora(model.unet, lora, trainable=True) as adapters,
        recomputing_activations(model.unet, gradient_checkpointing),
    ):
        natural = NaturalGradient(adapters, start, group)
        flat = adapters.flat.detach()
        average = RunningAverage(flat)
        for done, batch in enumerate(batches):
            pictures = len(batch) * group.size
            for part in batch.split(at_once):
                copies = part.conditioning.copies
                with natural.recording(model, pictures, scale, copies), torch.enable_grad():
                    (part.loss(model).sum() * (scale / pictures)).backward()
            gradient = adapters.gradient(scale)
            group.sum_([gradient])
            if not torch.isfinite(gradient.norm()):
                break
            natural.step()
            natural.zero_grad()
            average.add(flat)
            observer(Progress("refining", done + 1, count))
        live = adapters.factors()
        flat.copy_(average.value)
        mean = adapters.factors()
    reached = natural.reached()
    scales = {p.name: response(mean[p.name].down, reached.moments.C(p)) for p in start.projections}
    unit, live = (
        {k: Factors(*rescaled(f.up, f.down, scales[k])) for k, f in lora.items()}
        for lora in (mean, live)
    )
    return unit, replace(reached, live=live)
