"""How pictures are shown to the model."""

from __future__ import annotations

from dataclasses import dataclass

from ..settings import check_settings, setting


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
        False,
        "Four crops of each picture, up to a twentieth closer in, so that the place in the picture "
        "is not learnt. It needs more steps; where pictures are few it overfits later.",
        advanced=True,
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
        "Leave the last of 5 or more pictures, by name, out of calibration and training: it "
        "validates, and says at what strength the LoRA fits. Where other pictures validate, or "
        "none, training takes it too.",
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
        "Tags at the front that are never shuffled or left out: the trigger. Three bars in a "
        "caption mark another place.",
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
        "0.12 MB each for every picture in half precision.",
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
