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

    def rescaled(self, scale: Tensor) -> Factors:
        """The same update; rows of `down` divided by `scale` `[r]`."""
        return Factors(self.up * scale, self.down / scale[:, None])

    def delta(self) -> Tensor:
        return self.up @ self.down


LoRA = dict[str, Factors]  # projection name -> factors


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
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, down: Tensor, up: Tensor
    ) -> Tensor:
        rows, down, up = x.reshape(-1, x.shape[-1]), down.to(x.dtype), up.to(x.dtype)
        inner = rows @ down.T
        ctx.save_for_backward(rows, inner, weight, down, up)
        return F.linear(rows, weight, bias).addmm_(inner, up.T).view(*x.shape[:-1], -1)

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        rows, inner, weight, down, up = ctx.saved_tensors
        delta = grad.reshape(-1, grad.shape[-1])
        back = delta @ up
        to_x = (
            (delta @ weight).addmm_(back, down).view(*grad.shape[:-1], -1)
            if ctx.needs_input_grad[0]
            else None
        )
        return to_x, None, None, (back.T @ rows).float(), (delta.T @ inner).float()


class LoRALinear(nn.Module):
    """A frozen linear layer with an adapter beside it. Factors are fp32 whatever the base's
    dtype."""

    def __init__(self, base: nn.Linear, factors: Factors, trainable: bool) -> None:
        super().__init__()
        device = base.weight.device
        self.base = base
        self.bypassed = False
        self.up = nn.Parameter(_own(factors.up, device), requires_grad=trainable)
        self.down = nn.Parameter(_own(factors.down, device), requires_grad=trainable)

    def forward(self, x: Tensor) -> Tensor:
        if self.bypassed:
            return self.base(x)
        y: Tensor = _Adapted.apply(x, self.base.weight, self.base.bias, self.down, self.up)
        return y


def _own(factor: Tensor, device: torch.device) -> Tensor:
    """A copy in fp32 and rows: the layout decides how sums are rounded, and a resumed run must
    round alike."""
    return factor.detach().to(device, torch.float32).clone(memory_format=torch.contiguous_format)


class Adapters:
    """The adapters attached to a UNet, by projection name."""

    def __init__(self, layers: dict[str, LoRALinear]) -> None:
        self.layers = layers

    def parameters(self) -> list[nn.Parameter]:
        return [p for layer in self.layers.values() for p in (layer.down, layer.up)]

    def flatten(self) -> nn.Parameter:
        """One parameter of which all factors become parts: an optimiser's step, a norm, a copy are
        one call each, not hundreds."""
        parameters = self.parameters()
        flat = torch.cat([p.detach().flatten() for p in parameters])
        for parameter, part in zip(
            parameters, flat.split([p.numel() for p in parameters]), strict=True
        ):
            parameter.data = part.view_as(parameter)
        return nn.Parameter(flat)

    def flat_of(self, lora: Mapping[str, Factors]) -> Tensor:
        """The weights of a LoRA with the same names and ranks, in the order of `flatten`."""
        parts = [half for name in self.layers for half in (lora[name].down, lora[name].up)]
        return torch.cat([part.flatten() for part in parts])

    def gradient(self) -> Tensor:
        """Of the factors, as one `flat` tensor; theirs are dropped."""
        parameters = self.parameters()
        gradient = torch.cat(
            [(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in parameters]
        )
        for parameter in parameters:
            parameter.grad = None
        return gradient

    @contextmanager
    def bypassed(self) -> Iterator[None]:
        """The base model alone while the block runs."""
        try:
            for layer in self.layers.values():
                layer.bypassed = True
            yield
        finally:
            for layer in self.layers.values():
                layer.bypassed = False

    def load(self, lora: Mapping[str, Factors]) -> None:
        """Take over the weights of a LoRA with the same names and ranks."""
        with torch.no_grad():
            for name, layer in self.layers.items():
                layer.up.copy_(lora[name].up)
                layer.down.copy_(lora[name].down)

    def factors(self) -> LoRA:
        """A copy of the current weights on the CPU."""
        return {
            name: Factors(layer.up.detach().cpu().clone(), layer.down.detach().cpu().clone())
            for name, layer in self.layers.items()
        }


@contextmanager
def attached_lora(
    unet: nn.Module, lora: Mapping[str, Factors], *, trainable: bool = False
) -> Iterator[Adapters]:
    """Put `lora` around the projections it names; the UNet's own modules are back when the block
    ends.

    The base weights are never written: before and after they are bit-identical.
    """
    layers: dict[str, LoRALinear] = {}
    for name, factors in lora.items():
        base = unet.get_submodule(name)
        if not isinstance(base, nn.Linear):
            raise TypeError(f"{name} is a {type(base).__name__}, not a linear layer")
        layers[name] = LoRALinear(base, factors, trainable)
    with swapped_modules(unet, layers):
        yield Adapters(layers)
