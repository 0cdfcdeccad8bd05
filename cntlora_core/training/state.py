"""Everything a training needs to go on from where it stands."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..calibration.natural import NaturalGradient, NaturalStart
from ..config import TrainConfig
from ..data.importance import Importance
from ..devices import finer_precision
from ..distributed import ALONE, Group
from ..errors import SettingError
from ..lora.adapter import Adapters, LoRA
from ..lora.averaging import RunningAverage
from .loss_scale import LossScale
from .optimizers import optional_optimizer
from .strength import Strength

if TYPE_CHECKING:
    from ..model.loader import StableDiffusion

FUSED = ("cpu", "cuda", "mps")  # devices for which torch has AdamW in one kernel
# Of a few hundred steps 0.999 would not know the last hundred; 0.99 was better on every subject.
ADAM_BETAS = (0.9, 0.99)


@dataclass(frozen=True)
class Kept:
    """Weights after `step` steps, at the `strength` that the validations spoke for, and their
    validation `loss` (NaN without one)."""

    step: int
    lora: LoRA
    strength: float
    loss: float = math.nan


@dataclass
class TrainState:
    """`step` steps are done: `losses` of each, `validations` as (step, loss), the best of them, and
    what the next step depends on. `flat` holds all weights of the adapters, one after another:
    their `average` over the steps at the `strength` that the validations speak for (None: whole),
    but while a step is made, which starts from the `live` ones. `importance`: where in the schedule
    to draw (None: everywhere alike)."""

    adapters: Adapters
    optimizer: torch.optim.Optimizer
    scaler: LossScale
    generator: torch.Generator
    live: Tensor
    average: RunningAverage
    step: int = 0
    losses: list[float] = field(default_factory=list)
    validations: list[tuple[int, float]] = field(default_factory=list)
    best: Kept | None = None
    importance: Importance | None = None
    strength: Strength | None = None
    drawn: Tensor | None = None  # the generator's state after the last step of this process
    rate: float = 0.0  # of the last step
    looked: int = -1  # the last step after which all was checked, saved and told
    validating: bool = False  # the validation of this step was begun and has not ended

    @property
    def flat(self) -> nn.Parameter:
        return self.adapters.flat

    def validate(self, loss: Callable[[], float]) -> None:
        """Note a validation at this step, and keep the weights when they are the best. Where `loss`
        raises, none was made."""
        self.validating = True

        def at(strength: float) -> float:
            self._give_out(strength)
            return loss()

        strength, found = self.strength.learn(at) if self.strength else (1.0, loss())
        self.validations.append((self.step, found))
        if math.isfinite(found) and (self.best is None or found < self.best.loss):
            self._give_out(strength)
            self.best = Kept(self.step, self.adapters.factors(), strength, found)
        self.give_out()
        self.validating = False

    def give_out(self) -> None:
        """Between steps everybody sees the running mean, at its strength."""
        self._give_out(self._strength)

    @property
    def _strength(self) -> float:
        return self.strength.value if self.strength else 1.0

    def _give_out(self, strength: float) -> None:
        self.flat.detach().copy_(self.average.value)
        if strength != 1:
            torch._foreach_mul_([own.up for own in self.adapters.weights.values()], strength)

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
        """The adapters' gradients become that of `flat`, as if the loss had not been scaled."""
        return self.adapters.gradient(self.scaler.value)

    @property
    def natural(self) -> NaturalGradient | None:
        return self.optimizer if isinstance(self.optimizer, NaturalGradient) else None

    @contextmanager
    def recording(
        self, model: StableDiffusion, pictures: int, copies: Tensor | None = None
    ) -> Iterator[None]:
        """Around a pass of the subject, whose loss is a mean over so many `pictures`; `copies` are
        its conditioning's."""
        if self.natural is None:
            yield
            return
        with self.natural.recording(model, pictures, self.scaler.value, copies):
            yield

    def failure(self, wrong: str, lr: float, dtype: torch.dtype) -> str:
        """What to say, and to try, when the next step of a model of this `dtype` gives no
        numbers."""
        text = f"The {wrong} became NaN or infinite at step {self.step + 1}"
        finer = [f"use {precision}" for precision in finer_precision(dtype)]
        if not self.step:  # no step has changed anything: it is none's fault
            text += ": nothing was trained"
            ways = [*finer, "use another checkpoint, VAE or LoRA to go on from"]
        else:
            text += "; what was learnt before it is kept"
            rate = f"lower the learning rate (it was {self.effective_rate(lr):g})"
            ways = [*finer, "use optimizer adamw"] if self.natural else [rate, *finer]
        said = ", or ".join(ways)
        return f"{text}. {said[0].upper()}{said[1:]}."

    def begin_step(self) -> None:
        """Back to the weights that are trained."""
        self.flat.detach().copy_(self.live)
        self._turn("train")
        if self.natural:
            self.natural.forget()

    def optimise(self, lr: float, *, finite: bool) -> None:
        """A step along the gradient, which is left out where that is not `finite`; both ways the
        gradient is gone."""
        self.rate = lr
        if finite:
            if not self.natural:
                for settings in self.optimizer.param_groups:
                    settings["lr"] = lr
            self.optimizer.step()
        self.scaler.update(finite)
        self.optimizer.zero_grad(set_to_none=True)

    def end_step(self) -> None:
        """The step counts."""
        self._turn("eval")
        self.live.copy_(self.flat.detach())
        self.average.add(self.live)
        self.give_out()
        self.step += 1
        self.drawn = self.generator.get_state()

    def _turn(self, mode: str) -> None:
        """A schedule-free optimiser steps at other weights than those that it gives out."""
        getattr(self.optimizer, mode, lambda: None)()

    def abandon_step(self) -> None:
        """As before it, or as it is between two."""
        self._turn("eval")
        self.give_out()

    def again(self) -> None:
        """As it was between the steps, for the next to be made anew."""
        self.abandon_step()
        self.optimizer.zero_grad(set_to_none=True)
        if self.drawn is not None:
            self.generator.set_state(self.drawn)

    def worth(self, best: bool) -> Kept:
        """What the run is worth: the best weights or the last."""
        if best and self.best is not None:
            return self.best
        return Kept(self.step, self.adapters.factors(), self._strength)


