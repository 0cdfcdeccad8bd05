"""How large a checkpoint becomes, from shapes alone: known before the first pass."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from ..calibration.moments import moment_bytes
from ..calibration.ranks import budget_of
from ..config import CALIBRATED, CalibrationConfig, TrainConfig
from ..lora.adapter import LoRA, parameter_count
from ..lora.targets import ALL, Projection, find_projections, targets_for

if TYPE_CHECKING:
    from ..model.loader import StableDiffusion

# The weights, those of the best validation and those of the last step, fp32; and what an optimiser
# keeps of each parameter.
WEIGHTS = 3
OPTIMIZER = {"prodigy": 4}  # two moments, s and the start; the others two moments at most
HEADER = 2_500  # bytes of names and shapes for each layer, at most


def parameters_of(
    model: StableDiffusion, calibration: CalibrationConfig, lora: LoRA | None = None
) -> int:
    """Of a LoRA to be made, or of the one that is trained on."""
    if lora:
        return parameter_count(lora)
    shared = calibration.init in CALIBRATED and calibration.rank_rule == "data"
    layers = find_projections(model.unet) if shared else _layers(model, calibration, None)
    return budget_of(layers, calibration.rank)


def state_bytes(
    model: StableDiffusion,
    calibration: CalibrationConfig,
    training: TrainConfig,
    lora: LoRA | None = None,
) -> int:
    """Of a checkpoint in the course of a run, at most. The settings' steps and optimizer are known
    (`defaults.resolve`)."""
    layers = _layers(model, calibration, lora)
    parameters = parameters_of(model, calibration, lora)
    kept = 4 * OPTIMIZER.get(training.optimizer, 2) * parameters
    if training.optimizer == "natural":  # or adamw, where calibration found no step
        kept = max(kept, moment_bytes(layers))
    return 4 * WEIGHTS * parameters + kept + HEADER * len(layers) + 8 * training.steps


def _layers(
    model: StableDiffusion, calibration: CalibrationConfig, lora: LoRA | None
) -> Sequence[Projection]:
    if lora:
        return [p for p in find_projections(model.unet, ALL) if p.name in lora]
    return find_projections(model.unet, targets_for(calibration))
