"""Hooks that look on while pictures pass: rows of what comes into a layer and of the gradient that
comes back."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ..distributed import Group, gathered
from ..lora.targets import Projection

ROWS = 64  # of each picture's tokens that a pass keeps, of a layer's input and of its gradient
# Rows step through a picture by the golden ratio, so that they fall on no pattern of it; from one
# pass to the next they start elsewhere.
GOLDEN, NEXT = 0.618034, 0.754878

Hook = Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]


@dataclass
class Seen:
    """What passes left behind, by key: rows `[pictures, n, d]` in their own dtype (of a `diagonal`
    the mean square's root `[1, 1, d]`), and the tokens they stand for."""

    rows: dict[str, list[Tensor]] = field(default_factory=dict)
    tokens: dict[str, int] = field(default_factory=dict)
    diagonal: set[str] = field(default_factory=set)

    def add(self, key: str, rows: Tensor, tokens: int, diagonal: bool) -> None:
        if diagonal:
            rows = rows.float().square().mean((0, 1), keepdim=True).sqrt()
            self.diagonal.add(key)
        self.rows.setdefault(key, []).append(rows)
        self.tokens[key] = self.tokens.get(key, 0) + tokens

    def extend(self, other: Seen) -> None:
        """With what further passes left."""
        for key, rows in other.rows.items():
            self.rows.setdefault(key, []).extend(rows)
            self.tokens[key] = self.tokens.get(key, 0) + other.tokens[key]
        self.diagonal |= other.diagonal

    def came_back(self, projections: Sequence[Projection]) -> Iterator[tuple[Projection, int]]:
        """The tokens of those that a gradient reached."""
        return ((p, self.tokens[k]) for p in projections if (k := output_key(p)) in self.tokens)

    def together(self, group: Group) -> Seen:
        """What all processes saw, each as much, in the order of the pictures that they share."""
        if group.size == 1:
            return self
        rows = {
            key: [gathered(torch.cat(parts).float(), group).transpose(0, 1).flatten(0, 1)]
            for key, parts in self.rows.items()
        }
        tokens = {key: count * group.size for key, count in self.tokens.items()}
        return Seen(rows, tokens, self.diagonal)


class Recording:
    """What the passes inside `record` left behind."""

    def __init__(
        self,
        projections: Sequence[Projection],
        backward: bool,
        gradient: Callable[[str, Tensor, int], None] | None,
        loss_scale: float,
        turn: int,
    ) -> None:
        self.seen, self.turn = Seen(), turn
        self.backward, self.gradient, self.loss_scale = backward, gradient, loss_scale
        self.squares: list[Tensor] = []
        # the first to read each input
        self.speakers = {p.input_key: p.name for p in reversed(projections)}

    def take(self) -> Seen:
        """What was seen since this was last asked."""
        seen, self.seen = self.seen, Seen()
        self.turn += 1
        return seen

    def gradient_norms(self) -> Tensor:
        """Of each picture since this was last asked, over all projections `[n]`, on the host."""
        norms = torch.stack(self.squares).sum(0).sqrt().cpu()
        self.squares.clear()
        return norms

    def hook(self, projection: Projection) -> Hook:
        def forward(_module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            if self.backward and not torch.is_grad_enabled():
                return  # will be computed again, for the gradients
            x, key = args[0].detach(), input_key(projection)
            again = key in self.seen.rows  # gradient checkpointing computes a pass twice
            if self.speakers[projection.input_key] == projection.name and not again:
                self._keep(key, x, projection.diagonal_in)
            if self.backward:
                if not output.requires_grad:
                    # Nothing before this layer needs a gradient: let the backward pass end here.
                    output.requires_grad_(True)
                inputs = x if self.gradient else None
                output.register_hook(lambda grad: self._back(projection, inputs, grad))

        return forward

    def _back(self, projection: Projection, x: Tensor | None, grad: Tensor) -> None:
        grad = grad.detach()
        self._keep(output_key(projection), grad, projection.diagonal_out, self.loss_scale)
        if x is not None and self.gradient is not None:
            each = (_by_picture(grad) / self.loss_scale).mT @ _by_picture(x)
            self.squares.append(each.square().sum((1, 2)))
            self.gradient(projection.name, each.sum(0), grad.shape[:-1].numel())

    def _keep(self, key: str, x: Tensor, diagonal: bool, scale: float = 1.0) -> None:
        every = x.reshape(len(x), -1, x.shape[-1])
        tokens = every.shape[1]
        if tokens > ROWS:
            every = every[:, _spread(tokens, self.turn, x.device)]
        if scale != 1:
            every = every.float() / scale
        self.seen.add(key, every, len(x) * tokens, diagonal)


@contextmanager
def record(
    unet: nn.Module,
    projections: Sequence[Projection],
    *,
    backward: bool,
    gradient: Callable[[str, Tensor, int], None] | None = None,
    loss_scale: float = 1.0,
    turn: int = 0,
) -> Iterator[Recording]:
    """Look on at the passes made inside the block, and take what was seen after each.

    `gradient` is told of each layer's sum of delta x^T `[m, d]` and the number of its tokens; it
    may change from pass to pass.
    `loss_scale`: what the loss was multiplied by; gradients are recorded without it. `turn` says
    where the rows start. The hooks are gone when the block ends, however it ends.
    """
    recording = Recording(projections, backward, gradient, loss_scale, turn)
    handles = []
    try:
        for projection in projections:
            module = unet.get_submodule(projection.name)
            handles.append(module.register_forward_hook(recording.hook(projection)))
        yield recording
    finally:
        for handle in handles:
            handle.remove()


def input_key(projection: Projection) -> str:
    return f"C.{projection.input_key}"


def output_key(projection: Projection) -> str:
    return f"S.{projection.name}"


def _by_picture(x: Tensor) -> Tensor:
    """`[n, tokens, features]`, fp32."""
    return x.reshape(len(x), -1, x.shape[-1]).float()


def _spread(count: int, turn: int, device: torch.device) -> Tensor:
    """`ROWS` of `count` rows."""
    at = torch.arange(ROWS, device=device) * GOLDEN + turn * NEXT
    return ((at % 1) * count).long().clamp_max(count - 1)
