"""Prior preservation: what else a training step should not change (DreamBooth, Ruiz et al. 2023,
section 3.3)."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from ..data.batches import Batch, batch_order, draw_batch
from ..data.importance import Importance
from ..errors import SettingError
from ..lora.adapter import Adapters
from ..model.conditioning import Conditioning
from ..model.denoising_loss import predict

if TYPE_CHECKING:
    from ..data.encoded import EncodedImages
    from ..model.loader import StableDiffusion


class PriorLoss(Protocol):
    """A second loss beside the subject's."""

    def prepare(
        self, size: int, steps: int, generator: torch.Generator, importance: Importance | None
    ) -> None:
        """Called once before training: `steps` steps of `size` pictures will be asked for, at
        timesteps by `importance`."""

    def draw(self, step: int, batch: Batch, timesteps: int, generator: torch.Generator) -> Batch:
        """The prior's batch for a step, as large as the subject's `batch`; the schedule has so many
        timesteps."""

    def loss(self, model: StableDiffusion, adapters: Adapters, batch: Batch) -> Tensor:
        """Of each picture of (a part of) that batch, `[n]`."""


class ClassImages:
    """DreamBooth's own: pictures of the class under the class prompt, denoised as well as
    before."""

    def __init__(self, pictures: EncodedImages) -> None:
        self.pictures = pictures
        self.order: list[Tensor] = []
        self.importance: Importance | None = None

    def prepare(
        self, size: int, steps: int, generator: torch.Generator, importance: Importance | None
    ) -> None:
        self.order = batch_order(self.pictures, size, steps, generator)
        self.importance = importance

    def draw(self, step: int, batch: Batch, timesteps: int, generator: torch.Generator) -> Batch:
        return draw_batch(
            self.pictures, self.order[step - 1], timesteps, generator, self.importance
        )

    def loss(self, model: StableDiffusion, adapters: Adapters, batch: Batch) -> Tensor:
        return batch.loss(model)


class OutsideTheMask:
    """Where a mask hides the picture, the model predicts as before: the background is neither
    learnt nor forgotten. Raises SettingError without masks."""

    def __init__(self, subject: EncodedImages) -> None:
        if subject.masks is None:
            raise SettingError(
                "The prior loss outside the mask needs masks, and there is none that is used: turn "
                "on masked and give the pictures masks."
            )

    def prepare(
        self, size: int, steps: int, generator: torch.Generator, importance: Importance | None
    ) -> None:
        pass

    def draw(self, step: int, batch: Batch, timesteps: int, generator: torch.Generator) -> Batch:
        assert batch.mask is not None
        return replace(batch, mask=1 - batch.mask)

    def loss(self, model: StableDiffusion, adapters: Adapters, batch: Batch) -> Tensor:
        assert batch.mask is not None
        error = _change(model, adapters, batch) * batch.mask
        return batch.weighted(error.mean(dim=(1, 2, 3)))


class BasePrediction:
    """Without any class pictures: under the class prompt, the noised subject is predicted as the
    base model predicts it."""

    def __init__(self, class_prompt: Conditioning) -> None:
        self.class_prompt = class_prompt  # one row

    def prepare(
        self, size: int, steps: int, generator: torch.Generator, importance: Importance | None
    ) -> None:
        pass

    def draw(self, step: int, batch: Batch, timesteps: int, generator: torch.Generator) -> Batch:
        rows = torch.zeros(len(batch), dtype=torch.long)
        words = self.class_prompt[rows]
        if batch.conditioning.time_ids is not None:  # the same size and crop as the picture's
            words = replace(words, time_ids=batch.conditioning.time_ids)
        return replace(batch, conditioning=words, mask=None)

    def loss(self, model: StableDiffusion, adapters: Adapters, batch: Batch) -> Tensor:
        return batch.weighted(_change(model, adapters, batch).mean(dim=(1, 2, 3)))


def _change(model: StableDiffusion, adapters: Adapters, batch: Batch) -> Tensor:
    """The square of what the adapters change in the prediction, `[n, c, h, w]`."""
    arguments = (model, batch.latents, batch.timesteps, batch.noise, batch.conditioning)
    with torch.no_grad(), adapters.bypassed():
        target = predict(*arguments)
    return (predict(*arguments) - target).square()
