"""Natural-gradient steps on the factors of an attached LoRA (derived here, docs/method.md).

No moments of gradients over time and no learning rate: the metric is the second moments of what
came in and went out, the length is the sweep's own step, shrinking with the number of steps.

The moments of the very batch belong into the metric. Without them the first steps run off along
directions that the base model's gradients had hardly any of; with them no step can be long where
the gradient is new. Later a metric is kept for some steps, and each factor's step is held to the
natural length that was usual in the first ones instead.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import starmap
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..distributed import ALONE, Group
from ..lora.adapter import Adapters, LoRA
from ..lora.targets import Projection
from .closed_form import factor_steps
from .constraints import Metric
from .moments import Moments, alike, shape_of
from .ragged import Ragged, grouped
from .recording import Seen, record
from .second_moment import SecondMoment, split

if TYPE_CHECKING:
    from ..model.loader import StableDiffusion

# Of the sweep's step that a batch takes, and the steps after which it has shrunk by the square root
# of 2 (docs/experiments.md, six subjects).
STEP_SHARE = 0.55
LASTING = 16
FRESH = 8  # first steps, each of which looks on at its passes and brings the metric up to date
REFRESH = 8  # steps that a metric is kept after those
LENGTH_MEMORY = 0.9  # of the running mean of a factor's natural length over the first steps
UNUSUAL = 2.0  # times that usual length: half of what comes above it is held back


@dataclass(frozen=True)
class NaturalStart:
    """What calibration hands to the steps that follow: the `projections` that have an adapter, the
    `metric` of all `moments` so far, the sweep's `step` size, and how many steps were `made`.

    The LoRA is the running mean over those; `live` are the weights that the next one starts from
    (None: the LoRA's). `lengths` and `tokens` are the optimiser's: without the usual lengths the
    steps after a `quick` calibration ended half a percent higher.
    """

    projections: Sequence[Projection]
    metric: Metric
    moments: Moments
    step: float
    made: int = 0
    live: LoRA | None = None
    lengths: Mapping[str, Tensor] = field(default_factory=dict)
    tokens: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class _Metrics:
    """The metrics of g projections of one shape, `K` `[g, d, d]` of inputs and `P` `[g, m, m]` of
    outputs, and their inverses."""

    P: SecondMoment
    K: SecondMoment
    P_inverse: SecondMoment
    K_inverse: SecondMoment


@dataclass(frozen=True)
class _Move:
    """The natural directions of both factors of the `layers`, of all their columns `up` `[m, N]`
    and rows `down` `[N, d]`, and their squared natural lengths `[2, g]`."""

    layers: Ragged
    up: Tensor
    down: Tensor
    squares: Tensor


class NaturalGradient(torch.optim.Optimizer):
    """Steps on the adapters' weights, in the shape of torch's optimisers.

    Its state is the metric: the moments that it was made from. Each step wants the passes of its
    batch made inside `recording`.
    """

    def __init__(self, adapters: Adapters, start: NaturalStart, group: Group = ALONE) -> None:
        super().__init__([adapters.flat], {"step": start.step, "made": start.made})
        self.adapters, self.projections = adapters, start.projections
        device = adapters.flat.device
        self.metric, self.group = start.metric.on(device), group
        self.moments = start.moments.on(device)
        by_rank = sorted(start.projections, key=self._rank)
        self.shapes = [
            (group, [*grouped({p.name: self._rank(p) for p in group}, sum(shape[:2]), device)])
            for shape, group in alike(by_rank, shape_of, most=len(by_rank))
        ]
        self.seen, self.pictures = Seen(), 1
        self.tokens = dict(start.tokens)  # of a picture, by projection
        self.lengths = {key: value.to(device) for key, value in start.lengths.items()}
        self.metrics: list[tuple[Ragged, _Metrics]] = []

    def _rank(self, projection: Projection) -> int:
        return self.adapters.shapes[projection.name][0][0]

    @property
    def share(self) -> float:
        """Of the natural direction that the next step takes."""
        (settings,) = self.param_groups
        share: float = STEP_SHARE * settings["step"] / (1 + settings["made"] / LASTING) ** 0.5
        return share

    @property
    def fresh(self) -> bool:
        """Whether the next step's passes are looked on at, and the metric is brought up to date."""
        (settings,) = self.param_groups
        made: int = settings["made"]
        return made < FRESH or made % REFRESH == 0 or not self.tokens

    @contextmanager
    def recording(
        self, model: StableDiffusion, pictures: int, scale: float = 1.0
    ) -> Iterator[None]:
        """Around the passes of a batch, whose loss is `scale` times a mean over `pictures`, those
        of all processes."""
        self.pictures = pictures
        (settings,) = self.param_groups
        if not self.fresh:
            yield
            return
        with record(
            model.unet,
            self.projections,
            backward=True,
            loss_scale=scale / pictures,
            turn=settings["made"],
        ) as recording:
            yield
        self.seen.extend(recording.take())

    def forget(self) -> None:
        """What a step saw that was not made: its gradient was no number."""
        self.seen = Seen()

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """One step along the gradient of `flat`, that of a mean over the recorded pictures."""
        (settings,) = self.param_groups
        fresh = self.fresh
        if fresh:
            seen, self.seen = self.seen.together(self.group), Seen()
            self.tokens |= {p.name: n / self.pictures for p, n in seen.came_back(self.projections)}
            self.moments.take_in(seen)
        if fresh or not self.metrics:
            self.metrics = [own for shape in self.shapes for own in self._metrics(*shape)]
        grads = self._gradients()
        moves = [self._move(*own, grads) for own in self.metrics]
        keys = [f"{name}.{half}" for m in moves for half in "BA" for name in m.layers.names]
        squares = torch.cat([move.squares.flatten() for move in moves])
        held = self._held(keys, squares.clamp_min(0).sqrt())
        shares = (self.share * held).split([move.squares.numel() for move in moves])
        ups: list[Tensor] = []
        downs: list[Tensor] = []
        for move, share in zip(moves, shares, strict=True):
            layers, (of_up, of_down) = move.layers, share.chunk(2)
            ups += move.up.mul_(of_up[layers.of]).split(layers.ranks, 1)
            downs += move.down.mul_(of_down[layers.of][:, None]).split(layers.ranks)
        own = [self.adapters.weights[name] for move in moves for name in move.layers.names]
        torch._foreach_sub_([factors.up for factors in own], ups)
        torch._foreach_sub_([factors.down for factors in own], downs)
        settings["made"] += 1

    def _gradients(self) -> dict[str, tuple[Tensor, Tensor]]:
        """By projection those of B and A, per token, parts of the flat gradient."""
        assert self.adapters.flat.grad is not None
        found = {
            name: [grads.up, grads.down]
            for name, grads in self.adapters.split(self.adapters.flat.grad).items()
            if name in self.tokens  # else nothing of the loss passes this layer
        }
        tokens = [self.tokens[name] for name in found for _ in range(2)]
        each = iter(torch._foreach_div([part for pair in found.values() for part in pair], tokens))
        return {name: (next(each), next(each)) for name in found}

    def _move(
        self, layers: Ragged, metrics: _Metrics, grads: Mapping[str, tuple[Tensor, Tensor]]
    ) -> _Move:
        own = [self.adapters.weights[name] for name in layers.names]
        of_up, of_down = zip(*(grads[name] for name in layers.names), strict=True)
        up, grad_up = layers.columns([factors.up for factors in own], of_up)
        down, grad_down = layers.rows([factors.down for factors in own], of_down)
        step_up, step_down = factor_steps(
            up, down, grad_up, grad_down,
            metrics.P, metrics.K, metrics.P_inverse, metrics.K_inverse, layers.counts,
        )  # fmt: skip
        squares = (grad_up * step_up).sum((1, 2)), (grad_down * step_down).sum((1, 2))
        steps = layers.every_column(step_up), layers.every_row(step_down)
        return _Move(layers, *steps, torch.stack(squares))

    def _held(self, keys: Sequence[str], lengths: Tensor) -> Tensor:
        """What a step keeps of each direction whose natural length is `lengths` `[g]`: of what is
        new in a gradient the metric knows too little, and would let it run.

        With g g^T in the metric M at the weight 1 / (UNUSUAL usual)^2 the direction is M^-1 g / (1
        + (length / (UNUSUAL usual))^2) (Sherman-Morrison); so much more that the usual stays as it
        is.
        """
        (settings,) = self.param_groups
        found = [self.lengths.setdefault(*pair) for pair in zip(keys, lengths, strict=True)]
        usual = torch.stack(found)
        if settings["made"] < FRESH:
            self.lengths.update(zip(keys, usual.lerp(lengths, 1 - LENGTH_MEMORY), strict=True))
            return torch.ones_like(lengths)
        excess = (lengths / usual.clamp_min(torch.finfo(lengths.dtype).tiny) / UNUSUAL).square()
        return ((1 + UNUSUAL**-2) / (1 + excess)).clamp_max(1.0)

    def _metrics(
        self, projections: Sequence[Projection], groups: Sequence[Ragged]
    ) -> Iterator[tuple[Ragged, _Metrics]]:
        """From the moments as they are, of layers of one shape together."""
        P, K = self.metric.of(projections, self.moments)
        together = P, K, P.inverse(), K.inverse()
        parts = (split(m, [len(layers.names) for layers in groups]) for m in together)
        return zip(groups, starmap(_Metrics, zip(*parts, strict=True)), strict=True)

    def reached(self) -> NaturalStart:
        """What further steps would start from, in all that was seen."""
        (settings,) = self.param_groups
        return NaturalStart(
            self.projections,
            self.metric.on(torch.device("cpu")),
            self.moments.on(torch.device("cpu")),
            settings["step"],
            settings["made"],
            lengths={key: value.cpu() for key, value in self.lengths.items()},
            tokens=dict(self.tokens),
        )

    # --- to a file and back --------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:  # type: ignore[override]
        """As torch's, the tensors under parameter 0."""
        tensors = self.moments.to_tensors("metric.")
        tensors |= {f"length.{key}": value for key, value in self.lengths.items()}
        tensors |= {f"tokens.{key}": torch.tensor(n) for key, n in self.tokens.items()}
        groups = [{k: v for k, v in group.items() if k != "params"} for group in self.param_groups]
        return {"state": {0: tensors}, "param_groups": groups}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Raises KeyError where something is missing."""
        tensors = state_dict["state"][0]
        self.param_groups[0].update(state_dict["param_groups"][0])
        self.moments = Moments.from_tensors(tensors, "metric.", self.adapters.flat.device)
        self.lengths = {
            key.removeprefix("length."): value.to(self.adapters.flat.device)
            for key, value in tensors.items()
            if key.startswith("length.")
        }
        self.tokens = {
            key.removeprefix("tokens."): float(value)
            for key, value in tensors.items()
            if key.startswith("tokens.")
        }
        self.metrics = []
