"""Natural-gradient steps on the factors of an attached LoRA (derived here, docs/method.md).

No moments of gradients over time and no learning rate: the metric is the second moments of what
came in and went out, the length is the sweep's own step, shrinking with the number of steps.

The moments of the very batch belong into the metric. Without them the first steps run off along
directions that the base model's gradients had hardly any of; with them no step can be long where
the gradient is new. Later the factors of a metric are kept for some steps, and each factor's step
is held to its usual natural length instead.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..distributed import ALONE, Group
from ..lora.adapter import Adapters
from ..lora.targets import Projection
from .closed_form import cholesky, damped, factor_steps
from .constraints import Metric
from .moments import ON_DEVICE, Moments, moment_bytes, record

if TYPE_CHECKING:
    from ..model.loader import StableDiffusion

# Of the sweep's step that a batch takes, and the steps after which it has shrunk by the square root
# of 2. With batches of 2 a share of 0.4 was best or level on six subjects; from 0.8 on some
# overshoot.
STEP_SHARE = 0.4
LASTING = 16
FRESH = 8  # first steps, each of which factorises its metric anew
REFRESH = 8  # steps that the factors of a metric are kept after those
LENGTH_MEMORY = 0.9  # of the running mean of a factor's natural length
LENGTH_GROWTH = 1.5  # a kept metric lets a step's length raise that mean by so much at most


@dataclass(frozen=True)
class NaturalStart:
    """What calibration hands to the steps that follow: the `projections` that have an adapter, the
    `metric` of all `moments` so far, the sweep's `step` size, and how many steps were `made`."""

    projections: Sequence[Projection]
    metric: Metric
    moments: Moments
    step: float
    made: int = 0


@dataclass(frozen=True)
class _Factored:
    """A projection's metric, factorised: K = L L^T of the input, P = M M^T of the output."""

    K: Tensor
    L: Tensor
    P: Tensor
    M: Tensor


