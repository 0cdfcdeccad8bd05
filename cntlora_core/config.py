"""Settings, as frozen dataclasses. Values are checked where they are made; unknown names are
refused."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, TypeVar

from .errors import SettingError

CALIBRATED = ("target", "domain")
INITS = (*CALIBRATED, "gaussian", "default")
RANK_RULES = ("data", "uniform")
EFFORTS = {
    "quick": (8, 0),
    "balanced": (4, 20),
    "thorough": (4, 64),
}  # batches of the sweep, batches that refine it

TARGETS = ("auto", "attention", "attention+ff")  # layers that get an adapter

OPTIMIZERS = ("adamw", "adamw8bit", "prodigy")
SCHEDULES = ("constant", "cosine")

Config = TypeVar("Config", "DataConfig", "CalibrationConfig", "TrainConfig")


def _require(ok: bool, name: str, value: object, expected: str) -> None:
    if not ok:
        raise SettingError(f"{name} is {value!r}: it must be {expected}.")


def _finite(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def from_dict(kind: type[Config], values: Mapping[str, Any]) -> Config:
    """Build a config from plain values. Raises SettingError for a name it does not know."""
    known = {f.name for f in fields(kind)}
    unknown = sorted(set(values) - known)
    if unknown:
        raise SettingError(
            f"Unknown setting {', '.join(unknown)}: known are {', '.join(sorted(known))}."
        )
    return kind(**values)


def to_dict(config: DataConfig | CalibrationConfig | TrainConfig) -> dict[str, Any]:
    return asdict(config)


@dataclass(frozen=True)
class DataConfig:
    """How pictures are shown to the model.

    `resolution`: side in px of a square picture, the area of others; None is the model's own.
    `buckets`: keep the pictures' shapes (else the centred square). `upscale`: enlarge small
    pictures to the resolution. `random_crop` and `flip` encode several views of each. `masked`:
    only what the alpha channel shows counts in the loss (else it lies on white).
    """

    resolution: int | None = None
    buckets: bool = True
    upscale: bool = False
    random_crop: bool = False
    flip: bool = False
    masked: bool = False

    def __post_init__(self) -> None:
        size = self.resolution
        _require(
            size is None or (isinstance(size, int) and size >= 1),
            "resolution",
            size,
            "1 or more px, or None",
        )


@dataclass(frozen=True)
class CalibrationConfig:
    """How the LoRA starts.

    `targets`: the attention projections, or those and the feed-forward layers (auto: by the model).
    `rank` sets the budget: the parameters of a LoRA of that rank on the attention projections;
    `data` ranks spend them where they lower the loss most. `effort` says how long to measure:
    `quick` is one sweep, `balanced` and `thorough` refine it a batch at a time. `rho` damps the
    second moments: 0.5 was best or level among 0.1 to 2. `preservation` is the weight lambda of the
    prior's second moment, when there is a prior: 4 kept the subject's loss and most of the class
    (docs/method.md).
    """

    init: str = "target"
    rank: int = 4
    rank_rule: str = "data"
    targets: str = "auto"
    effort: str = "balanced"
    batch_size: int = 4
    rho: float = 0.5
    preservation: float = 4.0
    seed: int = 0
    gradient_checkpointing: bool = False

    @property
    def passes(self) -> int:
        """Batches of the sweep."""
        return EFFORTS[self.effort][0]

    @property
    def refinements(self) -> int:
        """Batches after the sweep, each a natural-gradient step."""
        return EFFORTS[self.effort][1]

    def __post_init__(self) -> None:
        _require(self.init in INITS, "init", self.init, f"one of {', '.join(INITS)}")
        _require(
            self.rank_rule in RANK_RULES,
            "rank_rule",
            self.rank_rule,
            f"one of {', '.join(RANK_RULES)}",
        )
        _require(
            isinstance(self.rank, int) and 1 <= self.rank <= 1024,
            "rank",
            self.rank,
            "between 1 and 1024",
        )
        _require(self.targets in TARGETS, "targets", self.targets, f"one of {', '.join(TARGETS)}")
        _require(self.effort in EFFORTS, "effort", self.effort, f"one of {', '.join(EFFORTS)}")
        _require(1 <= self.batch_size <= 1024, "batch_size", self.batch_size, "between 1 and 1024")
        _require(_finite(self.rho) and self.rho > 0, "rho", self.rho, "a positive number")
        _require(
            _finite(self.preservation) and self.preservation >= 0,
            "preservation",
            self.preservation,
            "0 or more",
        )


@dataclass(frozen=True)
class TrainConfig:
    """The DreamBooth loop. `lr` is the optimiser's learning rate for both factors (unit response
    makes it carry over between layers); `warmup` steps lead up to it, then it stays or falls with a
    `cosine` to 0.

    One step sees `batch_size * accumulation` pictures. `min_snr_gamma` (Hang et al. 2023; 0: off)
    weighs timesteps, `noise_offset` (0: off) lets pictures become darker or brighter as a whole,
    `caption_dropout` is the share of pictures trained without words, `prior_weight` is that of the
    prior loss, where there is a prior. With a validation, `keep_best` keeps the weights of its
    lowest loss, and `patience` validations without a better one end the run (0: never).
    """

    steps: int = 100
    lr: float = 3e-3
    batch_size: int = 4
    accumulation: int = 1
    optimizer: str = "adamw"
    weight_decay: float = 1e-2
    max_grad_norm: float = 1.0
    schedule: str = "constant"
    warmup: int = 0
    min_snr_gamma: float = 0.0
    noise_offset: float = 0.0
    caption_dropout: float = 0.0
    prior_weight: float = 1.0
    validate_every: int = 10
    keep_best: bool = True
    patience: int = 0
    seed: int = 0
    gradient_checkpointing: bool = False

    def __post_init__(self) -> None:
        def whole(name: str, low: int, high: int) -> None:
            value = getattr(self, name)
            ok = isinstance(value, int) and not isinstance(value, bool) and low <= value <= high
            _require(ok, name, value, f"between {low} and {high}")

        def number(name: str, ok: Callable[[float], bool], expected: str) -> None:
            value = getattr(self, name)
            _require(_finite(value) and ok(value), name, value, expected)

        whole("steps", 0, 1_000_000)
        whole("batch_size", 1, 1024)
        whole("accumulation", 1, 1024)
        whole("warmup", 0, 1_000_000)
        whole("validate_every", 0, 1_000_000)
        whole("patience", 0, 1_000_000)
        number("lr", lambda v: 0 < v <= 10, "a positive number up to 10")
        number("max_grad_norm", lambda v: v > 0, "positive")
        for name in ("weight_decay", "min_snr_gamma", "noise_offset", "prior_weight"):
            number(name, lambda v: v >= 0, "0 or more")
        number("caption_dropout", lambda v: 0 <= v <= 1, "between 0 and 1")
        _require(
            self.optimizer in OPTIMIZERS,
            "optimizer",
            self.optimizer,
            f"one of {', '.join(OPTIMIZERS)}",
        )
        _require(
            self.schedule in SCHEDULES, "schedule", self.schedule, f"one of {', '.join(SCHEDULES)}"
        )

    def lr_at(self, step: int) -> float:
        """The learning rate of step 1, 2, ... `steps`."""
        if step <= self.warmup:
            return self.lr * step / (self.warmup + 1)
        if self.schedule == "constant":
            return self.lr
        done = (step - self.warmup - 1) / max(1, self.steps - self.warmup)
        return self.lr * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))