def start_state(
    model: StableDiffusion,
    adapters: Adapters,
    config: TrainConfig,
    natural: NaturalStart | None = None,
    importance: Importance | None = None,
    group: Group = ALONE,
) -> TrainState:
    """Before the first step. `natural`: the metric that natural-gradient steps go on in; the
    optimiser is another without. Raises SettingError when an optional optimiser is not installed,
    and for a setting that is still auto (`defaults.resolve` gives it a number)."""
    for name in ("steps", "learning_rate"):
        if not getattr(config, name):
            raise SettingError(f"{name} is auto: training needs a number, from defaults.resolve.")
    flat = adapters.flat
    optimizer = NaturalGradient(adapters, natural, group) if natural else _optimizer([flat], config)
    live, average = flat.detach().clone(), RunningAverage(flat.detach(), config.averaging)
    if natural and natural.live:
        live.copy_(adapters.flat_of(natural.live))
        average.count = natural.made
    return TrainState(
        adapters,
        optimizer,
        LossScale.start(moving=model.dtype == torch.float16),
        torch.Generator().manual_seed(config.seed),
        live,
        average,
        importance=importance,
    )


def _optimizer(parameters: list[Any], config: TrainConfig) -> torch.optim.Optimizer:
    if config.optimizer in ("auto", "natural", "adamw"):
        fused = all(p.device.type in FUSED for p in parameters)
        return torch.optim.AdamW(
            parameters,
            lr=config.learning_rate,
            betas=ADAM_BETAS,
            weight_decay=config.weight_decay,
            fused=fused,
        )
    optimizer: torch.optim.Optimizer = optional_optimizer(config.optimizer)(
        parameters, lr=config.learning_rate, weight_decay=config.weight_decay
    )
    return optimizer
