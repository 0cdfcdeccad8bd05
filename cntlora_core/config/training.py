"""The DreamBooth loop."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ..settings import check_settings, setting
from . import common

Optimizer = Literal["auto", "natural", "adamw", "adamw8bit", "prodigy", "schedulefree"]
Schedule = Literal["constant", "cosine", "restarts"]


@dataclass(frozen=True)
class TrainConfig:
    """The DreamBooth loop. One step sees `batch_size * accumulation` pictures."""

    steps: int = setting(
        0,
        "Training steps. auto: by model, start and pictures (after a calibration 50 a picture, 200 "
        "to 600 in all; from an ordinary start twice as many; 100 on the embedded model). Too "
        "few, and likeness is missing; too many, and pictures copy the training set where none is "
        "held out.",
        low=1,
        high=common.MOST_STEPS,
        auto=True,
    )
    # one rate for both factors: unit response makes it carry over between layers
    learning_rate: float = setting(
        0.0,
        "The optimiser's step; no effect on natural steps (after init target), which need none. "
        "auto: by model, start and optimizer (0.0005 after a calibration, 0.0001 for an ordinary "
        "start; 0.003 and 0.01 on the embedded model; 1 with prodigy). Too high: loss jumps, "
        "pictures burn. Too low: nothing happens.",
        low=1e-8,
        high=10,
        auto=True,
    )
    seed: int = common.seed()
    batch_size: int = common.batch_size()
    validate_every: int = setting(
        10,
        "Steps between validations; 0: never. 10 becomes more where they would take over a tenth "
        "of the run.",
        high=common.MOST_STEPS,
        unit="steps",
        advanced=True,
    )
    weight_decay: float = setting(
        0.01,
        "Pulls the LoRA towards zero. No effect on natural steps.",
        high=1,
        step=0.001,
        advanced=True,
    )
    gradient_checkpointing: bool = common.gradient_checkpointing()
    keep_best: bool = setting(
        True,
        "Give out the weights of the lowest validation loss, not the last: more steps than needed "
        "do no harm.",
    )
    patience: int = setting(
        5,
        "Stop after so many validations without a better one; 0: never.",
        high=10_000,
    )
    accumulation: int = setting(
        1,
        "Batches a step: a larger batch in the same memory, and as much slower.",
        low=1,
        high=1024,
    )
    schedule: Schedule = setting(
        "constant",
        "Of the rate after warmup. cosine ends at 0; restarts does so three times. No effect on "
        "natural steps, which fall by themselves.",
    )
    warmup: float = setting(
        0.0,
        "Steps in which the learning rate rises; below 1: a share of all steps. No effect on "
        "natural steps.",
        high=common.MOST_STEPS,
        step=0.05,
        unit="steps",
    )
    prior_weight: float = setting(
        1.0,
        "Of the prior loss. Lower it when the subject is not learnt, raise it when the class "
        "changes.",
        high=100,
        step=0.1,
    )
    optimizer: Optimizer = setting(
        "auto",
        "auto: natural after a calibration with init target, else adamw. natural: goes on with the "
        "steps of the calibration, which need no learning rate. The others need their packages "
        "(bitsandbytes, prodigyopt, schedulefree); prodigy finds its own rate.",
        advanced=True,
    )
    averaging: float = setting(
        0.95,
        "The LoRA is a running mean of the weights over the steps; this share of it stays at each. "
        "Smoother and less dependent on the learning rate. 0: the last weights alone.",
        high=0.9999,
        step=0.01,
        advanced=True,
    )
    # Hang et al. 2023
    min_snr_gamma: float = setting(
        0.0,
        "Weighs timesteps by their noise; 5 is usual, 0: off.",
        high=100,
        step=0.5,
        advanced=True,
    )
    noise_offset: float = setting(
        0.0,
        "Lets pictures become darker or brighter as a whole: 0.03 to 0.1, 0: off.",
        high=1,
        step=0.01,
        advanced=True,
    )
    caption_dropout: float = setting(
        0.0,
        "Share of pictures trained without words. For styles 0.05 to 0.1; more loosens the "
        "trigger.",
        high=1,
        step=0.01,
        advanced=True,
    )
    max_grad_norm: float = setting(
        1.0,
        "A gradient longer than this is cut to it. Lower it when the loss jumps. No effect on "
        "natural steps.",
        low=1e-6,
        high=1000,
        step=0.1,
        advanced=True,
    )
    # Yu et al. 2023
    debiased: bool = setting(
        False, "Weighs timesteps by 1 / sqrt(SNR), in place of min_snr_gamma.", advanced=True
    )
    # Ning et al. 2023: 0.1
    ip_noise: float = setting(
        0.0,
        "More noise in what the model sees than in what it shall find, against pile-up of errors; "
        "0.1 is usual, 0: off.",
        high=1,
        step=0.01,
        advanced=True,
    )

    def __post_init__(self) -> None:
        check_settings(self)

    @property
    def warmup_steps(self) -> int:
        return round(self.warmup * self.steps if self.warmup < 1 else self.warmup)
