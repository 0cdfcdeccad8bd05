"""Natural-gradient steps on the factors of an attached LoRA (derived here, docs/method.md).

No moments of gradients over time and no learning rate: the metric is the second moments of what
came in and went out, the length is the sweep's own step, shrinking with the number of steps.

The moments of the very batch belong into the metric. Without them the first steps run off along
directions that the base model's gradients had hardly any of; with them no step can be long where
the gradient is new. Later the factors of a metric are kept for some steps, and each factor's step
is held to its usual natural length instead.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..distributed import ALONE, Group
from ..lora.adapter import Adapters
from ..lora.targets import Projection
from .closed_form import damped, factor_steps, inverse
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
SAMPLED = 4  # of the steps after the first, every so many are recorded: recording costs a third
TOGETHER = 16  # layers of one shape that step at once; SDXL's take 26 MB each meanwhile
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

    @property
    def light(self) -> bool:
        """Whether the metric may be held on the device, factorised, and handed on to training.
        SDXL's may not: it is factorised layer by layer, from moments on the host."""
        return moment_bytes(self.projections) <= ON_DEVICE


@dataclass(frozen=True)
class _Metrics:
    """The metrics of g projections of one shape, `K` `[g, d, d]` of the inputs and `P` `[g, m, m]`
    of the outputs (or their diagonals), and their inverses."""

    names: tuple[str, ...]
    P: Tensor
    K: Tensor
    P_inverse: Tensor
    K_inverse: Tensor


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
        self.light = start.light
        self.storage = device if self.light else torch.device("cpu")
        # Nobody else wants the moments of a metric that is not handed on.
        self.moments = start.moments.on(self.storage, copy=self.light)
        self.groups = _by_shape(start.projections, adapters)
        self.since = Moments()
        self.seen, self.pictures = Moments(), 1
        self.tokens: dict[str, float] = {}  # of a picture, by projection
        self.lengths: dict[str, Tensor] = {}
        self.metrics: list[_Metrics] = []

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
        (settings,) = self.param_groups
        if self.tokens and settings["made"] >= FRESH and settings["made"] % SAMPLED:
            yield
            return
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
        self.tokens |= {name: mean.count / self.pictures for name, mean in seen.grads.items()}
        fresh = not self.light or settings["made"] < FRESH or settings["made"] % REFRESH == 0
        (self.moments if fresh else self.since).merge(seen)
        if fresh:
            self._take_in()
        grads = self._gradients()
        for metrics in self._metrics(fresh):
            self._move(metrics, grads, fresh)
        settings["made"] += 1

    def _take_in(self) -> None:
        """What came in since the last factorisation joins the moments."""
        self.moments.merge(self.since)
        self.since = Moments()

    def _gradients(self) -> dict[str, tuple[Tensor, Tensor]]:
        """By projection those of B and A, per token, parts of `flat.grad`."""
        assert self.flat.grad is not None
        parts = iter(self.flat.grad.split([p.numel() for p in self.adapters.parameters()]))
        found = {}
        for name, layer in self.adapters.layers.items():
            down, up = next(parts).view_as(layer.down), next(parts).view_as(layer.up)
            if name in self.tokens:  # else nothing of the loss passes this layer
                found[name] = up / self.tokens[name], down / self.tokens[name]
        return found

    def _move(
        self, metrics: _Metrics, grads: Mapping[str, tuple[Tensor, Tensor]], fresh: bool
    ) -> None:
        """A step of the projections of one shape."""
        names = metrics.names
        ups = [self.adapters.layers[name].up.detach() for name in names]
        downs = [self.adapters.layers[name].down.detach() for name in names]
        grad_up = torch.stack([grads[name][0] for name in names])
        grad_down = torch.stack([grads[name][1] for name in names])
        step_up, step_down = factor_steps(
            torch.stack(ups), torch.stack(downs), grad_up, grad_down,
            metrics.P, metrics.K, metrics.P_inverse, metrics.K_inverse,
        )  # fmt: skip
        for half, moved, grad, step in (
            ("B", ups, grad_up, step_up),
            ("A", downs, grad_down, step_down),
        ):
            keys = [f"{name}.{half}" for name in names]
            held = self._held(keys, (grad * step).sum((1, 2)).clamp_min(0).sqrt(), fresh)
            torch._foreach_sub_(moved, list(step * (self.share * held)[:, None, None]))

    def _held(self, keys: Sequence[str], lengths: Tensor, fresh: bool) -> Tensor:
        """What of each direction keeps its natural length `[g]` near the usual: a metric that is
        some steps old does not know what is new in a gradient, and would let it run."""
        found = [self.lengths.get(key) for key in keys]
        usual = torch.stack([x if y is None else y for x, y in zip(lengths, found, strict=True)])
        moved = usual.lerp(lengths, 1 - LENGTH_MEMORY)
        if not fresh:
            moved = torch.minimum(moved, LENGTH_GROWTH * usual)
        self.lengths.update(zip(keys, moved, strict=True))
        if fresh:
            return torch.ones_like(lengths)
        return (usual / lengths.clamp_min(torch.finfo(lengths.dtype).tiny)).clamp_max(1.0)

    def _metrics(self, fresh: bool) -> Iterable[_Metrics]:
        """Of all projections, those of one shape together; kept where they are light."""
        if not self.light:
            return (self._factorised(group, {}) for group in self.groups)
        if fresh or not self.metrics:
            inputs: dict[str, tuple[Tensor, Tensor]] = {}
            self.metrics = [self._factorised(group, inputs) for group in self.groups]
        return self.metrics

    def _factorised(
        self, group: Sequence[Projection], inputs: dict[str, tuple[Tensor, Tensor]]
    ) -> _Metrics:
        """From the moments as they are; `inputs` shares K among those that read one input."""
        rows = []
        for p in group:
            if p.input_key not in inputs:
                K = self.metric.K(p, self.moments, self.flat)
                inputs[p.input_key] = K, inverse(K)
            P = damped(self.moments.S(p).to(self.flat), self.metric.rho)
            K, K_inverse = inputs[p.input_key]
            rows.append((P, K, inverse(P), K_inverse))
        parts = (torch.stack(part) for part in zip(*rows, strict=True))
        return _Metrics(tuple(p.name for p in group), *parts)

    def reached(self) -> NaturalStart:
        """What further steps would start from, in all that was seen."""
        (settings,) = self.param_groups
        self._take_in()
        return NaturalStart(
            self.projections, self.metric, self.moments, settings["step"], settings["made"]
        )

    # --- to a file and back --------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:  # type: ignore[override]
        """As torch's, the tensors under parameter 0."""
        tensors = self.moments.to_tensors("metric.") | self.since.to_tensors("since.")
        tensors |= {f"length.{key}": value for key, value in self.lengths.items()}
        tensors |= {f"tokens.{key}": torch.tensor(n) for key, n in self.tokens.items()}
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
        self.tokens = {
            key.removeprefix("tokens."): float(value)
            for key, value in tensors.items()
            if key.startswith("tokens.")
        }
        self.metrics = []


def _by_shape(projections: Sequence[Projection], adapters: Adapters) -> list[list[Projection]]:
    """Projections whose factors and metrics have one shape, `TOGETHER` at most."""
    groups: dict[tuple[object, ...], list[Projection]] = {}
    for p in projections:
        layer = adapters.layers[p.name]
        shape = layer.up.shape, layer.down.shape, p.diagonal_in, p.diagonal_out
        groups.setdefault(shape, []).append(p)
    return [
        group[start : start + TOGETHER]
        for group in groups.values()
        for start in range(0, len(group), TOGETHER)
    ]
