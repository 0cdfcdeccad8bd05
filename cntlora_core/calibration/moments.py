"""Second moments of activations and gradients, streamed over batches."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ..distributed import Group
from ..lora.targets import Projection

ON_DEVICE = 2**30  # bytes of moments that may stay on the model's device; more wait on the host


@dataclass
class RunningMean:
    """Mean over tokens of a matrix-valued quantity, fp32.

    Kept as a mean and moved by the difference (Chan et al. 1983), so that 10^6 tokens lose no
    digits to a growing sum.
    """

    value: Tensor | None = None
    count: int = 0

    def update(self, total: Tensor, count: int) -> None:
        """Add `count` tokens whose sum is `total`."""
        self.count += count
        if self.value is None:
            self.value = total / count
        else:
            self.value += (total - self.value * count) / self.count

    def merge(self, other: RunningMean) -> None:
        """Add the tokens that another mean has seen."""
        self.count += other.count
        self.value = (
            other.get().clone()
            if self.value is None
            else self.value.lerp_(other.get(), other.count / self.count)
        )

    def get(self) -> Tensor:
        """The mean so far. Raises RuntimeError when nothing was seen: a hook that never fired is a
        bug."""
        if self.value is None:
            raise RuntimeError("no tokens were recorded")
        return self.value


@dataclass
class Moments:
    """What a sweep measures. d = in, m = out features; expectations are over tokens.

    `inputs[key]`: C = E[x x^T] `[d, d]`, one per distinct input. `grads[name]`: S = E[delta
    delta^T] `[m, m]` and `cross[name]`: G = E[delta x^T] `[m, d]` with delta = dLoss/dy, one per
    projection (backward sweeps only). Where a projection asks for the diagonal alone, C is `[d]` or
    S is `[m]`. With G, `squares` holds each picture's ||G||^2 `[n]` by projection.
    """

    inputs: dict[str, RunningMean] = field(default_factory=dict)
    grads: dict[str, RunningMean] = field(default_factory=dict)
    cross: dict[str, RunningMean] = field(default_factory=dict)
    squares: list[Tensor] = field(default_factory=list)

    def gradient_norms(self) -> Tensor:
        """Of each picture since this was last asked, over all projections `[n]`, on the host."""
        norms = torch.stack(self.squares).sum(0).sqrt().cpu()
        self.squares.clear()
        return norms

    def C(self, projection: Projection) -> Tensor:
        return self.inputs[projection.input_key].get()

    def S(self, projection: Projection) -> Tensor:
        return self.grads[projection.name].get()

    def G(self, projection: Projection) -> Tensor:
        return self.cross[projection.name].get()

    def merge(self, other: Moments) -> None:
        """Add the tokens of another sweep."""
        for mine, theirs in (
            (self.inputs, other.inputs),
            (self.grads, other.grads),
            (self.cross, other.cross),
        ):
            for key, mean in theirs.items():
                mine.setdefault(key, RunningMean()).merge(mean)

    def on(self, device: torch.device, *, copy: bool = True) -> Moments:
        """C and S alone, on `device`; a `copy` even of what is there."""

        def moved(means: dict[str, RunningMean]) -> dict[str, RunningMean]:
            return {
                key: RunningMean(mean.get().to(device, copy=copy), mean.count)
                for key, mean in means.items()
            }

        return Moments(moved(self.inputs), moved(self.grads))

    def to_tensors(self, prefix: str) -> dict[str, Tensor]:
        """C and S by name, with their counts."""
        tensors = {}
        for kind, means in (("C", self.inputs), ("S", self.grads)):
            for key, mean in means.items():
                tensors[f"{prefix}{kind}.{key}"] = mean.get()
                tensors[f"{prefix}{kind}#{key}"] = torch.tensor(mean.count)
        return tensors

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], prefix: str) -> Moments:
        """The other way."""

        def means(kind: str) -> dict[str, RunningMean]:
            start = f"{prefix}{kind}."
            return {
                key.removeprefix(start): RunningMean(
                    value, int(tensors[f"{prefix}{kind}#{key.removeprefix(start)}"])
                )
                for key, value in tensors.items()
                if key.startswith(start)
            }

        return cls(means("C"), means("S"))

    def combine(self, group: Group) -> None:
        """The mean over the tokens of all processes."""
        if group.size == 1:
            return
        means = [*self.inputs.values(), *self.grads.values(), *self.cross.values()]
        counts = torch.tensor([mean.count for mean in means], dtype=torch.float64)
        group.sum_([counts])
        for mean, count in zip(
            means, counts.tolist(), strict=True
        ):  # one at a time: no second copy of them all
            value = mean.get() * (mean.count / count)
            group.sum_([value])
            mean.value, mean.count = value, int(count)

    def tokens(self, projection: Projection) -> int:
        """Rows that came back through the projection."""
        return self.grads[projection.name].count


def moment_bytes(projections: Sequence[Projection]) -> int:
    """Of C and S, fp32."""
    sides = {p.input_key: p.in_features ** (1 if p.diagonal_in else 2) for p in projections}
    return 4 * (
        sum(sides.values())
        + sum(p.out_features ** (1 if p.diagonal_out else 2) for p in projections)
    )


def _rows(x: Tensor) -> Tensor:
    return x.detach().reshape(-1, x.shape[-1]).float()


def _pictures(rows: Tensor, like: Tensor) -> Tensor:
    """`[n, tokens, features]`."""
    return rows.view(len(like), -1, rows.shape[-1])


def _moment(rows: Tensor, diagonal: bool) -> Tensor:
    return rows.square().sum(0) if diagonal else rows.T @ rows


class _Recorder:
    """Forward hooks of one recording; knows which projection speaks for a shared input."""

    def __init__(
        self,
        projections: Sequence[Projection],
        backward: bool,
        cross: bool,
        storage: torch.device | str,
        loss_scale: float,
    ) -> None:
        self.moments = Moments()
        self.backward = backward
        self.cross = cross
        self.storage = storage
        self.loss_scale = loss_scale
        self.speakers = {
            p.input_key: p.name for p in reversed(projections)
        }  # the first to read each input

    def hook(
        self, projection: Projection
    ) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        def forward(_module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            x = args[0].detach()  # kept until the backward pass, so in its own dtype
            if self.speakers[projection.input_key] == projection.name:
                rows = _rows(x)
                self._add(
                    self.moments.inputs,
                    projection.input_key,
                    _moment(rows, projection.diagonal_in),
                    len(rows),
                )
            if self.backward and torch.is_grad_enabled():
                if not output.requires_grad:
                    # Nothing before this layer needs a gradient: let the backward pass end here.
                    output.requires_grad_(True)
                kept = x if self.cross else None
                output.register_hook(lambda grad: self._gradient(projection, kept, grad))

        return forward

    def _gradient(self, projection: Projection, x: Tensor | None, grad: Tensor) -> None:
        delta = _rows(grad)
        if self.loss_scale != 1:  # a copy
            delta = delta / self.loss_scale
        self._add(
            self.moments.grads, projection.name, _moment(delta, projection.diagonal_out), len(delta)
        )
        if x is not None:
            by_picture = _pictures(delta, grad).transpose(1, 2) @ _pictures(_rows(x), x)
            self.moments.squares.append(by_picture.square().sum((1, 2)))
            self._add(self.moments.cross, projection.name, by_picture.sum(0), len(delta))

    def _add(self, into: dict[str, RunningMean], key: str, total: Tensor, count: int) -> None:
        into.setdefault(key, RunningMean()).update(total.to(self.storage), count)


@contextmanager
def record(
    unet: nn.Module,
    projections: Sequence[Projection],
    *,
    backward: bool,
    cross: bool = True,
    storage: torch.device | str = "cpu",
    loss_scale: float = 1.0,
) -> Iterator[Moments]:
    """Record moments of all forward (and backward) passes made inside the block.

    Products are fp32 on the model's device, accumulators live on `storage` (the host, so that a GPU
    needs no more than one matrix at a time). `cross`: G too. `loss_scale`: what the loss was
    multiplied by; gradients are recorded without it. The hooks are gone when the block ends,
    however it ends.
    """
    recorder = _Recorder(projections, backward, cross, storage, loss_scale)
    handles = []
    try:
        for projection in projections:
            module = unet.get_submodule(projection.name)
            handles.append(module.register_forward_hook(recorder.hook(projection)))
        yield recorder.moments
    finally:
        for handle in handles:
            handle.remove()
