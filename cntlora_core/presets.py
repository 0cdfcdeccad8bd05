"""Kinds of subjects, and the settings that suit each: one choice in place of ten.

None of these numbers was measured on a real checkpoint. They are what trainers' documentation and
users settle on; of each, `measured` says what the embedded model has shown.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, TypeVar

Config = TypeVar("Config")


@dataclass(frozen=True)
class Preset:
    """`settings` by name, of whichever class has them; `steps`: of the automatic number."""

    reason: str
    measured: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    steps: float = 1.0


NONE = "none"
PRESETS = {
    NONE: Preset("Every setting as it says.", ""),
    "object": Preset(
        "A thing is one shape: the defaults, rank 4, and not mirrored, for its writing.",
        "rank 4 on six subjects, docs/results.md",
        {"rank": 4, "flip": False},
    ),
    "character": Preset(
        "Clothes and places change, so tags are shuffled and some left out; rank 8, more steps.",
        "its tags on two subjects: no worse, docs/experiments.md",
        {"rank": 8, "shuffle_tags": True, "tag_dropout": 0.1},
        steps=1.5,
    ),
    "face": Preset(
        "Small differences from all other faces, which must stay as they are: rank 8, never "
        "mirrored, twice the preservation.",
        "unmeasured",
        {"rank": 8, "flip": False, "preservation": 8.0},
    ),
    "style": Preset(
        "It is in everything and has no side: rank 16, mirrored, some pictures without words, "
        "little preserved, more steps.",
        "unmeasured",
        {"rank": 16, "flip": True, "caption_dropout": 0.05, "preservation": 1.0},
        steps=1.5,
    ),
}


def with_preset(config: Config, name: str) -> Config:
    """The settings with the preset's wherever they have their default."""
    values = PRESETS[name].settings
    changed = {
        f.name: values[f.name]
        for f in fields(config)  # type: ignore[arg-type]
        if f.name in values and getattr(config, f.name) == f.default
    }
    return replace(config, **changed)  # type: ignore[type-var]


def help_text() -> str:
    """For the widget and the option: every preset with its reason."""
    kinds = [f"{name}: {p.reason}" for name, p in PRESETS.items() if name != NONE]
    stays = "what you change yourself stays (a value at its default counts as not said)."
    return " ".join([f"Settings by what is learnt; {stays}", *kinds])


def told(name: str) -> str:
    """What a preset sets, in a sentence."""
    preset = PRESETS[name]
    values = [f"{key} {str(v).lower()}" for key, v in preset.settings.items()]
    values += [f"{preset.steps:g} times the steps"] if preset.steps != 1 else []
    return f"Preset {name}: {', '.join(values)}, where you have not said otherwise."
