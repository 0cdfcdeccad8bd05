"""What is chosen when nobody says."""

import pytest

from cntlora_core.config import TrainConfig
from cntlora_core.defaults import default_learning_rate, default_steps, resolve

SD = "sd15.safetensors"


def test_real_models_learn_more_slowly_and_calibrated_starts_faster_than_ordinary_ones():
    assert default_learning_rate("mini-sd", "target") == 3e-3
    assert default_learning_rate("mini-sd", "gaussian") == 1e-2
    assert default_learning_rate(SD, "gaussian") == 1e-4
    assert default_learning_rate(SD, "target") == 5e-4
    assert default_steps("mini-sd", "target", 5) == 100
    assert default_steps(SD, "gaussian", 5) == 500
    assert default_steps(SD, "target", 5) == 250
    assert default_steps(SD, "target", 30) == 600


def test_what_is_auto_becomes_a_number_and_is_told():
    told = []
    config = resolve(TrainConfig(seed=3), SD, "target", 5, told.append)
    chosen = {"steps": 250, "learning_rate": 5e-4, "optimizer": "natural"}
    assert config == TrainConfig(**chosen, seed=3)
    # A rate that nobody uses is not told.
    assert [e.text for e in told] == ["Chosen by model and pictures: steps 250, optimizer natural"]
    told.clear()
    assert resolve(TrainConfig(), SD, "gaussian", 5, told.append).optimizer == "adamw"
    said = "steps 500, optimizer adamw, learning rate 0.0001"
    assert [e.text for e in told] == [f"Chosen by model and pictures: {said}"]


def test_what_was_said_stays_and_nothing_is_told():
    told = []
    config = TrainConfig(steps=7, learning_rate=0.1, optimizer="adamw")
    assert resolve(config, SD, "target", 5, told.append) == config
    assert told == []


@pytest.mark.parametrize("model", [SD, "mini-sd"])
def test_prodigy_finds_its_own_rate(model):
    assert resolve(TrainConfig(optimizer="prodigy"), model, "target", 5).learning_rate == 1.0


@pytest.mark.parametrize(
    ("held_out", "batch", "every"),
    [(0, 2, 10), (1, 2, 25), (3, 2, 75), (1, 8, 10)],
)
def test_validations_take_a_tenth_of_the_run_at_most(held_out, batch, every):
    """8 passes forward a picture at two strengths; a step's pictures take 3 each."""
    config = resolve(TrainConfig(batch_size=batch), SD, "target", 5, held_out=held_out)
    assert config.validate_every == every
    validation, steps = 2 * 8 * held_out, 3 * batch * every
    assert validation <= 0.1 * (validation + steps)
    for asked in (0, 1, 20):  # by somebody who wants it so
        config = TrainConfig(batch_size=batch, validate_every=asked)
        assert resolve(config, SD, "target", 5, held_out=held_out).validate_every == asked
