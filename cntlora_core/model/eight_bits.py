"""Frozen weights stored in 8 bits: half of what bf16 takes, for cards that are small for the model.

Each output channel has a scale of its own (absmax), and a layer's weights are brought back to the
model's precision when the layer runs. Without gradient checkpointing those copies are kept until
the backward pass, and nothing is saved.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .swap_modules import put_modules

LEVELS = 127
SMALLEST = 1 << 16  # weights of a layer below which nothing is to be gained


class _Stored(nn.Module):
    """A layer whose `weight` is made anew whenever it is asked for."""

    codes: Tensor  # int8, the weight's shape
    scale: Tensor  # fp32, of each output channel

    def keep(self, base: Any) -> None:
        """Take over the base's weights and all that it is."""
        nn.Module.__init__(self)
        plain = {k: v for k, v in vars(base).items() if k not in vars(self)}
        vars(self).update(plain)
        self.training, self.dtype = base.training, base.weight.dtype
        weight = base.weight.detach().float()
        scale = weight.flatten(1).abs().amax(1).clamp_min(torch.finfo(torch.float32).tiny) / LEVELS
        scale = scale.view(-1, *[1] * (weight.ndim - 1))
        self.register_buffer("codes", (weight / scale).round().to(torch.int8))
        self.register_buffer("scale", scale)
        self.register_parameter("bias", base.bias)

    @property
    def weight(self) -> Tensor:
        return (self.codes * self.scale).to(self.dtype)


class Linear8(_Stored, nn.Linear):  # type: ignore[override]
    def __init__(self, base: nn.Linear) -> None:
        self.keep(base)


class Conv8(_Stored, nn.Conv2d):  # type: ignore[override]
    def __init__(self, base: nn.Conv2d) -> None:
        self.keep(base)


def store_in_eight_bits(network: nn.Module) -> None:
    """Replace the network's large layers by such; for good."""
    put_modules(network, {n: s for n, m in network.named_modules() if (s := _stored(m))})


def is_in_eight_bits(network: nn.Module) -> bool:
    return any(isinstance(module, _Stored) for module in network.modules())


def _stored(module: nn.Module) -> nn.Module | None:
    if not isinstance(module, (nn.Linear, nn.Conv2d)) or module.weight.numel() < SMALLEST:
        return None
    return Linear8(module) if isinstance(module, nn.Linear) else Conv8(module)
