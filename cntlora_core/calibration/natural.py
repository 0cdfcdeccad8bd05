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
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..distributed import ALONE, Group
from ..lora.adapter import Adapters, Factors, LoRA
from ..lora.targets import Projection
from .constraints import Metric
from .moments import Moments
from .natural_step import BothWays, Half, Step, both_ways, natural_steps
from .ragged import Ragged, Together, together
from .recording import input_key, output_key, record
from .seen import Seen

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
    (None: the LoRA's). `lengths` are the optimiser's: without the usual ones the steps after a
    `quick` calibration ended half a percent higher.
    """

    projections: Sequence[Projection]
    metric: Metric
    moments: Moments
    step: float
    made: int = 0
    live: LoRA | None = None
    lengths: Mapping[str, Tensor] = field(default_factory=dict)


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
        ranks = {name: down[0] for name, (down, _) in adapters.shapes.items()}
        self.groups = [*together(start.projections, ranks, device)]
        self.seen = Seen()
        self.lengths = {key: value.to(device) for key, value in start.lengths.items()}
        self.metrics: dict[str, BothWays] = {}  # P and K of layers, by the first's key

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
        return made < FRESH or made % REFRESH == 0

    @contextmanager
    def recording(
        self,
        model: StableDiffusion,
        pictures: int,
        scale: float = 1.0,
        copies: Tensor | None = None,
    ) -> Iterator[None]:
        """Around a pass of a batch, whose loss is `scale` times a mean over `pictures`, those of
        all processes; `copies` are its conditioning's."""
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
            recording.copies = copies
            yield
        self.seen.extend(recording.take())

    def forget(self) -> None:
        """What a step saw that was not made: its gradient was no number."""
        self.seen = Seen()

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """One step along the gradient of `flat`, that of a mean over the recorded pictures."""
        (settings,) = self.param_groups
        if self.fresh:
            self._take_in()
        if not self.metrics:
            self.metrics = self._metrics()
        grads = self._gradients()
        steps = [self._steps(group, grads) for group in self.groups]
        keys = [key for group in self.groups for key in group.factors()]
        squares = [step.squares for halves in steps for half in halves for step in half]
        held = self._held(keys, torch.cat(squares).clamp_min(0).sqrt())
        shares = (self.share * held).split([2 * len(group.to_up) for group in self.groups])
        for group, (ups, downs), share in zip(self.groups, steps, shares, strict=True):
            of_up, of_down = share.chunk(2)
            self._take(group.up, ups, of_up[group.of_up], "B")
            self._take(group.down, downs, of_down[group.of_down], "A")
        settings["made"] += 1

    def _take_in(self) -> None:
        """What was seen, in place of the metric that was made without it."""
        seen, self.seen, self.metrics = self.seen.together(self.group), Seen(), {}
        self.moments.take_in(seen)

    def _take(
        self, layers: Sequence[Ragged], steps: Sequence[Step], shares: Tensor, half: str
    ) -> None:
        """`shares` `[N]` of each row of the steps."""
        rows: list[Tensor] = []
        parts = shares[:, None].split([len(own.of) for own in layers])
        for own, step, share in zip(layers, steps, parts, strict=True):
            rows += own.every_row(step.rows).mul_(share).split(own.ranks)
        names = [name for own in layers for name in own.names]
        torch._foreach_sub_([self._rows(self.adapters.weights[name], half) for name in names], rows)

    def _rows(self, factors: Factors, half: str) -> Tensor:
        return factors.up.mT if half == "B" else factors.down

    def _gradients(self) -> dict[str, Factors]:
        """By projection those of B and A, per token, parts of the flat gradient."""
        assert self.adapters.flat.grad is not None
        every = self.adapters.split(self.adapters.flat.grad)
        # through the others nothing of the loss has passed
        reached = [p for p in self.projections if self.moments.reached(p)]
        rows = [half for p in reached for half in (every[p.name].up.mT, every[p.name].down)]
        tokens = [n for n in map(self.moments.tokens, reached) for _ in range(2)]
        each = iter(torch._foreach_div(rows, tokens))
        return {p.name: Factors(up=next(each).mT, down=next(each)) for p in reached}

    def _steps(
        self, group: Together, grads: Mapping[str, Factors]
    ) -> tuple[list[Step], list[Step]]:
        def halves(layers: Sequence[Ragged], half: str) -> list[Half]:
            found = []
            for own in layers:
                weights, of_weights = (
                    [self._rows(of[name], half) for name in own.names]
                    for of in (self.adapters.weights, grads)
                )
                metric = self.metrics[f"{own.names[0]}.{half}"]
                found.append(Half(own.rows(weights, of_weights), metric, own.counts))
            return found

        ups, downs = halves(group.up, "B"), halves(group.down, "A")
        return natural_steps(ups, downs, group.to_up, group.to_down)

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

    def _metrics(self) -> dict[str, BothWays]:
        """From the moments as they are, those of layers of one width together. Where both have one
        basis it is kept once."""
        by_name = {p.name: p for p in self.projections}
        found = {}
        for group in self.groups:
            for layers, half, make, key in (
                (group.up, "B", self.metric.of_outputs, output_key),
                (group.down, "A", self.metric.of_inputs, input_key),
            ):
                for own in layers:
                    projections = [by_name[name] for name in own.names]
                    metric = make(projections, self.moments)
                    self.moments.share([key(p) for p in projections], metric)
                    found[f"{own.names[0]}.{half}"] = metric
        return dict(zip(found, both_ways([*found.values()]), strict=True))

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
        )

    # --- to a file and back --------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:  # type: ignore[override]
        """As torch's, the tensors under parameter 0."""
        tensors = self.moments.to_tensors("metric.")
        tensors |= {f"length.{key}": value for key, value in self.lengths.items()}
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
        self.metrics = {}
