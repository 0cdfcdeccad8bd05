"""The DreamBooth loop: one flat recipe, readable top to bottom."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch

from ..calibration.preservation import Preservation
from ..config import TrainConfig
from ..data.batches import Batch, batch_order, draw_batch
from ..distributed import ALONE, Group
from ..errors import NonFiniteError
from ..events import Notice, Observer, Step, Validation, ignore
from .prior_loss import PriorLoss
from .state import TrainState

if TYPE_CHECKING:
    from ..data.dataset import EncodedImages
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
    the last good weights.
    """
    size = config.batch_size * config.accumulation * group.size  # pictures a step
    start = torch.Generator().manual_seed(
        config.seed
    )  # the order is drawn before all else, also in a resumed run
    order = batch_order(subject, size, config.steps, start)
    if prior:
        prior.prepare(size, config.steps, start)
    if state.step == 0:
        state.generator.set_state(start.get_state())

    def check() -> None:
        step = state.step
        if (
            validate
            and config.validate_every
            and (step % config.validate_every == 0 or step == config.steps)
        ):
            state.validated(validate())
            observer(Validation(*state.validations[-1]))

    def stop(what: str) -> NonFiniteError:
        state.back_to_good()
        return NonFiniteError(
            f"The {what} became NaN or infinite at step {state.step + 1}; the weights before it "
            f"are kept. Lower the learning rate (it was {config.learning_rate:g}) or use precision "
            "bf16 or fp32.",
            state.step + 1,
        )

    if not state.validations:
        check()
        save(state)
    while state.step < config.steps:
        batch = _draw(subject, order[state.step], config, len(model.schedule), state.generator)
        others = (
            prior.draw(state.step + 1, batch, len(model.schedule), state.generator)
            if prior
            else None
        )
        lr = config.lr_at(state.step + 1)
        for settings in state.optimizer.param_groups:
            settings["lr"] = lr
        value = torch.zeros(1, device=model.device)
        for part in range(group.rank * config.batch_size, size, group.size * config.batch_size):
            rows = slice(part, part + config.batch_size)
            share = config.batch_size / size
            losses = batch[rows].loss(model)
            if config.min_snr_gamma:
                losses = losses * model.schedule.min_snr_weight(
                    batch[rows].timesteps, config.min_snr_gamma
                )
            loss = losses.mean() * share
            state.scaler.scale(loss).backward()
            value += loss.detach()
            if prior and others and config.prior_weight:
                kept = (
                    prior.loss(model, state.adapters, others[rows]).mean()
                    * share
                    * config.prior_weight
                )
                state.scaler.scale(kept).backward()
        if preservation:
            state.scaler.scale(preservation.loss(state.adapters) / group.size).backward()
        group.sum_([value, state.gather_gradient()])
        if not torch.isfinite(value):
            raise stop("loss")
        state.keep_good()
        state.scaler.unscale_(state.optimizer)
        norm = torch.nn.utils.clip_grad_norm_(state.flat, config.max_grad_norm)
        if not (
            torch.isfinite(norm) or state.scaler.is_enabled()
        ):  # the scaler skips such a step and lowers its scale
            raise stop("gradient")
        state.scaler.step(state.optimizer)
        state.scaler.update()
        state.optimizer.zero_grad(set_to_none=True)
        state.step += 1
        state.losses.append(value.item())
        check()
        save(state)
        observer(Step(state.step, state.losses[-1], state.effective_rate(lr)))
        if config.patience and state.since_best() >= config.patience:
            observer(
                Notice(
                    f"Stopped at step {state.step}: {config.patience} validations without a better "
                    "one."
                )
            )
            break


def _draw(
    subject: EncodedImages,
    index: torch.Tensor,
    config: TrainConfig,
    timesteps: int,
    generator: torch.Generator,
) -> Batch:
    """The step's batch, with the draws that some settings add."""
    batch = draw_batch(subject, index, timesteps, generator)
    noise, words = batch.noise, batch.conditioning
    if config.noise_offset:
        shift = torch.randn(*noise.shape[:2], 1, 1, generator=generator).to(noise.device)
        noise = noise + config.noise_offset * shift
    if config.caption_dropout:
        words = words.replaced(
            torch.rand(len(index), generator=generator) < config.caption_dropout,
            subject.empty_prompt,
        )
    return Batch(batch.latents, batch.timesteps, noise, words, batch.mask)
