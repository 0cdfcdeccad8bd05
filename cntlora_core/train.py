"""The DreamBooth loop: one flat recipe, readable top to bottom."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from .config import TrainConfig
from .diffusion import denoising_loss
from .errors import NonFiniteError
from .events import Observer, Step, Validation, ignore
from .lora import Adapters
from .schedule import stratified_timesteps
from .triples import shuffled_cycle

if TYPE_CHECKING:
    from .checkpoint import StableDiffusion
    from .subject import Subject


@dataclass(frozen=True)
class TrainResult:
    """Loss of every step, and of every validation as (step, loss)."""

    losses: list[float]
    validations: list[tuple[int, float]]


def train(
    model: StableDiffusion,
    subject: Subject,
    adapters: Adapters,
    config: TrainConfig,
    *,
    validate: Callable[[], float] | None = None,
    observer: Observer = ignore,
) -> TrainResult:
    """Train the attached `adapters` in place with AdamW; the base model is frozen.

    An exception from `observer` (a host's Cancel) leaves at once with the adapters as trained so far. Raises
    NonFiniteError when loss or gradient stop being numbers; the adapters then hold the last good weights.
    """
    generator = torch.Generator().manual_seed(config.seed)
    parameters = adapters.parameters()
    optimizer = torch.optim.AdamW(parameters, lr=config.lr, weight_decay=config.weight_decay, foreach=True)
    # fp16 gradients underflow without a moving loss scale; in other precisions this does nothing.
    scaler = torch.amp.GradScaler(model.device.type, enabled=model.dtype == torch.float16)
    order = shuffled_cycle(max(1, config.steps) * config.batch_size, len(subject), generator)
    good = [p.detach().clone() for p in parameters]
    result = TrainResult([], [])

    def check(step: int) -> None:
        if validate and config.validate_every and (step % config.validate_every == 0 or step == config.steps):
            result.validations.append((step, validate()))
            observer(Validation(*result.validations[-1]))

    def stop(step: int, what: str) -> NonFiniteError:
        with torch.no_grad():
            torch._foreach_copy_([p.detach() for p in parameters], good)
        return NonFiniteError(
            f"The {what} became NaN or infinite at step {step}; the weights before it are kept. "
            f"Lower the learning rate (it was {config.lr:g}) or use precision bf16 or fp32.",
            step,
        )

    check(0)
    for step in range(1, config.steps + 1):
        index = order[(step - 1) * config.batch_size : step * config.batch_size]
        latents = subject.sample_latents(index, generator)
        t = stratified_timesteps(len(index), len(model.schedule), generator).to(latents.device)
        noise = torch.randn(latents.shape, generator=generator).to(latents.device)
        loss = denoising_loss(model, latents, t, noise, subject.conditioning[index]).mean()
        value = loss.item()
        if not torch.isfinite(loss):
            raise stop(step, "loss")
        torch._foreach_copy_(good, [p.detach() for p in parameters])
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        norm = torch.nn.utils.clip_grad_norm_(parameters, config.max_grad_norm)
        if not (torch.isfinite(norm) or scaler.is_enabled()):  # the scaler skips such a step and lowers its scale
            raise stop(step, "gradient")
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
        result.losses.append(value)
        observer(Step(step, value, config.lr))
        check(step)
    return result
