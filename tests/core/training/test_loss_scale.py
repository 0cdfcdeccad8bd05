"""A moving loss scale does what torch's GradScaler does."""

import dataclasses

import pytest
import torch

from cntlora_core.calibration.calibrate import calibrate
from cntlora_core.config import CalibrationConfig, TrainConfig
from cntlora_core.errors import NonFiniteError
from cntlora_core.lora.adapter import attached_lora
from cntlora_core.training.loop import train
from cntlora_core.training.loss_scale import LEAST, PATIENCE, LossScale
from cntlora_core.training.state import start_state


def test_it_moves_as_torchs_does():
    ours, theirs = LossScale.start(moving=True), torch.amp.GradScaler("cpu")
    weight = torch.nn.Parameter(torch.ones(1))
    optimizer = torch.optim.SGD([weight], lr=0)
    theirs.scale(weight)  # it makes its scale at the first use
    assert ours.value == theirs.get_scale()
    ours.good = PATIENCE - 3
    theirs.load_state_dict(theirs.state_dict() | ours.state_dict())
    for finite in (True, True, True, True, False, False, True):
        weight.grad = torch.full((1,), 1.0 if finite else torch.inf)
        theirs.unscale_(optimizer)
        theirs.step(optimizer)
        theirs.update()
        ours.update(finite)
        assert ours.state_dict().items() <= theirs.state_dict().items()
    for held in (theirs, ours):  # a checkpoint of either
        again = LossScale.start(moving=True)
        again.load_state_dict(held.state_dict())
        assert again == ours


def test_a_scale_that_does_not_move_is_one():
    scale = LossScale.start(moving=False)
    scale.update(finite=False)
    assert (scale.value, scale.state_dict()) == (1.0, {})


@pytest.mark.parametrize("init", ["gaussian", "target"])
def test_a_gradient_that_overflows_is_left_out(mini_sd, subject, init):
    """Weights stay, the next step is smaller in scale, and nothing of it reaches later steps."""
    start = calibrate(mini_sd, subject, CalibrationConfig(init=init, effort="quick", batch_size=1))
    config = TrainConfig(steps=2, learning_rate=3e-3, batch_size=1, validate_every=0)
    half = dataclasses.replace(mini_sd)  # fp32 passes with fp16's scale
    with attached_lora(half.unet, start.lora, trainable=True) as adapters:
        state = start_state(half, adapters, config, start.natural, start.importance)
        state.scaler = LossScale.start(moving=True)
        state.scaler.value = 1e45  # so that the first gradient overflows
        before = state.live.clone()
        train(half, subject, state, dataclasses.replace(config, steps=1))
        assert torch.equal(state.live, before)
        assert state.scaler.value == 1e45 / 2
        state.scaler.value = 8.0
        train(half, subject, state, config)
    assert not torch.equal(state.live, before)
    assert torch.isfinite(state.live).all()


def test_a_gradient_that_is_no_number_at_any_scale_is_told(mini_sd, subject, monkeypatch):
    start = calibrate(mini_sd, subject, CalibrationConfig(init="gaussian", rank=1))
    config = TrainConfig(steps=99, learning_rate=3e-3, batch_size=1, validate_every=0)
    with attached_lora(mini_sd.unet, start.lora, trainable=True) as adapters:
        state = start_state(mini_sd, adapters, config)
        state.scaler = LossScale.start(moving=True)
        gradient = state.adapters.gradient
        monkeypatch.setattr(adapters, "gradient", lambda scale: gradient(scale).mul_(torch.nan))
        with pytest.raises(NonFiniteError, match="gradient became NaN"):
            train(mini_sd, subject, state, config)
    assert state.scaler.value == LEAST
