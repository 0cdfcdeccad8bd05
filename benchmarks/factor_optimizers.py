"""Optimisers that see a LoRA's factors as matrices, on the one tensor in which they lie."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from cntlora_core.lora.adapter import Adapters, Factors

DAMPING = 1e-6  # of the preconditioner, that of its authors


class OnFactors(torch.optim.Optimizer):
    """The steps of `make(parameters)`, whose parameters are the factors of `adapters`; gradients
    are `preconditioned` before."""

    def __init__(
        self,
        adapters: Adapters,
        make: Callable[[list[nn.Parameter]], torch.optim.Optimizer],
        preconditioned: Callable[[Factors, Factors], Factors] = lambda _, gradient: gradient,
    ) -> None:
        super().__init__([adapters.flat], {"lr": 0.0})
        self.adapters, self.preconditioned = adapters, preconditioned
        # parameters in the same memory as `flat`
        self.parameters = {
            name: (nn.Parameter(own.up), nn.Parameter(own.down))
            for name, own in adapters.weights.items()
        }
        self.inner = make([part for pair in self.parameters.values() for part in pair])

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        assert self.adapters.flat.grad is not None
        for name, gradient in self.adapters.split(self.adapters.flat.grad).items():
            up, down = self.parameters[name]
            own = self.preconditioned(Factors(up, down), gradient)
            up.grad, down.grad = own.up.contiguous(), own.down.contiguous()
        for settings in self.inner.param_groups:
            settings["lr"] = self.param_groups[0]["lr"]
        self.inner.step()


def riemannian(factors: Factors, gradient: Factors) -> Factors:
    """dB (A A^T + delta)^-1 and (B^T B + delta)^-1 dA (Zhang & Pilanci 2024, equation 1)."""
    return Factors(
        torch.linalg.solve(_damped(factors.down @ factors.down.T), gradient.up.T).T,
        torch.linalg.solve(_damped(factors.up.T @ factors.up), gradient.down),
    )


def _damped(gram: Tensor) -> Tensor:
    return gram + DAMPING * torch.eye(len(gram), dtype=gram.dtype)


def factor_optimizer(name: str, adapters: Adapters) -> OnFactors:
    """`muon` (Jordan et al. 2024, as torch has it, steps as long as AdamW's) or `riemannian`
    AdamW."""
    if name == "muon":
        return OnFactors(
            adapters,
            lambda parameters: torch.optim.Muon(
                parameters, weight_decay=0.0, adjust_lr_fn="match_rms_adamw"
            ),
        )
    return OnFactors(
        adapters, lambda parameters: torch.optim.AdamW(parameters, betas=(0.9, 0.99)), riemannian
    )
