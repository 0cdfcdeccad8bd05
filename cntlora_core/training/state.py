"""Everything a training needs to go on from where it stands."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..config import TrainConfig
from ..errors import SettingError
from ..lora.adapter import Adapters, LoRA
from .optimizers import optional_optimizer

if TYPE_CHECKING:
    from ..model.loader import StableDiffusion

FUSED = ("cpu", "cuda", "mps")  # devices for which torch has AdamW in one kernel


@dataclass(frozen=True)
class Best:
    """The weights of the lowest validation loss so far, after `step` steps."""

    step: int
    loss: float
    lora: LoRA


@dataclass
class TrainState:
    """`step` steps are done: `losses` of each, `validations` as (step, loss), the best of them, the
    weights before the last step (`good`), and what the next step depends on. `flat` holds all
    weights of the adapters, one after another."""

    adapters: Adapters
    flat: nn.Parameter
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    generator: torch.Generator
    good: Tensor
    step: int = 0
    losses: list[float] = field(default_factory=list)
    validations: list[tuple[int, float]] = field(default_factory=list)
    best: Best | None = None

    def validated(self, loss: float) -> None:
        """Note a validation at this step, and keep the weights when they are the best."""
        self.validations.append((self.step, loss))
        if math.isfinite(loss) and (self.best is None or loss < self.best.loss):
            self.best = Best(self.step, loss, self.adapters.factors())

    @property
    def judged(self) -> bool:
        """Whether a validation has seen what was trained: only then a best one means something."""
        return any(step for step, _ in self.validations)

    def effective_rate(self, lr: float) -> float:
        """What the optimiser makes of the learning rate: Prodigy multiplies it by its estimate."""
        return float(lr * self.optimizer.param_groups[0].get("d", 1.0))

    def since_best(self) -> int:
        """Validations without a better one."""
        return sum(step > self.best.step for step, _ in self.validations) if self.best else 0

    def gather_gradient(self) -> Tensor:
        """The adapters' gradients become that of `flat`."""
        parameters = self.adapters.parameters()
        self.flat.grad = torch.cat(
            [(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in parameters]
        )
        for parameter in parameters:
            parameter.grad = None
        return self.flat.grad

    def keep_good(self) -> None:
        self.good.copy_(self.flat.detach())

    def back_to_good(self) -> None:
        self.flat.detach().copy_(self.good)

    def weights(self, config: TrainConfig) -> tuple[LoRA, int]:
        """What the run is worth: the best weights or the last, and the step they are of."""
        if config.keep_best and self.best is not None:
            return self.best.lora, self.best.step
        return self.adapters.factors(), self.step


def start_state(model: StableDiffusion, adapters: Adapters, config: TrainConfig) -> TrainState:
    """Before the first step. Raises SettingError when an optional optimiser is not installed, and
    for a setting that is still auto (`defaults.resolve` gives it a number)."""
    for name in ("steps", "learning_rate"):
        if not getattr(config, name):
            raise SettingError(f"{name} is auto: training needs a number, from defaults.resolve.")
    flat = _flattened(adapters.parameters())
    return TrainState(
        adapters,
        flat,
        _optimizer([flat], config),
        # fp16 gradients underflow without a moving loss scale; in other precisions this does
        # nothing.
        torch.amp.GradScaler(model.device.type, enabled=model.dtype == torch.float16),
        torch.Generator().manual_seed(config.seed),
        flat.detach().clone(),
    )


def _flattened(parameters: Sequence[nn.Parameter]) -> nn.Parameter:
    """One parameter of which the given ones become parts: an optimiser's step, a norm, a copy are
    one call each, not hundreds."""
    flat = torch.cat([p.detach().flatten() for p in parameters])
    for parameter, part in zip(
        parameters, flat.split([p.numel() for p in parameters]), strict=True
    ):
        parameter.data = part.view_as(parameter)
    return nn.Parameter(flat)


def _optimizer(parameters: list[Any], config: TrainConfig) -> torch.optim.Optimizer:
    if config.optimizer == "adamw":
        fused = all(p.device.type in FUSED for p in parameters)
        return torch.optim.AdamW(
            parameters, lr=config.learning_rate, weight_decay=config.weight_decay, fused=fused
        )
    optimizer: torch.optim.Optimizer = optional_optimizer(config.optimizer)(
        parameters, lr=config.learning_rate, weight_decay=config.weight_decay
    )
    return optimizer
