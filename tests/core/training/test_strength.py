"""A LoRA is given out at the strength that fits the pictures it was not fitted to."""

import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cntlora_core.calibration.calibrate import calibrate
from cntlora_core.config import CalibrationConfig, TrainConfig
from cntlora_core.events import Notice
from cntlora_core.lora.adapter import attached_lora
from cntlora_core.run.runs import run_training, run_untrained
from cntlora_core.training.strength import APART, LEAST, NEAR, Strength, fitted_strength
from cntlora_core.training.validation import validation_loss

QUICK = CalibrationConfig(effort="quick", rank=2)
reals = st.floats(0.01, 10)


def parabola(at, depth, bend):
    return lambda s: depth + bend * (s - at) ** 2


@given(at=st.floats(-1, 3), depth=reals, bend=reals, value=st.floats(LEAST, 1))
def test_a_parabola_is_found_at_once(at, depth, bend, value):
    loss = parabola(at, depth, bend)
    strength = Strength(loss(0.0), value)
    look, found = strength.learn(loss)
    assert strength.value == pytest.approx(min(max(at, LEAST), 1.0), abs=1e-6)
    assert found == loss(look) <= min(loss(value), loss(Strength(1.0, value).other))
    if abs(look - strength.value) > NEAR:  # its own look was no better, or needs none
        assert found <= loss(strength.value)
    assert found <= loss(strength.value) + bend * NEAR * (2 * abs(strength.value - at) + NEAR)


@given(value=st.floats(LEAST, 1))
def test_the_two_strengths_that_are_compared_are_apart_and_below_one(value):
    other = Strength(1.0, value).other
    assert 0 < other <= 1
    assert min(value, other) / max(value, other) == pytest.approx(APART)


@pytest.mark.parametrize("bend", [0.0, -0.5, math.nan, math.inf])
def test_without_a_minimum_it_stays(bend):
    """A straight line, a hill, no number."""
    strength = Strength(1.0, 0.8)
    strength.learn(lambda s: 1 - 0.1 * s + (bend * s**2 if bend else 0.0))
    assert strength.value == pytest.approx(0.8)


def test_what_fits_is_given_out_and_the_steps_are_the_same(mini_sd, subject):
    """Of a loss whose minimum lies at half the strength half of the LoRA is kept; the weights that
    are trained know nothing of it."""
    config = TrainConfig(steps=4, learning_rate=1.0, validate_every=2)
    quick = replace(QUICK, targets="attention+ff")  # the first layer's norm changes little
    whole = run_training(mini_sd, subject, quick, config)
    layer = next(iter(whole.lora))
    whole_norm = whole.lora[layer].up.norm().item()

    def loss():  # of the strength that is attached, whatever the pictures say
        own = mini_sd.unet.get_submodule(layer)
        norm = own.adapters.weights[layer].up.norm().item() if hasattr(own, "adapters") else 0.0
        return 1 + (norm / whole_norm - 0.5) ** 2

    notices = []
    run = run_training(mini_sd, subject, quick, config, validate=loss, observer=notices.append)
    assert run.strength == pytest.approx(0.5, abs=0.1)
    assert run.losses == whole.losses
    kept = run.lora[layer]
    assert kept.up.norm().item() == pytest.approx(0.5 * whole_norm, rel=0.01)
    told = [event.text for event in notices if isinstance(event, Notice)]
    assert any(f"at {run.strength:.2f} of its strength" in text for text in told)


def test_a_calibration_alone_is_never_worse_for_it(mini_sd, subject):
    half, other = subject.only([0, 1]), subject.only([2])
    validate = validation_loss(mini_sd, other, 8)
    run = run_untrained(mini_sd, half, QUICK, validate=validate)
    with attached_lora(mini_sd.unet, run.lora):
        assert validate() == pytest.approx(run.validations[0][1], rel=1e-5)
    with attached_lora(mini_sd.unet, run.start.lora):
        assert validate() >= run.validations[0][1] * (1 - 1e-6)
    name = next(iter(run.lora))
    assert run.lora[name].up.equal(run.start.lora[name].up * run.strength)


def test_no_strength_is_looked_at_twice(mini_sd, subject):
    """Of a loss that falls up to the whole LoRA, which is the first look already."""
    lora = calibrate(mini_sd, subject, CalibrationConfig(init="gaussian")).lora
    losses = iter([0.5, 0.6])
    assert fitted_strength(mini_sd, lora, lambda: next(losses), 1.0) == (1.0, 0.5)
