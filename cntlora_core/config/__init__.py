"""Every setting, with its text, range, choices and default: the command line, the nodes and their
help are made from these fields. Values are checked where they are made.

A new setting is a field here, and its use. Add it at the end of its class: saved workflows list
their values by place.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from .calibration import CALIBRATED, EFFORTS, CalibrationConfig, Init
from .common import MOST_STEPS
from .data import DataConfig
from .model import CHUNK, ModelConfig, Prediction
from .run import RunConfig
from .sampling import STRENGTHS, SampleConfig
from .training import TrainConfig

__all__ = [
    "CALIBRATED",
    "CHUNK",
    "EFFORTS",
    "MOST_STEPS",
    "STRENGTHS",
    "CalibrationConfig",
    "DataConfig",
    "Init",
    "ModelConfig",
    "Prediction",
    "RunConfig",
    "SampleConfig",
    "TrainConfig",
    "to_dict",
]


def to_dict(config: DataConfig | CalibrationConfig | TrainConfig) -> dict[str, Any]:
    return asdict(config)
