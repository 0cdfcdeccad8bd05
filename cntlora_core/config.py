"""Settings, as frozen dataclasses. Values are checked where they are made; unknown names are refused."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, TypeVar

from .errors import SettingError

INITS = ("target", "domain", "gaussian", "default")
RANK_RULES = ("data", "uniform")

Config = TypeVar("Config", "CalibrationConfig", "TrainConfig")


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
        raise SettingError(f"Unknown setting {', '.join(unknown)}: known are {', '.join(sorted(known))}.")
    return kind(**values)


def to_dict(config: CalibrationConfig | TrainConfig) -> dict[str, Any]:
    return asdict(config)


@dataclass(frozen=True)
class CalibrationConfig:
    """How the LoRA starts.

    `passes` batches of `batch_size` pictures are measured in each of `sweeps` sweeps; every sweep solves for
    its share of `rank` (the mean rank) with the earlier ones attached. `rho` damps the second moments: 0.1 was best or level
    among 0.02 to 1 in the prototype. `preservation` is the weight lambda of the prior's second moment, when there is a prior.
    """

    init: str = "target"
    rank: int = 4
    rank_rule: str = "data"
    sweeps: int = 1
    passes: int = 8
    batch_size: int = 4
    rho: float = 0.1
    preservation: float = 1.0
    seed: int = 0
    gradient_checkpointing: bool = False

    def __post_init__(self) -> None:
        _require(self.init in INITS, "init", self.init, f"one of {', '.join(INITS)}")
        _require(self.rank_rule in RANK_RULES, "rank_rule", self.rank_rule, f"one of {', '.join(RANK_RULES)}")
        _require(isinstance(self.rank, int) and 1 <= self.rank <= 1024, "rank", self.rank, "between 1 and 1024")
        _require(1 <= self.sweeps <= self.rank, "sweeps", self.sweeps, f"between 1 and the rank ({self.rank})")
        _require(1 <= self.passes <= 4096, "passes", self.passes, "between 1 and 4096")
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
    """The DreamBooth loop. `lr` is AdamW's learning rate for both factors (unit response makes it carry over between layers)."""

    steps: int = 100
    lr: float = 3e-3
    batch_size: int = 4
    weight_decay: float = 1e-2
    max_grad_norm: float = 1.0
    validate_every: int = 10
    seed: int = 0
    gradient_checkpointing: bool = False

    def __post_init__(self) -> None:
        _require(
            isinstance(self.steps, int) and 0 <= self.steps <= 1_000_000,
            "steps",
            self.steps,
            "between 0 and 1000000",
        )
        _require(_finite(self.lr) and 0 < self.lr <= 10, "lr", self.lr, "a positive number up to 10")
        _require(1 <= self.batch_size <= 1024, "batch_size", self.batch_size, "between 1 and 1024")
        _require(
            _finite(self.weight_decay) and self.weight_decay >= 0,
            "weight_decay",
            self.weight_decay,
            "0 or more",
        )
        _require(
            _finite(self.max_grad_norm) and self.max_grad_norm > 0,
            "max_grad_norm",
            self.max_grad_norm,
            "positive",
        )
        _require(self.validate_every >= 0, "validate_every", self.validate_every, "0 (never) or more")
