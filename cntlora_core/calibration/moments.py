"""What is known of the layers: second moments of activations and gradients, and of a sweep the
weights' gradients. Streamed over passes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from ..lora.targets import Projection
from .recording import input_key, output_key
from .second_moment import Diagonal, LowRank, Rows, SecondMoment, moved, rank_of, stack, unstack
from .seen import Seen
from .sketch import Sketches

TOGETHER = 64  # layers of one shape that are worked on at once
MOST = 1 << 23  # numbers of layers that are worked on at once
TAKEN_IN = 128  # moments of one shape, of which little is made beside their rows

Item = TypeVar("Item")
Kind = TypeVar("Kind")


@dataclass
class Moments:
    """What is known of the layers. d = in, m = out features; expectations are over tokens.

    C = E[x x^T] `[d, d]`, one per distinct input, and with gradients S = E[delta delta^T] `[m, m]`
    with delta = dLoss/dy, one per projection; both of small rank, or the diagonal where the
    projection asks for it. A sweep adds what it knows of G = E[delta x^T] `[m, d]`.

    `counts` are what they are means over: C is one over pictures, of their tokens' means, S over
    tokens. So of pictures of any sizes S times the tokens of the mean picture is E[sum delta
    delta^T], each one's, and what is new in a small one's input weighs as much as its gradient.
    """

    seconds: dict[str, SecondMoment] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)
    gradients: Sketches | None = None

    def C(self, projection: Projection) -> SecondMoment:
        return self.seconds[input_key(projection)]

    def S(self, projection: Projection) -> SecondMoment:
        return self.seconds[output_key(projection)]

    def G(self, projections: Sequence[Projection]) -> tuple[Tensor, Tensor]:
        """Of projections of one shape, each of small rank, as a product `[g, m, k]`, `[g, k, d]`.

        Raises RuntimeError where no gradient was measured.
        """
        if self.gradients is None:
            raise RuntimeError("no gradients were measured")
        tokens = [self.counts.get(output_key(p), 0) for p in projections]
        return self.gradients.get(projections, tokens)

    def passed(self, projection: Projection) -> int:
        """Tokens that came back through the projection."""
        return self.counts[output_key(projection)]

    def reached(self, projection: Projection) -> bool:
        """Whether any gradient has."""
        return output_key(projection) in self.counts

    def tokens(self, projection: Projection) -> float:
        """Of a picture, in the mean over all that passed and came back."""
        return self.passed(projection) / self.counts[input_key(projection)]

    @torch.no_grad()
    def take_in(self, seen: Seen) -> None:
        """Those of one shape together, of which the new rows are one share: counts are as many
        times more in a layer as pictures were, so that it is one for all that saw the same."""

        def kind(key: str) -> tuple[float, bool, tuple[torch.Size, ...]]:
            shapes = tuple(part.shape for part in seen.rows[key])
            new = sum(seen.counts[key])
            share = new / (self.counts.get(key, 0) + new)
            return share, key in seen.diagonal, shapes

        # whatever the order of the passes
        every_key = sorted(seen.rows, key=lambda key: (seen.scales[key], key))
        for (share, diagonal, _), keys in alike(every_key, kind, TAKEN_IN):
            of_scale = [_unscaled(seen, own) for _, own in alike(keys, seen.scales.__getitem__)]
            rows = Rows(torch.cat(of_scale) if len(of_scale) > 1 else of_scale[0])
            moment: SecondMoment
            if share < 1:
                old = stack([self.seconds[key] for key in keys])
                moment = old.merged(Diagonal.of(rows) if diagonal else rows, share)
            else:
                moment = Diagonal.of(rows) if diagonal else LowRank.of(rows)
            self.seconds |= dict(zip(keys, unstack(moment), strict=True))
            self.counts |= {key: self.counts.get(key, 0) + sum(seen.counts[key]) for key in keys}

    def share(self, keys: Sequence[str], metric: SecondMoment) -> None:
        """Keep no basis of their own of what stands under `keys` where that of `metric`, made of
        them, starts with theirs."""
        if not isinstance(metric, LowRank):
            return
        d, k = metric.basis.shape[-2:]
        for key, basis in zip(keys, metric.basis, strict=True):
            own = self.seconds[key]
            if isinstance(own, LowRank) and (k < d or own.basis.shape[-1] == k):
                self.seconds[key] = replace(own, basis=basis[:, : own.basis.shape[-1]])

    def only(self, projections: Sequence[Projection]) -> Moments:
        """Those of some of the layers, without G."""
        keys = {key for p in projections for key in (input_key(p), output_key(p))}
        kept = {key: moment for key, moment in self.seconds.items() if key in keys}
        return Moments(kept, {key: self.counts[key] for key in kept})

    def on(self, device: torch.device) -> Moments:
        """Without G, on `device`. What is taken in takes a moment's place and never changes it, so
        that both may go on from here."""
        return Moments({k: moved(v, device) for k, v in self.seconds.items()}, dict(self.counts))

    def to_tensors(self, prefix: str) -> dict[str, Tensor]:
        """C and S by part and key, with their counts; each its own memory."""
        tensors = {f"{prefix}count.{key}": torch.tensor(n) for key, n in self.counts.items()}
        for key, moment in self.seconds.items():
            kind: Any = type(moment)
            for part in fields(kind):
                tensors[f"{prefix}{part.name}.{key}"] = getattr(moment, part.name).clone()
        return tensors

    @classmethod
    def from_tensors(
        cls, tensors: Mapping[str, Tensor], prefix: str, device: torch.device
    ) -> Moments:
        """The other way."""
        counts: dict[str, int] = {}
        parts: dict[str, dict[str, Any]] = {}
        for name, value in tensors.items():
            if name.startswith(prefix):
                part, key = name.removeprefix(prefix).split(".", 1)
                if part == "count":
                    counts[key] = int(value)
                else:
                    parts.setdefault(key, {})[part] = value.to(device)
        kinds: dict[str, SecondMoment] = {
            key: Diagonal(**own) if "values" in own else LowRank(**own)
            for key, own in parts.items()
        }
        return cls(kinds, counts)


def _unscaled(seen: Seen, keys: Sequence[str]) -> Tensor:
    """Rows of one scale and width, `[g, n, d]`, in fp32, as they should be."""
    parts = [
        part.flatten(0, 1) if weight == 1 else part.flatten(0, 1).float() * weight**0.5
        for key in keys
        for part, weight in zip(seen.rows[key], seen.weights(key), strict=True)
    ]
    rows, scale = torch.cat(parts).float(), seen.scales[keys[0]]
    return (rows if scale == 1 else rows / scale).unflatten(0, (len(keys), -1))


def alike(
    items: Iterable[Item], kind: Callable[[Item], Kind], most: int = TOGETHER
) -> Iterator[tuple[Kind, list[Item]]]:
    """Those of one kind, `most` of them at once."""
    groups: dict[Kind, list[Item]] = {}
    for item in items:
        groups.setdefault(kind(item), []).append(item)
    for own, group in groups.items():
        for start in range(0, len(group), most):
            yield own, group[start : start + most]


def at_a_time(items: Iterable[Item], numbers: Callable[[Item], int]) -> Iterator[list[Item]]:
    """In their order, as many as take `MOST` numbers where each takes those of the last of them,
    the largest."""
    group: list[Item] = []
    for item in items:
        if group and (len(group) + 1) * numbers(item) > MOST:
            yield group
            group = []
        group.append(item)
    yield group


def shape_of(p: Projection) -> tuple[int, int, int, bool, bool]:
    """Layers of one shape are worked on together."""
    return p.in_features, p.channels_in, p.out_features, p.diagonal_in, p.diagonal_out


def moment_bytes(projections: Sequence[Projection]) -> int:
    """Of C and S, fp32."""
    inputs = {p.input_key: (p.in_features, p.diagonal_in) for p in projections}
    sides = [*inputs.values(), *((p.out_features, p.diagonal_out) for p in projections)]
    return 4 * sum(d if diagonal else rank_of(d) * (d + rank_of(d)) + 1 for d, diagonal in sides)
