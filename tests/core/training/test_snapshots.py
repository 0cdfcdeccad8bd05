"""Checkpoints are the run's own: nobody else's file is touched, none of another run is taken."""

from dataclasses import replace

import pytest
import torch

from cntlora_core.config import CalibrationConfig, DataConfig, TrainConfig
from cntlora_core.errors import NonFiniteError, OutputError, SettingError
from cntlora_core.events import Base, Notice, Step, Validation
from cntlora_core.lora.adapter import Adapters
from cntlora_core.model.fingerprint import fingerprint
from cntlora_core.run.runs import run_training
from cntlora_core.training.identity import run_identity
from cntlora_core.training.resume import RunSnapshots

PLAIN = CalibrationConfig(init="gaussian", rank=1)
TRAINING = TrainConfig(steps=3, learning_rate=1e-3, batch_size=1, validate_every=0)


def train(model, subject, checkpoints, observer=lambda event: None, **more):
    return run_training(
        model, subject, PLAIN, TRAINING, checkpoints=checkpoints, observer=observer, **more
    )


def test_a_checkpoint_that_fails_is_told_once_and_training_goes_on(
    mini_sd, subject, tmp_path, failing_disk
):
    told = []
    checkpoints = RunSnapshots(
        tmp_path / "x.state.safetensors", {}, every=1, disk=failing_disk(1, stays=True)
    )
    run = train(mini_sd, subject, checkpoints, told.append)
    assert run.steps == 3
    notices = [e.text for e in told if isinstance(e, Notice)]
    (notice,) = [text for text in notices if "checkpoint" in text]
    assert notice.endswith("(No space left on device). Training goes on without this checkpoint.")
    assert list(tmp_path.iterdir()) == []


def test_a_file_of_somebody_elses_is_neither_overwritten_nor_removed(tmp_path):
    path = tmp_path / "x.state.safetensors"
    path.write_bytes(b"a thesis")
    for more in ({}, {"resume": True}, {"overwrite": True}):
        with pytest.raises(OutputError, match="move it away, or choose another output name"):
            RunSnapshots(path, {}, **more).check()
        RunSnapshots(path, {}, **more).remove()
    assert path.read_bytes() == b"a thesis"


def test_another_runs_checkpoint_is_not_overwritten_in_silence(mini_sd, subject, tmp_path):
    path = tmp_path / "x.state.safetensors"
    train(mini_sd, subject, RunSnapshots(path, {}, every=1))
    with pytest.raises(OutputError, match="a run of 3 steps: go on with --resume, or start afresh"):
        RunSnapshots(path, {}, every=1).check()
    RunSnapshots(path, {}, resume=True).check()
    RunSnapshots(path, {}, overwrite=True).check()
    other = RunSnapshots(path, {"prompt": "a dog"}, resume=True)
    with pytest.raises(SettingError, match="of another run: its prompt"):
        other.read()
    other.remove()
    assert path.exists()
    digests = RunSnapshots(path, {"pictures": "0123456789abcdef" * 4}, resume=True)
    with pytest.raises(SettingError, match=r"of another run: pictures: not the same as then\."):
        digests.read()


def test_half_a_step_is_not_written(mini_sd, subject, tmp_path, monkeypatch):
    """An exception from inside a step leaves the checkpoint of the whole step before it."""
    path = tmp_path / "x.state.safetensors"
    checkpoints = RunSnapshots(path, {}, every=1, resume=True)
    before = []

    def observer(event):
        if isinstance(event, Step) and event.step == 2:
            before.append(path.read_bytes())
            monkeypatch.setattr(mini_sd.unet, "forward", broken)

    def broken(*args, **options):
        raise KeyboardInterrupt

    kept = []
    with pytest.raises(KeyboardInterrupt):
        train(mini_sd, subject, checkpoints, observer, on_stop=kept.append)
    monkeypatch.undo()
    assert path.read_bytes() == before[0]
    assert kept[0].steps == 2
    whole = train(mini_sd, subject, None)
    resumed = train(mini_sd, subject, checkpoints)
    for name, factors in whole.lora.items():
        assert torch.equal(factors.up, resumed.lora[name].up)


