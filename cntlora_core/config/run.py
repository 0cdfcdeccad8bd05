"""What surrounds calibration and training."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ..settings import check_settings, setting
from . import common

PriorName = Literal["images", "base", "masked", "none"]
SavePrecision = Literal["fp16", "fp32", "bf16"]


@dataclass(frozen=True)
class RunConfig:
    """What else the model should keep knowing, and what is written when."""

    prior_loss: PriorName = setting(
        "images",
        "A second loss while training. images: pictures of the class are trained beside the "
        "subject's, as DreamBooth does. base: the model is held to its own prediction under the "
        "class prompt, which needs no pictures. masked: to its own prediction where masks hide "
        "the subject's pictures, which needs no class. none: no second loss.",
    )
    class_count: int = setting(
        0,
        "Pictures of the class that the model draws. auto: 8, enough to calibrate with; 32 where "
        "the command line trains on them too. More cover the class better and take longer.",
        low=1,
        high=1000,
        unit="pictures",
        auto=True,
    )
    class_steps: int = setting(
        0,
        "Sampling steps of each of these pictures. auto: 12, enough to calibrate with; 25 where "
        "the command line trains on them too. For Train LoRA's prior give 25 and more pictures.",
        low=1,
        high=1000,
        unit="steps",
        auto=True,
    )
    continue_shared: bool = setting(
        False,
        "Of a LoRA that is continued, leave out layers that CNTLoRA does not train (text encoder, "
        "1 x 1 convolutions), and what they did. Off: a file that has any is refused.",
    )
    checkpoint_every: int = setting(
        100,
        "Keep what the run needs to go on after every so many steps, for when the computer stops; "
        "0: only when the run is stopped by hand. A run that ends needs it no more.",
        high=common.MOST_STEPS,
        unit="steps",
        advanced=True,
    )
    save_precision: SavePrecision = setting(
        "fp16",
        "Of the LoRA's file. fp16 is half the size of fp32 and looks the same; bf16 is coarser. "
        "fp32 to train on later.",
    )

    def __post_init__(self) -> None:
        check_settings(self)
