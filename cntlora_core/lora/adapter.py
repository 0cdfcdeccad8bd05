"""The adapter: y = W x + B (A x), put around frozen projections and taken off again.

A is `down` `[r, d]`, B is `up` `[m, r]`; the scale is 1 (alpha = rank), folded into B.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import Function, once_differentiable
from torch.nn import functional as F

from ..model.convolution import Convolution
from ..model.swap_modules import swapped_modules
from .targets import Projection


@dataclass(frozen=True)
class Factors:
    """One projection's low-rank update, `up @ down`, fp32."""

    up: Tensor
    down: Tensor

    @property
    def rank(self) -> int:
        return len(self.down)

    def scaled(self, step: float) -> Factors:
        return Factors(self.up * step, self.down)

    def delta(self) -> Tensor:
        return self.up @ self.down


LoRA = dict[str, Factors]  # projection name -> factors


def scaled(lora: Mapping[str, Factors], strength: float) -> LoRA:
    """The same update, `strength` times as large."""
    return {name: factors.scaled(strength) for name, factors in lora.items()}


def parameter_count(lora: Mapping[str, Factors]) -> int:
    return sum(f.up.numel() + f.down.numel() for f in lora.values())


def default_init(
    projections: Sequence[Projection], ranks: Mapping[str, int], generator: torch.Generator
) -> LoRA:
    """Kaiming-uniform A with a = sqrt(5), so U(-1/sqrt d, 1/sqrt d), and B = 0 (Hu et al. 2021, as
    PEFT does it)."""

    def draw(rank: int, d: int) -> Tensor:
        return (torch.rand(rank, d, generator=generator) * 2 - 1) / d**0.5

    return {p.name: _with_zero_up(p, draw(ranks[p.name], p.in_features)) for p in projections}


def gaussian_init(
    projections: Sequence[Projection], ranks: Mapping[str, int], generator: torch.Generator
) -> LoRA:
    """A ~ N(0, 1/r^2) and B = 0, the start of diffusers' DreamBooth scripts (PEFT's `gaussian`)."""

    def draw(rank: int, d: int) -> Tensor:
        return torch.randn(rank, d, generator=generator) / rank

    return {p.name: _with_zero_up(p, draw(ranks[p.name], p.in_features)) for p in projections}


def _with_zero_up(projection: Projection, down: Tensor) -> Factors:
    return Factors(torch.zeros(projection.out_features, len(down)), down)


class _Adapted(Function):
    """y = x W^T + b + (x A^T) B^T and its gradients, as the fewest products and no sums of their
    own.

    Left to autograd, each adapter makes a dozen small nodes. `weight` is frozen.
    """

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, down: Tensor, up_rows: Tensor
    ) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        inner = rows @ down.T
        ctx.save_for_backward(rows, inner, weight, down, up_rows)
        return F.linear(rows, weight, bias).addmm_(inner, up_rows).view(*x.shape[:-1], -1)

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        rows, inner, weight, down, up_rows = ctx.saved_tensors
        delta = grad.reshape(-1, grad.shape[-1])
        back = delta @ up_rows.T
        to_x = (
            (delta @ weight).addmm_(back, down).view(*grad.shape[:-1], -1)
            if ctx.needs_input_grad[0]
            else None
        )
        return to_x, None, None, back.T @ rows, inner.T @ delta


class LoRALinear(nn.Module):
    """A frozen linear layer with an adapter beside it."""

    def __init__(self, base: nn.Linear, name: str, adapters: Adapters) -> None:
        super().__init__()
        self.base, self.name, self.adapters = base, name, adapters

    def forward(self, x: Tensor) -> Tensor:
        if self.adapters.off:
            return self.base(x)
        own = self.adapters.of_this_pass(x.dtype)[self.name]
        y: Tensor = _Adapted.apply(x, self.base.weight, self.base.bias, own.down, own.up.mT)
        return y


