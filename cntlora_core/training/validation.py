"""The loss that says how a run goes."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from ..data.batches import fixed_noised, mean_loss
from ..data.encoded import EncodedImages
from ..distributed import ALONE, Group

if TYPE_CHECKING:
    from ..model.loader import StableDiffusion


def validation_loss(
    model: StableDiffusion,
    subject: EncodedImages,
    batch_size: int,
    group: Group = ALONE,
    before_each: Callable[[], None] = lambda: None,
) -> Callable[[], float]:
    """The loss on the subject's pictures at fixed timesteps and noise, of the model as it stands
    when called. `before_each` pass may raise to stop: of many pictures it takes minutes."""
    triples = fixed_noised(subject, len(model.schedule))
    return lambda: mean_loss(model, triples, batch_size, group, before_each)
