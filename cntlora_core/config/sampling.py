"""How pictures are drawn with a LoRA."""

from __future__ import annotations

from dataclasses import dataclass

from ..settings import check_settings, setting

STRENGTHS = (0.4, 0.6, 0.8, 1.0, 1.2)  # below, a LoRA hardly shows; above, it burns


@dataclass(frozen=True)
class SampleConfig:
    """How pictures are drawn with a LoRA."""

    strength: float = setting(
        1.0,
        "1 as trained, 0 not at all. Below 1 is softer and more flexible; above 1 soon burns.",
        low=-4,
        high=4,
        step=0.05,
    )
    count: int = setting(4, "Number of pictures.", low=1, high=64)
    seed: int = setting(
        0, "Noise of the first picture; the others count up.", high=2**32 - 1, advanced=True
    )
    steps: int = setting(
        25, "DDIM steps; below 15 is rough, above 50 no better.", low=1, high=1000, advanced=True
    )
    guidance: float = setting(
        4.0,
        "How closely to follow the prompt. 4-8; higher is harsher, 1 ignores guidance.",
        low=1,
        high=30,
        step=0.5,
        advanced=True,
    )

    strength_grid: bool = setting(
        False, "Draw at strengths 0.4, 0.6, 0.8, 1 and 1.2 instead, a row for each.", advanced=True
    )

    def __post_init__(self) -> None:
        check_settings(self)
