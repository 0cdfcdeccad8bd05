"""At what strength a LoRA is judged: whole ones differ in how far they go before all else."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from cntlora_core.lora.adapter import LoRA, attached_lora, scaled
from cntlora_core.model.loader import StableDiffusion

STRENGTHS = (1.0, 0.8, 0.6, 0.4)


def strongest_strength(
    loss: Callable[[float], float], strengths: Sequence[float] = STRENGTHS
) -> tuple[float, float]:
    """(strength, loss): from the whole downwards until the loss rises."""
    best = strengths[0], loss(strengths[0])
    for strength in strengths[1:]:
        if (tried := loss(strength)) >= best[1]:
            break
        best = strength, tried
    return best


def strongest(
    model: StableDiffusion, lora: LoRA, validate: Callable[[], float]
) -> tuple[float, float]:
    """(strength, loss) of a LoRA that is not attached."""

    def at(strength: float) -> float:
        with attached_lora(model.unet, scaled(lora, strength)):
            return validate()

    return strongest_strength(at)
