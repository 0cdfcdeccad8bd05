from dataclasses import replace

import pytest
import torch

from cntlora_core.calibration.calibrate import calibrate
from cntlora_core.config import CalibrationConfig, TrainConfig
from cntlora_core.errors import NonFiniteError, SettingError
from cntlora_core.events import Step, Validation
from cntlora_core.lora.adapter import attached_lora
from cntlora_core.run.runs import run_training
from cntlora_core.training.loop import train
from cntlora_core.training.state import start_state
from cntlora_core.training.validation import validation_loss

PLAIN = CalibrationConfig(init="gaussian", rank=4, rank_rule="uniform")


def test_training_lowers_the_validation_loss(mini_sd, subject):
    validate = validation_loss(mini_sd, subject, 8)
    events = []
    run = run_training(
        mini_sd,
        subject,
        PLAIN,
        TrainConfig(steps=20, learning_rate=1e-2, validate_every=10),
        validate=validate,
        observer=events.append,
    )
    assert [step for step, _ in run.validations] == [0, 10, 20]
    assert run.validations[-1][1] < 0.95 * run.validations[0][1]
    assert run.validations[0][1] == validate()
    assert [e.step for e in events if isinstance(e, Step)] == list(range(1, 21))
    assert [e.step for e in events if isinstance(e, Validation)] == [0, 10, 20]


def test_same_seed_same_weights(mini_sd, subject):
    config = TrainConfig(steps=3, learning_rate=3e-3, validate_every=0, seed=4)
    first, second = (run_training(mini_sd, subject, PLAIN, config).lora for _ in range(2))
    other = run_training(
        mini_sd, subject, PLAIN, TrainConfig(steps=3, learning_rate=3e-3, validate_every=0, seed=5)
    ).lora
    assert all(
        torch.equal(first[n].up, second[n].up) and torch.equal(first[n].down, second[n].down)
        for n in first
    )
    assert any(not torch.equal(first[n].up, other[n].up) for n in first)


def test_an_observer_that_raises_leaves_at_once_with_the_work(mini_sd, subject):
    """What a host's Cancel does: the adapters still hold what was trained."""

    class Cancelled(Exception):
        pass

    def cancel(event):
        if isinstance(event, Step) and event.step == 2:
            raise Cancelled

    start = calibrate(mini_sd, subject, PLAIN)
    with attached_lora(mini_sd.unet, start.lora, trainable=True) as adapters:
        config = TrainConfig(steps=50, learning_rate=3e-3, validate_every=0)
        with pytest.raises(Cancelled):
            train(mini_sd, subject, start_state(mini_sd, adapters, config), config, observer=cancel)
        kept = adapters.factors()
    assert any(f.up.any() for f in kept.values())


def test_nan_stops_at_its_step_with_the_last_good_weights(mini_sd, subject):
    start = calibrate(mini_sd, subject, PLAIN)
    snapshots = {}
    with attached_lora(mini_sd.unet, start.lora, trainable=True) as adapters:

        def poison(event):
            if isinstance(event, Step):
                snapshots[event.step] = adapters.factors()
                if event.step == 3:
                    state.live[0] = float("nan")

        config = TrainConfig(steps=9, learning_rate=3e-3, validate_every=0)
        state = start_state(mini_sd, adapters, config)
        with pytest.raises(NonFiniteError, match="step 4") as caught:
            train(mini_sd, subject, state, config, observer=poison)
        kept = adapters.factors()
    assert caught.value.step == 4
    assert all(torch.isfinite(f.up).all() and torch.isfinite(f.down).all() for f in kept.values())
    assert all(torch.equal(kept[n].up, snapshots[3][n].up) for n in kept)


@pytest.mark.parametrize("left", ["steps", "learning_rate"])
def test_what_is_still_auto_is_refused(mini_sd, subject, left):
    """Neither a number of steps nor a rate belongs to every model."""
    config = replace(TrainConfig(steps=3, learning_rate=3e-3), **{left: 0})
    with pytest.raises(SettingError, match=f"{left} is auto"):
        run_training(mini_sd, subject, PLAIN, config)