class LoRAConv2d(nn.Module):
    """A frozen convolution with an adapter beside it: A is a convolution of few channels, B mixes
    them place by place."""

    def __init__(
        self, base: nn.Module, convolution: Convolution, name: str, adapters: Adapters
    ) -> None:
        super().__init__()
        self.base, self.name, self.adapters = base, name, adapters
        self.convolution = convolution

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.base(x)
        if self.adapters.off:
            return y
        own = self.adapters.of_this_pass(x.dtype)[self.name]
        return y + F.conv2d(self.convolution(x, own.down), own.up[..., None, None])


class Adapters:
    """The adapters attached to a UNet. Their factors lie one after another in `flat`, fp32 whatever
    the base's dtype: an optimiser's step, a norm, a copy, a pass's precision are one call each, not
    hundreds. `weights` are its parts, by projection name."""

    def __init__(self, lora: Mapping[str, Factors], device: torch.device, trainable: bool) -> None:
        self.shapes = {name: (f.down.shape, f.up.mT.shape) for name, f in lora.items()}
        flat = self.flat_of(lora).to(device, torch.float32)
        self.flat = nn.Parameter(flat, requires_grad=trainable)
        self.weights = self.split(self.flat.detach())
        self.off = False
        self._of_this_pass: LoRA | None = None

    def split(self, flat: Tensor) -> LoRA:
        """The parts of a tensor that lies as `flat` does."""
        shapes = [shape for pair in self.shapes.values() for shape in pair]
        parts = iter(flat.split([shape.numel() for shape in shapes]))
        halves = iter([part.view(shape) for part, shape in zip(parts, shapes, strict=True)])
        return {name: Factors(down=next(halves), up=next(halves).mT) for name in self.shapes}

    def flat_of(self, lora: Mapping[str, Factors]) -> Tensor:
        """The weights of a LoRA with the same names and ranks as `flat` has them: in rows, for the
        layout decides how sums are rounded, and a resumed run must round alike."""
        halves = [half for name in self.shapes for half in (lora[name].down, lora[name].up.mT)]
        return torch.cat([half.detach().flatten() for half in halves or [torch.empty(0)]])

    def begin_pass(self, *_: Any) -> None:
        """The factors may have changed since the pass before."""
        self._of_this_pass = None

    def of_this_pass(self, dtype: torch.dtype) -> LoRA:
        """Differentiable parts of `flat` in the pass's precision."""
        if self._of_this_pass is None:
            self._of_this_pass = self.split(self.flat.to(dtype))
        return self._of_this_pass

    def gradient(self, loss_scale: float) -> Tensor:
        """That of `flat`, from here on as if the loss had not been scaled."""
        if self.flat.grad is None:
            self.flat.grad = torch.zeros_like(self.flat)
        return self.flat.grad.div_(loss_scale)

    @contextmanager
    def bypassed(self) -> Iterator[None]:
        """The base model alone while the block runs."""
        try:
            self.off = True
            yield
        finally:
            self.off = False

    def load(self, lora: Mapping[str, Factors]) -> None:
        """Take over the weights of a LoRA with the same names and ranks."""
        self.flat.detach().copy_(self.flat_of(lora))

    def factors(self) -> LoRA:
        """A copy of the current weights on the CPU."""
        return {
            name: Factors(own.up.cpu().contiguous().clone(), own.down.cpu().clone())
            for name, own in self.weights.items()
        }


@contextmanager
def attached_lora(
    unet: nn.Module, lora: Mapping[str, Factors], *, trainable: bool = False
) -> Iterator[Adapters]:
    """Put `lora` around the projections it names; the UNet's own modules are back when the block
    ends.

    The base weights are never written: before and after they are bit-identical.
    """
    adapters = Adapters(lora, next(unet.parameters()).device, trainable)
    layers: dict[str, nn.Module] = {}
    for name in lora:
        base = unet.get_submodule(name)
        if convolution := Convolution.of(base):
            layers[name] = LoRAConv2d(base, convolution, name, adapters)
        elif isinstance(base, nn.Linear):
            layers[name] = LoRALinear(base, name, adapters)
        else:
            raise TypeError(f"{name} is a {type(base).__name__}, which gets no adapter")
    handle = unet.register_forward_pre_hook(adapters.begin_pass)
    try:
        with swapped_modules(unet, layers):
            yield adapters
    finally:
        handle.remove()