def stop_at(step):
    def observer(event):
        if isinstance(event, Step) and event.step == step:
            raise RuntimeError("Cancelled")

    return observer


@pytest.mark.parametrize(
    ("losses", "stop", "kept"),
    [
        ([0.5, 0.3, 0.9, 0.9], 3, 1),  # step 1 was best, then it exploded
        ([0.5, float("nan"), 0.4, 0.9], 3, 2),  # NaN is never the best
        ([0.1], 0, None),
    ],
)
def test_a_stopped_run_keeps_the_best_weights(mini_sd, subject, losses, stop, kept):
    values = iter([0.6, *losses])  # of the base, then at every step, at whatever strengths
    now, stopped = [next(values)], []
    config = replace(TRAINING, validate_every=1)

    def observer(event):
        if isinstance(event, Base | Validation):
            now[0] = next(values, None)
        if isinstance(event, Validation) and stop == 0:
            raise RuntimeError("Cancelled")
        stop_at(stop)(event)

    with pytest.raises(RuntimeError, match="Cancelled"):
        run_training(
            mini_sd,
            subject,
            PLAIN,
            config,
            validate=lambda: now[0],
            observer=observer,
            on_stop=stopped.append,
        )
    assert stopped[0].kept_step == (kept or 0)
    assert stopped[0].steps == stop


def test_a_run_stopped_before_its_training_was_judged_keeps_what_it_learnt(mini_sd, subject):
    stopped = []
    config = replace(TRAINING, validate_every=10)
    with pytest.raises(RuntimeError, match="Cancelled"):
        run_training(
            mini_sd,
            subject,
            PLAIN,
            config,
            validate=lambda: 0.5,
            observer=stop_at(2),
            on_stop=stopped.append,
        )
    assert stopped[0].kept_step == 2


def test_numbers_that_fail_before_a_validation_keep_what_was_learnt(mini_sd, subject, monkeypatch):
    """Not the start, which was all that had been validated."""
    stopped, gradient = [], Adapters.gradient

    def fails_at_third(adapters, scale):
        fails_at_third.steps += 1
        return gradient(adapters, scale).mul_(torch.nan if fails_at_third.steps == 3 else 1)

    fails_at_third.steps = 0
    monkeypatch.setattr(Adapters, "gradient", fails_at_third)
    config = replace(TRAINING, validate_every=10)
    with pytest.raises(NonFiniteError, match="step 3; what was learnt before it is kept"):
        run_training(mini_sd, subject, PLAIN, config, validate=lambda: 0.5, on_stop=stopped.append)
    assert stopped[0].kept_step == 2


@pytest.mark.parametrize(
    "other",
    [{"prompt": "a cat"}, {"captions": ("a",)}, {"resolution": 65}, {"repeats": (9,)},
     {"masks": (torch.zeros(1, 8, 8),)}],
)  # fmt: skip
def test_a_run_that_is_validated_otherwise_is_another(mini_sd, subject, other):
    def made(held_out):
        config = CalibrationConfig(), TrainConfig(steps=1)
        return run_identity(mini_sd, subject, held_out, [DataConfig()], *config)

    assert made(subject) == made(replace(subject)) != made(replace(subject, **other))


def test_two_checkpoints_of_one_name_are_told_apart(mini_sd):
    before = fingerprint(mini_sd)
    assert fingerprint(mini_sd) == before
    weight = next(mini_sd.unet.parameters())
    with torch.no_grad():
        weight.view(-1)[0] += 1
    changed = fingerprint(mini_sd)
    with torch.no_grad():
        weight.view(-1)[0] -= 1
    assert changed != before
