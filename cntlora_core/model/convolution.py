"""A convolution as what it is to an adapter: a linear map of patches, whose rows are a weight's
`[d]`, d = channels x kernel, as `weight.flatten(1)` has them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.grad import conv2d_weight

Pair = tuple[int, int]  # vertical, horizontal


@dataclass(frozen=True)
class Convolution:
    """How it goes over its input. No patch is ever made but those that are asked for."""

    kernel: Pair
    stride: Pair
    padding: Pair

    @classmethod
    def of(cls, module: nn.Module) -> Convolution | None:
        """None for other modules, and for kinds that Stable Diffusion has not."""
        if not isinstance(module, nn.Conv2d) or isinstance(module.padding, str):
            return None
        plain = module.groups == 1 and module.padding_mode == "zeros"
        if not plain or set(module.dilation) != {1}:
            return None
        pairs = (tuple(p) for p in (module.kernel_size, module.stride, module.padding))
        return cls(*pairs)  # type: ignore[arg-type]

    def __call__(self, x: Tensor, rows: Tensor) -> Tensor:
        """Of pictures x `[n, channels, height, width]` what each of `rows` `[k, d]` answers,
        `[n, k, height', width']`."""
        weight = rows.reshape(len(rows), -1, *self.kernel)
        return F.conv2d(x, weight, stride=self.stride, padding=self.padding)

    def outer(self, x: Tensor, answers: Tensor) -> Tensor:
        """The sum over places of `answers` `[n, k, height', width']` times the patch that each is
        of, `[k, d]`."""
        size = (answers.shape[1], x.shape[1], *self.kernel)
        found = conv2d_weight(x, size, answers, stride=self.stride, padding=self.padding)  # type: ignore[no-untyped-call]
        return found.flatten(1)

    def index(self, x: Tensor, places: Tensor) -> Tensor:
        """The rows and columns `[2, p]` of `places` `[p]` of the outputs, counted along the rows;
        one for all pictures of x's size."""
        _, width = self.size(x)
        return torch.stack([places // width, places % width])

    def patches(self, x: Tensor, index: Tensor) -> Tensor:
        """Those that `index` says, `[n, p, d]`."""
        (below, beside), rows, columns = self.padding, *index
        windows = F.pad(x, (beside, beside, below, below))
        for axis, size, step in zip((2, 3), self.kernel, self.stride, strict=True):
            windows = windows.unfold(axis, size, step)  # views
        return windows[:, :, rows, columns].permute(0, 2, 1, 3, 4).flatten(2)

    def size(self, x: Tensor) -> Pair:
        """Height and width of the outputs."""
        height, width = (
            (side + 2 * padding - kernel) // stride + 1
            for side, padding, kernel, stride in zip(
                x.shape[2:], self.padding, self.kernel, self.stride, strict=True
            )
        )
        return height, width
