"""The DreamBooth loop: one flat recipe, readable top to bottom."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..calibration.preservation import Preservation
from ..config import TrainConfig
from ..data.batches import Batch, batch_order, draw_batch
from ..distributed import ALONE, Group
from ..errors import NonFiniteError
from ..events import Notice, Observer, Step, Validation, ignore
from .learning_rate import lr_at
from .prior_loss import PriorLoss
from .state import TrainState

if TYPE_CHECKING:
    from ..data.encoded import EncodedImages
    from ..model.loader import StableDiffusion


def train(
    model: StableDiffusion,
    subject: EncodedImages,
    state: TrainState,
    config: TrainConfig,
    *,
    prior: PriorLoss | None = None,
    preservation: Preservation | None = None,
    validate: Callable[[], float] | None = None,
    save: Callable[[TrainState], None] = lambda state: None,
    observer: Observer = ignore,
    group: Group = ALONE,
) -> None:
    """Train the attached adapters of `state` in place, from the step it is at; the base model is
    frozen.

    After every step `save` sees the state, then `observer` the events; an exception of either (a
    host's Cancel) leaves at once, with the state as it is after that step. `preservation` adds what
    calibration measured, `prior` a loss on pictures. The processes of `group` share each step's
    batch. Raises NonFiniteError when loss or gradient stop being numbers; the adapters then hold
    the weights before that step.
    """
    order = _order(subject, state, config, prior, group)
    timesteps = len(model.schedule)
    terms = _Terms(model, state, config, prior, preservation, group)

    _look(state, config, validate, save, observer)
    while state.step < config.steps and not _out_of_patience(state, config):
        # draw
        batch = _draw(subject, order[state.step], config, timesteps, state)
        others = prior.draw(state.step + 1, batch, timesteps, state.generator) if prior else None

        # forward and backward
        state.begin_step()
        value = terms.backward(batch, others)
        group.sum_([value, state.gather_gradient()])

        # optimiser step
        lr = state.natural.share if state.natural else lr_at(config, state.step + 1)
        loss, norm = _clip(state, config, value)
        _refuse_no_number(state, loss, norm, lr, model.dtype)
        state.optimise(lr, finite=math.isfinite(norm))
        state.end_step()
        state.losses.append(loss)

        # check, save, report
        _look(state, config, validate, save, observer)
    if state.step < config.steps:
        text = f"{config.patience} validations without a better one"
        observer(Notice(f"Stopped at step {state.step}: {text}."))


def _order(
    subject: EncodedImages,
    state: TrainState,
    config: TrainConfig,
    prior: PriorLoss | None,
    group: Group,
) -> list[Tensor]:
    """Each step's pictures, drawn before all else, also in a resumed run."""
    size = config.batch_size * config.accumulation * group.size  # pictures a step
    start = torch.Generator().manual_seed(config.seed)
    order = batch_order(subject, size, config.steps, start, state.importance)
    if prior:
        prior.prepare(size, config.steps, start, state.importance)
    if state.step == 0:
        state.generator.set_state(start.get_state())
    return order


def _look(
    state: TrainState,
    config: TrainConfig,
    validate: Callable[[], float] | None,
    save: Callable[[TrainState], None],
    observer: Observer,
) -> None:
    """Once after every step, and before the first: the validation, where it is due (every so many
    steps, and after the last), the checkpoint, the step."""
    every, step = config.validate_every, state.step
    if state.looked == step:
        return
    if validate and every and (step % every == 0 or step == config.steps):
        state.validate(validate)
        observer(Validation(*state.validations[-1]))
    save(state)
    if step:
        observer(Step(step, state.losses[-1], state.effective_rate(state.rate)))
    state.looked = step


def _out_of_patience(state: TrainState, config: TrainConfig) -> bool:
    return bool(config.patience) and state.since_best() >= config.patience


@dataclass(frozen=True)
class _Terms:
    """The loss's terms and their backward passes; means over the whole step's pictures."""

    model: StableDiffusion
    state: TrainState
    config: TrainConfig
    prior: PriorLoss | None
    preservation: Preservation | None
    group: Group

    @property
    def pictures(self) -> int:
        return self.config.batch_size * self.config.accumulation * self.group.size

    def backward(self, batch: Batch, others: Batch | None) -> Tensor:
        """Of this process's parts of the batch; the denoising loss `[1]`."""
        value = torch.zeros(1, device=self.model.device)
        size = self.config.batch_size
        for part in range(self.group.rank * size, self.pictures, self.group.size * size):
            rows = slice(part, part + size)
            value += self._subject(batch[rows])
            if self.prior and others and self.config.prior_weight:
                losses = self.prior.loss(self.model, self.state.adapters, others[rows])
                self._backward(losses.sum() / self.pictures * self.config.prior_weight)
        if self.preservation:
            self._backward(self.preservation.loss(self.state.adapters) / self.group.size)
        return value

    def _subject(self, batch: Batch) -> Tensor:
        with self.state.recording(self.model, self.pictures, batch.conditioning.copies):
            losses = batch.loss(self.model)
            if self.config.debiased:
                losses = losses * self.model.schedule.debiased_weight(batch.timesteps)
            elif gamma := self.config.min_snr_gamma:
                losses = losses * self.model.schedule.min_snr_weight(batch.timesteps, gamma)
            return self._backward(losses.sum() / self.pictures)

    def _backward(self, loss: Tensor) -> Tensor:
        (loss * self.state.scaler.value).backward()
        return loss.detach()


def _clip(state: TrainState, config: TrainConfig, value: Tensor) -> tuple[float, float]:
    """The loss, and the length of the gradient before it was cut to the longest allowed: both in
    the one moment of a step at which the host waits for the device."""
    longest = math.inf if state.natural else config.max_grad_norm
    norm = torch.nn.utils.clip_grad_norm_(state.flat, longest)
    loss, length = torch.stack([value.squeeze(0), norm]).cpu().tolist()
    return loss, length


def _refuse_no_number(
    state: TrainState, loss: float, norm: float, lr: float, dtype: torch.dtype
) -> None:
    """Raises NonFiniteError, with the weights as they were before the step. A gradient that
    overflowed under a moving loss scale is none to stop at."""
    if math.isfinite(loss) and (math.isfinite(norm) or state.scaler.can_fall):
        return
    state.abandon_step()
    wrong = "gradient" if math.isfinite(loss) else "loss"
    raise NonFiniteError(state.failure(wrong, lr, dtype), state.step + 1)


def _draw(
    subject: EncodedImages,
    index: torch.Tensor,
    config: TrainConfig,
    timesteps: int,
    state: TrainState,
) -> Batch:
    """The step's batch, with the draws that some settings add."""
    generator = state.generator
    batch = draw_batch(subject, index, timesteps, generator, state.importance, state.step)
    noise, words = batch.noise, batch.conditioning
    if config.noise_offset:
        shift = torch.randn(*noise.shape[:2], 1, 1, generator=generator).to(noise.device)
        noise = noise + config.noise_offset * shift
    if config.ip_noise:
        more = torch.randn(noise.shape, generator=generator).to(noise.device)
        batch = replace(batch, shown_noise=noise + config.ip_noise * more)
    if config.caption_dropout:
        words = words.replaced(
            torch.rand(len(index), generator=generator) < config.caption_dropout,
            subject.empty_prompt,
        )
    return replace(batch, noise=noise, conditioning=words)
