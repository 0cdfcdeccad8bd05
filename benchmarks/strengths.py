"""At what strength a LoRA is judged: whole ones differ in how far they go before all else."""

from __future__ import annotations

from collections.abc import Callable

from cntlora_core.lora.adapter import LoRA

STRENGTHS = (1.0, 0.8, 0.6, 0.4)


def scaled(lora: LoRA, strength: float) -> LoRA:
    return {name: factors.scaled(strength) for name, factors in lora.items()}


def strongest_strength(loss: Callable[[float], float]) -> tuple[float, float]:
    """(strength, loss): from the whole downwards until the loss rises."""
    best = STRENGTHS[0], loss(STRENGTHS[0])
    for strength in STRENGTHS[1:]:
        if (tried := loss(strength)) >= best[1]:
            break
        best = strength, tried
    return best
