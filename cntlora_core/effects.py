"""Settings that have no effect beside others, said in a sentence each: none is ignored in
silence."""

from __future__ import annotations

from .config import CALIBRATED, CalibrationConfig, TrainConfig


def without_effect_in_training(
    config: TrainConfig, *, validates: bool, has_prior: bool
) -> list[str]:
    """Of the training's settings, whose steps are known."""
    default = TrainConfig()
    rules = [
        (
            bool(config.warmup) and config.warmup >= config.steps,
            f"warmup is {config.warmup} and the run has {config.steps} steps: the learning rate "
            "never reaches its full height.",
        ),
        (
            config.patience not in (0, default.patience) and not validates,
            f"patience is {config.patience}, but nothing is validated: the run will not stop "
            "early. Set validate_every.",
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


def class_matters(config: CalibrationConfig, *, continued: bool) -> bool:
    """Whether calibration preserves a class when it is told of one."""
    return config.init in CALIBRATED and bool(config.preservation) and not continued


def without_effect_in_calibration(
    config: CalibrationConfig, *, continued: bool, has_class: bool
) -> list[str]:
    """Of the calibration's settings. `continued`: the start is a LoRA file, nothing is
    calibrated."""
    default = CalibrationConfig()

    def changed(*names: str) -> list[str]:
        return [name for name in names if getattr(config, name) != getattr(default, name)]

    if continued:
        ignored = changed("init", "rank", "rank_rule", "effort", "targets", "preservation", "rho")
        why = "the LoRA that is continued has its own start and ranks"
    elif config.init not in CALIBRATED:
        ignored = changed("rank_rule", "effort", "preservation", "rho")
        why = f"init is '{config.init}', which measures nothing"
    else:
        ignored = changed("effort") if config.init == "domain" else []
        why = "init 'domain' is one sweep"
        if not has_class and (unused := changed("preservation")):
            ignored, why = [*ignored, *unused], f"{why}, and no class is preserved"
            if ignored == unused:
                why = "there is no class to preserve"
    return [f"{', '.join(ignored)}: without effect, because {why}."] if ignored else []
