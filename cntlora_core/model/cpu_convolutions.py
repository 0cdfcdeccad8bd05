"""Convolutions of few places and many channels as matrix products: faster on the CPU, the same sums
in another order."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypeGuard

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .convolution import Convolution
from .swap_modules import swapped_modules

# The CPU's convolution reorders its weights in every call, which costs as the weights; a product
# reorders its input, which costs as the places it is evaluated at. Measured on Stable Diffusion
# 1.5's shapes (docs/performance.md), the second is cheaper from here on.
CHANNELS_PER_PLACE = 5
# Smaller ones take less than asking costs.
FEWEST_CHANNELS = 256
# Below, the product runs at the speed of memory only with its rows one after another.
FEW_PLACES = 16


class ProductConv(nn.Conv2d):
    """A frozen convolution, evaluated as a matrix product where that is faster. All that `base` is,
    and with its weights."""

    def __init__(self, base: nn.Conv2d) -> None:
        nn.Module.__init__(self)
        vars(self).update(vars(base))
        over = Convolution.of(base)
        assert over is not None
        self.over = over

    def forward(self, x: Tensor) -> Tensor:
        over = self.over
        height, width = over.size(x)
        places = len(x) * height * width
        if places * CHANNELS_PER_PLACE > self.out_channels:
            return super().forward(x)
        patches = F.unfold(x, over.kernel, 1, over.padding, over.stride)
        rows = patches.transpose(0, 1).reshape(-1, places).T
        if places < FEW_PLACES:
            rows = rows.contiguous()
        y = F.linear(rows, self.weight.flatten(1), self.bias)
        return y.T.reshape(-1, len(x), height, width).transpose(0, 1).contiguous()


@contextmanager
def convolutions_as_matmul(unet: nn.Module) -> Iterator[None]:
    """Evaluate the UNet's convolutions as products where that is faster; its own modules are back
    when the block ends.

    Does nothing on other devices and in other precisions, whose libraries choose for themselves.
    """
    products = {
        name: ProductConv(module)
        for name, module in unet.named_modules()
        if _can_be_product(module)
    }
    with swapped_modules(unet, products):
        yield


def _can_be_product(module: nn.Module) -> TypeGuard[nn.Conv2d]:
    return (
        type(module) is nn.Conv2d
        and (module.weight.device.type, module.weight.dtype) == ("cpu", torch.float32)
        and module.out_channels >= FEWEST_CHANNELS
        and Convolution.of(module) is not None
    )
