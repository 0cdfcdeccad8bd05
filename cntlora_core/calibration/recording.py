"""Hooks that look on while pictures pass: rows of what comes into a layer and of the gradient that
comes back."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from ..lora.targets import TEXT, Projection
from ..model.gradient_checkpointing import is_recomputed
from .inputs import Inputs, Tokens, inputs_of, outputs_of
from .seen import ROWS, Seen

# Rows step through a picture by the golden ratio, so that they fall on no pattern of it; from one
# pass to the next they start elsewhere.
GOLDEN, NEXT = 0.618034, 0.754878

Hook = Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]
# Of a layer's name, the gradients of its outputs `[n, tokens, m]` and its inputs, and what those
# gradients were multiplied by: the norm of each picture's delta x^T `[n]`.
Gradient = Callable[[str, Tensor, Inputs, float], Tensor]


class Recording:
    """What the passes inside `record` left behind."""

    def __init__(
        self,
        projections: Sequence[Projection],
        backward: bool,
        gradient: Gradient | None,
        loss_scale: float,
        turn: int,
        recomputes: bool,
    ) -> None:
        self.seen, self.turn, self.recomputes = Seen(), turn, recomputes
        self.backward, self.gradient, self.loss_scale = backward, gradient, loss_scale
        self.norms: list[Tensor] = []
        # How often each picture's prompt stands in what the next pass reads of it (None: once). A
        # copy of a token gets a part of its gradient only.
        self.copies: Tensor | None = None
        # a layer's input and its gradient wait for each other, by projection
        self.inputs: dict[str, Inputs] = {}
        self.deltas: dict[str, Tensor] = {}
        self.visited: set[str] = set()
        # of the rows that are kept, by the tokens of a picture and by the layout of inputs
        self.places: dict[Hashable, Tensor] = {}
        # the first to read each input
        self.speakers = {p.input_key: p.name for p in reversed(projections)}

    def take(self) -> Seen:
        """What was seen since this was last asked. Raises RuntimeError when an input that was to
        be computed again never was."""
        if self.deltas:
            raise RuntimeError(f"not recomputed: {', '.join(self.deltas)}")
        self.inputs.clear()
        self.visited.clear()
        self.places.clear()
        seen, self.seen = self.seen, Seen()
        self.turn += 1
        return seen

    def gradient_norms(self) -> Tensor:
        """Of each picture since this was last asked, over all projections `[n]`, on the host."""
        norms = torch.linalg.vector_norm(torch.stack(self.norms), dim=0).cpu()
        self.norms.clear()
        return norms

    def before(self, projection: Projection) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        """Of an input that is computed twice the second counts: it need not wait for long."""

        def look(_module: nn.Module, args: tuple[Tensor, ...]) -> None:
            again = projection.name in self.visited
            self.visited.add(projection.name)
            if again or not (self.recomputes and is_recomputed(projection.name)):
                self.inputs[projection.name] = inputs_of(projection, args[0].detach())
                self._meet(projection.name)

        return look

    def hook(self, projection: Projection) -> Hook:
        def forward(_module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            if self.backward and not torch.is_grad_enabled():
                return  # will be computed again, for the gradients
            key = input_key(projection)
            again = key in self.seen.rows  # gradient checkpointing computes a pass twice
            if self.speakers[projection.input_key] == projection.name and not again:
                x = inputs_of(projection, args[0].detach())
                self._keep(key, x, projection.diagonal_in, self._copies(projection))
            if self.backward:
                if not output.requires_grad:
                    # Nothing before this layer needs a gradient: let the backward pass end here.
                    output.requires_grad_(True)
                output.register_hook(lambda grad: self._back(projection, grad))

        return forward

    def _back(self, projection: Projection, grad: Tensor) -> None:
        grad = outputs_of(projection, grad.detach())
        key = output_key(projection)
        copies = self._copies(projection)
        self._keep(key, Tokens(grad), projection.diagonal_out, copies, self.loss_scale)
        if self.gradient is not None:
            self.deltas[projection.name] = grad
            self._meet(projection.name)

    def _meet(self, name: str) -> None:
        if self.gradient is not None and name in self.inputs and name in self.deltas:
            delta, x = self.deltas.pop(name), self.inputs.pop(name)
            self.norms.append(self.gradient(name, delta, x, self.loss_scale))

    def _copies(self, projection: Projection) -> Tensor | None:
        return self.copies if projection.input_key == TEXT else None

    def _keep(
        self,
        key: str,
        every: Inputs,
        diagonal: bool,
        copies: Tensor | None,
        scale: float | None = None,
    ) -> None:
        """Without a `scale`: not of a gradient. An input counts once for each picture, whatever its
        size: its directions must be in the metric as much as its gradient is in a step."""
        tokens, layout, places = every.tokens, every.layout, self.places
        if tokens not in places:
            places[tokens] = _spread(tokens, self.turn, every.x.device)
        if layout not in places:
            places[layout] = every.index(places[tokens])
        rows = every.at(places[layout])
        count = len(rows)
        if scale is not None:
            count *= tokens
            if copies is not None:
                count = int((tokens // copies).sum())
                rows = rows * copies.to(rows)[:, None, None]
        self.seen.add(key, rows, count, diagonal, 1.0 if scale is None else scale)


@contextmanager
def record(
    unet: nn.Module,
    projections: Sequence[Projection],
    *,
    backward: bool,
    gradient: Gradient | None = None,
    loss_scale: float = 1.0,
    turn: int = 0,
    recomputes: bool = False,
) -> Iterator[Recording]:
    """Look on at the passes made inside the block, and take what was seen after each.

    `gradient` is told of each layer's inputs and the gradients of its outputs; it may change from
    pass to pass.
    `loss_scale`: what the loss was multiplied by; gradients are recorded without it. `turn` says
    where the rows start; `recomputes`, that activations are computed again on the way back. The
    hooks are gone when the block ends, however it ends.
    """
    recording = Recording(projections, backward, gradient, loss_scale, turn, recomputes)
    handles = []
    try:
        for projection in projections:
            module = unet.get_submodule(projection.name)
            if gradient is not None:
                handles.append(module.register_forward_pre_hook(recording.before(projection)))
            handles.append(module.register_forward_hook(recording.hook(projection)))
        yield recording
    finally:
        for handle in handles:
            handle.remove()


def input_key(projection: Projection) -> str:
    return f"C.{projection.input_key}"


def output_key(projection: Projection) -> str:
    return f"S.{projection.name}"


def recorded_bytes(projections: Sequence[Projection], dtype: torch.dtype) -> int:
    """What a pass in `dtype` that is looked on at keeps of each picture, both ways; of a diagonal
    next to nothing."""
    inputs = {p.input_key: p.in_features for p in projections if not p.diagonal_in}
    outputs = sum(p.out_features for p in projections if not p.diagonal_out)
    return ROWS * dtype.itemsize * (sum(inputs.values()) + outputs)


def _spread(count: int, turn: int, device: torch.device) -> Tensor:
    """`ROWS` of `count` rows, all where there are no more."""
    if count <= ROWS:
        return torch.arange(count, device=device)
    at = torch.arange(ROWS, device=device) * GOLDEN + turn * NEXT
    return ((at % 1) * count).long().clamp_max(count - 1)