class NaturalGradient(torch.optim.Optimizer):
    """Steps on the adapters whose weights lie in `flat`, in the shape of torch's optimisers.

    Its state is the metric: the moments that it was last factorised from, and those that came in
    since. Each step wants the passes of its batch made inside `recording`.
    """

    def __init__(
        self,
        flat: nn.Parameter,
        adapters: Adapters,
        start: NaturalStart,
        device: torch.device,
        group: Group = ALONE,
    ) -> None:
        super().__init__([flat], {"step": start.step, "made": start.made})
        self.flat, self.adapters, self.projections = flat, adapters, start.projections
        self.metric, self.group = start.metric, group
        self.storage = (
            device if moment_bytes(start.projections) <= ON_DEVICE else torch.device("cpu")
        )
        self.moments = start.moments.on(self.storage)
        self.since = Moments()
        self.seen, self.pictures = Moments(), 1
        self.lengths: dict[str, Tensor] = {}
        self.factored: dict[str, _Factored] = {}

    @property
    def share(self) -> float:
        """Of the natural direction that the next step takes."""
        (settings,) = self.param_groups
        share: float = STEP_SHARE * settings["step"] / (1 + settings["made"] / LASTING) ** 0.5
        return share

    @contextmanager
    def recording(
        self, model: StableDiffusion, pictures: int, scale: float = 1.0
    ) -> Iterator[None]:
        """Around the passes of a batch, whose loss is `scale` times a mean over `pictures`, those
        of all processes."""
        self.pictures = pictures
        with record(
            model.unet,
            self.projections,
            backward=True,
            cross=False,
            storage=self.storage,
            loss_scale=scale / pictures,
        ) as seen:
            yield
        self.seen.merge(seen)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """One step along the gradient of `flat`, that of a mean over the recorded pictures."""
        (settings,) = self.param_groups
        seen, self.seen = self.seen, Moments()
        seen.combine(self.group)
        self.since.merge(seen)
        fresh = settings["made"] < FRESH or settings["made"] % REFRESH == 0
        if fresh or not self.factored:
            self._factorise(merge=fresh)
        for p, up, down, grad_up, grad_down in self._layers():
            tokens = seen.grads.get(p.name)
            if tokens is None:  # nothing of the loss passes this layer
                continue
            rows = tokens.count / self.pictures  # of a picture
            grads = grad_up / rows, grad_down / rows
            f = self.factored[p.name]
            steps = factor_steps(up, down, *grads, f.P, f.K, f.M, f.L)
            for half, factor, grad, direction in zip("BA", (up, down), grads, steps, strict=True):
                held = self._held(f"{p.name}.{half}", grad, direction, fresh)
                factor.sub_(self.share * held * direction)
        settings["made"] += 1

    def _layers(self) -> Iterator[tuple[Projection, Tensor, Tensor, Tensor, Tensor]]:
        """Each projection with its factors and their parts of the gradient."""
        assert self.flat.grad is not None
        sizes = [p.numel() for p in self.adapters.parameters()]
        parts = iter(self.flat.grad.split(sizes))
        grads = {name: (next(parts), next(parts)) for name in self.adapters.layers}
        for p in self.projections:
            layer, (down, up) = self.adapters.layers[p.name], grads[p.name]
            yield p, layer.up, layer.down, up.view_as(layer.up), down.view_as(layer.down)

    def _held(self, key: str, grad: Tensor, direction: Tensor, fresh: bool) -> Tensor:
        """What of a direction keeps its natural length near the usual: a metric that is some steps
        old does not know what is new in a gradient, and would let it run."""
        length = (grad * direction).sum().clamp_min(0).sqrt()
        usual = self.lengths.get(key)
        if usual is None:
            self.lengths[key] = length
            return torch.ones_like(length)
        moved = usual.lerp(length, 1 - LENGTH_MEMORY)
        self.lengths[key] = moved if fresh else torch.minimum(moved, LENGTH_GROWTH * usual)
        if fresh:
            return torch.ones_like(length)
        return (usual / length.clamp_min(torch.finfo(length.dtype).tiny)).clamp_max(1.0)

    def _factorise(self, *, merge: bool) -> None:
        if merge:
            self.moments.merge(self.since)
            self.since = Moments()
        read, K, L = "", self.flat.detach()[:0], self.flat.detach()[:0]
        for p in sorted(self.projections, key=lambda p: p.input_key):
            if p.input_key != read:  # those that read the same input share its K
                read, K = p.input_key, self.metric.K(p, self.moments, self.flat)
                L = cholesky(K)
            P = damped(self.moments.S(p).to(self.flat), self.metric.rho)
            self.factored[p.name] = _Factored(K, L, P, cholesky(P))

    def reached(self) -> NaturalStart:
        """What further steps would start from, in all that was seen."""
        (settings,) = self.param_groups
        self.moments.merge(self.since)
        self.since = Moments()
        return NaturalStart(
            self.projections, self.metric, self.moments, settings["step"], settings["made"]
        )

    # --- to a file and back --------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:  # type: ignore[override]
        """As torch's, the tensors under parameter 0."""
        tensors = self.moments.to_tensors("metric.") | self.since.to_tensors("since.")
        tensors |= {f"length.{key}": value for key, value in self.lengths.items()}
        groups = [{k: v for k, v in group.items() if k != "params"} for group in self.param_groups]
        return {"state": {0: tensors}, "param_groups": groups}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Raises KeyError where something is missing."""
        tensors = state_dict["state"][0]
        self.param_groups[0].update(state_dict["param_groups"][0])
        self.moments = Moments.from_tensors(tensors, "metric.").on(self.storage)
        self.since = Moments.from_tensors(tensors, "since.").on(self.storage)
        self.lengths = {
            key.removeprefix("length."): value.to(self.flat.device)
            for key, value in tensors.items()
            if key.startswith("length.")
        }
        self.factored.clear()
