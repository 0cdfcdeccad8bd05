"""What a run that goes on makes up for: a validation that was left, a prior measured anew."""

from dataclasses import replace
from itertools import count

import pytest
from stopped_runs import Cancelled, cancel_after, same

from cntlora_core.config import CalibrationConfig, TrainConfig
from cntlora_core.data.class_images import class_images, class_noised
from cntlora_core.events import Notice, Step
from cntlora_core.run.runs import run_calibration, run_training
from cntlora_core.training.resume import RunSnapshots
from cntlora_core.training.validation import validation_loss

PLAIN = CalibrationConfig(init="gaussian", rank=2)
NATURAL = CalibrationConfig(rank=2, effort="quick")


@pytest.mark.parametrize("start", [PLAIN, NATURAL])
@pytest.mark.parametrize(("at", "made"), [(3, 0), (6, 2), (9, 4)])
def test_a_validation_that_was_left_is_made_when_the_run_goes_on(
    mini_sd, subject, tmp_path, start, at, made
):
    """Of many pictures it takes minutes: Cancel does not wait for its end."""
    training = TrainConfig(steps=4, learning_rate=3e-3, validate_every=2)
    passes = count(-2)  # two of the untouched model come first, then four a validation

    def cancel():
        if next(passes) == at:
            raise Cancelled

    held_out = subject.only([0, 1])
    given = {"checkpoints": RunSnapshots(tmp_path / "x.state.safetensors", {}, resume=True)}
    whole = run_training(
        mini_sd, subject, start, training, validate=validation_loss(mini_sd, held_out, 8)
    )
    given["validate"] = validation_loss(mini_sd, held_out, 8, before_each=cancel)
    kept = []
    with pytest.raises(Cancelled):
        run_training(mini_sd, subject, start, training, **given, on_stop=kept.append)
    assert kept[0].steps == made
    events = []
    resumed = run_training(mini_sd, subject, start, training, **given, observer=events.append)
    assert same(whole.lora, resumed.lora)
    assert whole.validations == resumed.validations
    steps = [e.step for e in events if isinstance(e, Step)]
    assert steps == [n for n in (1, 2, 3, 4) if n >= made]


def test_a_run_goes_on_where_the_prior_is_measured_of_other_layers(mini_sd, subject, tmp_path):
    """Rounding decides the last rank: what a layer should preserve may not be known again."""
    training = TrainConfig(steps=3, learning_rate=3e-3, validate_every=0)
    prior = class_noised(mini_sd, class_images(mini_sd, "a dog", 32, count=1, steps=1))
    start = run_calibration(mini_sd, subject, NATURAL, preserve=prior)
    less = [p for p in start.natural.projections if p.name != min(start.lora)]
    other = replace(
        start,
        lora={p.name: start.lora[p.name] for p in less},
        natural=replace(start.natural, projections=less, metric=start.natural.metric.only(less)),
        preservation=replace(
            start.preservation, inputs={p.name: start.preservation.inputs[p.name] for p in less}
        ),
    )
    for made in (start, other):
        path = tmp_path / f"{len(made.lora)}.state.safetensors"
        checkpoints = RunSnapshots(path, {}, resume=True)
        given = {"checkpoints": checkpoints, "start": start}
        with pytest.raises(Cancelled):
            run_training(mini_sd, subject, NATURAL, training, **given, observer=cancel_after(1))
        events = []
        given["start"] = made
        run = run_training(mini_sd, subject, NATURAL, training, **given, observer=events.append)
        assert run.steps == 3
        told = any("preserves no more" in e.text for e in events if isinstance(e, Notice))
        assert told == (made is other)
