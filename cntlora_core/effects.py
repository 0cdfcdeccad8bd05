"""Settings that have no effect beside others, said in a sentence each: none is ignored in
silence."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .config import CALIBRATED, CalibrationConfig, DataConfig, SampleConfig, TrainConfig


def without_effect_in_data(config: DataConfig) -> list[str]:
    """Of how pictures are shown."""
    tags = [] if config.shuffle_tags or config.tag_dropout else ["keep_tags", "caption_variants"]
    masks = [] if config.masked else ["unmasked_weight"]
    return [
        *_said(_changed(config, *tags), "tags are neither shuffled nor left out"),
        *_said(_changed(config, *masks), "nothing is masked"),
    ]


def without_effect_in_training(config: TrainConfig, validates: bool, has_prior: bool) -> list[str]:
    """Of the training's settings, whose steps are known."""
    default = TrainConfig()
    rules = [
        (
            bool(config.warmup) and config.warmup_steps >= config.steps,
            f"warmup is {config.warmup:g} and the run has {config.steps} steps: the learning rate "
            "never reaches its full height.",
        ),
        (
            config.debiased and bool(config.min_snr_gamma),
            f"min_snr_gamma is {config.min_snr_gamma:g}, but debiased takes its place: it has no "
            "effect.",
        ),
        (
            config.patience not in (0, default.patience) and not validates,
            f"patience is {config.patience}, but nothing is validated: the run will not stop "
            "early. Set validate_every.",
        ),
        (
            not config.keep_best and not validates,
            "keep_best is off, but nothing is validated: the last weights are given out anyway.",
        ),
        (
            config.prior_weight != default.prior_weight and not has_prior,
            f"prior_weight is {config.prior_weight:g}, but there is no prior loss: it has no "
            "effect.",
        ),
        (
            has_prior and not config.prior_weight,
            "prior_weight is 0: the prior loss has no effect.",
        ),
    ]
    return [text for holds, text in rules if holds]


def without_effect_on_natural_steps(config: TrainConfig, rate: float) -> list[str]:
    """Of the training's settings. `rate`: the learning rate where nobody asks for one."""
    ignored = _changed(config, "weight_decay", "schedule", "warmup", "max_grad_norm")
    if config.learning_rate not in (0, rate):
        ignored.insert(0, "learning_rate")
    return _said(ignored, "natural-gradient steps have their own length (adamw would use it)")


def class_matters(config: CalibrationConfig, *, continued: bool) -> bool:
    """Whether calibration preserves a class when it is told of one."""
    return config.init in CALIBRATED and bool(config.preservation) and not continued


def without_effect_in_calibration(
    config: CalibrationConfig, *, continued: bool, has_class: bool
) -> list[str]:
    """Of the calibration's settings. `continued`: the start is a LoRA file, nothing is
    calibrated."""
    if continued:
        ignored = ["init", "rank", "rank_rule", "effort", "targets", "preservation", "rho"]
        why = "the LoRA that is continued has its own start and ranks"
        return _said(_changed(config, *ignored), why)
    if config.init not in CALIBRATED:
        why = f"init is '{config.init}', which measures nothing"
        return _said(_changed(config, "rank_rule", "effort", "preservation", "rho"), why)
    sweep = ["effort"] if config.init == "domain" else []
    preserved = [] if has_class else ["preservation"]
    return [
        *_said(_changed(config, *sweep), "init 'domain' is one sweep"),
        *_said(_changed(config, *preserved), "there is no class to preserve"),
    ]


def without_effect_in_sampling(config: SampleConfig, *, has_lora: bool) -> list[str]:
    """Of how pictures are drawn."""
    if not has_lora:
        return _said(_changed(config, "strength", "strength_grid"), "there is no LoRA")
    own = ["strength"] if config.strength_grid else []
    return _said(_changed(config, *own), "strength_grid draws at its own strengths")


def _changed(config: Any, *names: str) -> list[str]:
    default = type(config)()
    return [name for name in names if getattr(config, name) != getattr(default, name)]


def _said(names: Sequence[str], why: str) -> list[str]:
    return [f"{', '.join(names)}: without effect, because {why}."] if names else []
