"""Every setting, with its text, range, choices and default: the command line, the nodes and their
help are made from these fields. Values are checked where they are made.

A new setting is a field here, and its use. Add it at the end of its class: saved workflows list
their values by place.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

from .settings import check_settings, setting

Init = Literal["target", "domain", "gaussian", "default"]
RankRule = Literal["data", "uniform"]
Effort = Literal["quick", "balanced", "thorough"]
Targets = Literal["auto", "attention", "attention+ff"]  # layers that get an adapter
Optimizer = Literal["auto", "natural", "adamw", "adamw8bit", "prodigy", "schedulefree"]
Schedule = Literal["constant", "cosine", "restarts"]

CALIBRATED: tuple[Init, ...] = ("target", "domain")  # the inits that look at the pictures
EFFORTS = {
    "quick": (4, 8),
    "balanced": (4, 48),
    "thorough": (4, 108),
}  # sweep, refinement: batches

MOST_STEPS = 1_000_000
STRENGTHS = (0.4, 0.6, 0.8, 1.0, 1.2)  # below, a LoRA hardly shows; above, it burns


def to_dict(config: DataConfig | CalibrationConfig | TrainConfig) -> dict[str, Any]:
    return asdict(config)


# What calibration and training have in common.


def _batch_size() -> Any:
    return setting(
        2,
        "Pictures a batch. Lower it when memory runs out; higher is steadier and slower.",
        low=1,
        high=1024,
        advanced=True,
    )


def _gradient_checkpointing() -> Any:
    return setting(
        False,
        "Far less memory, about a third slower. Off: on CUDA still on where the run would not fit "
        "without.",
        advanced=True,
    )


def _seed() -> Any:
    return setting(0, "Same seed, same pictures: the same result.", high=2**32 - 1, advanced=True)


@dataclass(frozen=True)
class DataConfig:
    """How pictures are shown to the model."""

    resolution: int = setting(
        0,
        "Side of a square picture in px, the area of others; auto is the model's own (512, 768 or "
        "1024). Larger shows more detail and costs memory and time; smaller is quick but soft.",
        low=16,
        high=4096,
        step=64,
        unit="px",
        auto=True,
    )
    buckets: bool = setting(
        True,
        "Train pictures in their own shape, at the resolution's area. Off: cut out the centred "
        "square.",
        advanced=True,
    )
    flip: bool = setting(
        False,
        "Mirrored pictures too. Not for faces, writing or anything with a left and right.",
        advanced=True,
    )
    random_crop: bool = setting(
        False, "Several crops of each picture instead of the centre.", advanced=True
    )
    masked: bool = setting(
        False,
        "Learn only what a picture's mask shows: a file cat-masklabel.png or masks/cat.png, else "
        "its transparency. Off: transparent parts are white and are learnt.",
        advanced=True,
    )
    upscale: bool = setting(False, "Enlarge small pictures to the resolution.", advanced=True)
    hold_out: bool = setting(
        True,
        "Leave the last of 5 or more pictures out of calibration and training, to validate with. "
        "Off where other pictures validate.",
        advanced=True,
    )
    add_trigger: bool = setting(
        True,
        "Put the trigger in front of captions that lack it. Off: what they show does not answer to "
        "it.",
        advanced=True,
    )
    shuffle_tags: bool = setting(
        False,
        "Show a caption's tags (between commas) in other orders, so that no place matters. For "
        "booru tags, not for sentences.",
        advanced=True,
    )
    keep_tags: int = setting(
        1,
        "Tags at the front that are never shuffled or left out: the trigger. A ||| in a caption "
        "marks another place.",
        high=75,
        advanced=True,
    )
    tag_dropout: float = setting(
        0.0,
        "Share of the other tags left out each time, so that what they name is learnt without "
        "them too.",
        high=1,
        step=0.05,
        advanced=True,
    )
    caption_variants: int = setting(
        8,
        "Orders of a caption's tags that are encoded ahead. More cost memory: at SD 1.5's size "
        "0.2 MB each for every picture.",
        low=1,
        high=64,
        advanced=True,
    )
    unmasked_weight: float = setting(
        0.0,
        "How much counts what a mask hides, beside 1 for what it shows. A little, 0.1, keeps "
        "surroundings sane.",
        high=1,
        step=0.05,
        advanced=True,
    )

    use_captions: bool = setting(
        True,
        "Read the captions beside the pictures (cat.txt, metadata.jsonl). Off: the prompt for all.",
        advanced=True,
    )

    def __post_init__(self) -> None:
        check_settings(self)


@dataclass(frozen=True)
class CalibrationConfig:
    """How the LoRA starts. `rank` sets the budget: the parameters of a LoRA of that rank on the
    attention projections."""

    init: Init = setting(
        "target",
        "target: fits what the denoising loss asks for, usable before training. domain: forward "
        "passes only, less memory, a weaker start. gaussian and default: ordinary LoRA starts, to "
        "compare with.",
    )
    rank: int = setting(
        4,
        "Mean rank, so the file's size. 4-8 for an object, 8-16 for a face or a style. Too high "
        "learns the background too; too low misses detail.",
        low=1,
        high=1024,
    )
    rank_rule: RankRule = setting(
        "data",
        "data: layers that matter for this subject get more rank, others less, the file stays the "
        "same size. uniform: the same rank everywhere.",
    )
    seed: int = _seed()
    effort: Effort = setting(
        "balanced",
        "How long init target calibrates. quick: a look, 12 batches. balanced: 52 batches of 2, "
        "the time of about 30 training steps of 4 pictures. thorough: 112, about 60.",
    )
    batch_size: int = _batch_size()
    targets: Targets = setting(
        "auto",
        "Layers that get an adapter. auto: attention and, for calibrated inits with data ranks, "
        "feed-forward; in SDXL attention alone, which takes less memory. The file's size is the "
        "same.",
        advanced=True,
    )
    # 4 kept the subject's loss and most of the class (docs/method.md)
    preservation: float = setting(
        4.0,
        "Weight of the prior, when there is one. Higher forgets less and fits a little less.",
        high=1000,
        step=0.1,
        advanced=True,
    )
    gradient_checkpointing: bool = _gradient_checkpointing()
    # 0.5 was best or level among 0.1 to 2
    rho: float = setting(
        0.5,
        "Damping of the second moments, as a share of their mean. Higher trusts the pictures less.",
        low=1e-3,
        high=1000,
        step=0.1,
        advanced=True,
    )

    @property
    def passes(self) -> int:
        """Batches of the sweep."""
        return EFFORTS[self.effort][0]

    @property
    def refinements(self) -> int:
        """Batches after the sweep, each a natural-gradient step."""
        return EFFORTS[self.effort][1]

    def __post_init__(self) -> None:
        check_settings(self)


@dataclass(frozen=True)
class TrainConfig:
    """The DreamBooth loop. One step sees `batch_size * accumulation` pictures."""

    steps: int = setting(
        0,
        "Training steps. auto: by model, start and pictures (after a calibration 50 a picture, 200 "
        "to 600 in all; from an ordinary start twice as many; 100 on the embedded model). Too "
        "many, and pictures copy the training set; too few, and likeness is missing.",
        low=1,
        high=MOST_STEPS,
        auto=True,
    )
    # one rate for both factors: unit response makes it carry over between layers
    learning_rate: float = setting(
        0.0,
        "The optimiser's step; natural-gradient steps, which go on after init target, need none. "
        "auto: by model, start and optimizer (0.0005 after a calibration, 0.0001 for an ordinary "
        "start; 0.003 and 0.01 on the embedded model; 1 with prodigy). Too high: loss jumps, "
        "pictures burn. Too low: nothing happens.",
        low=1e-8,
        high=10,
        auto=True,
    )
    seed: int = _seed()
    batch_size: int = _batch_size()
    validate_every: int = setting(
        10,
        "Steps between validations; 0: never. 10 becomes more where they would take over a tenth "
        "of the run.",
        high=MOST_STEPS,
        unit="steps",
        advanced=True,
    )
    weight_decay: float = setting(
        0.01, "Pulls the LoRA towards zero.", high=1, step=0.001, advanced=True
    )
    gradient_checkpointing: bool = _gradient_checkpointing()
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
        "constant", "Of the rate after warmup. cosine ends at 0; restarts does so three times."
    )
    warmup: float = setting(
        0.0,
        "Steps in which the learning rate rises; below 1: a share of all steps.",
        high=MOST_STEPS,
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
        "A gradient longer than this is cut to it. Lower it when the loss jumps.",
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
