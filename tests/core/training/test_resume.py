"""A run that is stopped loses nothing: checkpoints, resuming, signals, several processes."""

import os
import signal
import subprocess
import sys
from itertools import count
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from stopped_runs import Cancelled, cancel_after, same

from cntlora_core.cli.main import main
from cntlora_core.config import CalibrationConfig, TrainConfig
from cntlora_core.errors import OutOfMemory, SettingError
from cntlora_core.events import Notice, Step, Training
from cntlora_core.model.loader import MINI_SD_FOLDER
from cntlora_core.run.runs import run_training
from cntlora_core.training import loop
from cntlora_core.training.resume import RunSnapshots, state_path
from cntlora_core.training.validation import validation_loss

ROOT = Path(__file__).resolve().parents[3]
PLAIN = CalibrationConfig(init="gaussian", rank=2)
NATURAL = CalibrationConfig(rank=2, effort="quick")


@pytest.mark.parametrize(
    ("start", "more", "stop"),
    [
        (PLAIN, {}, 3),
        (
            PLAIN,
            {
                **{"schedule": "restarts", "warmup": 0.4, "caption_dropout": 0.5},
                **{"noise_offset": 0.1, "ip_noise": 0.1, "debiased": True},
            },
            1,
        ),
        (NATURAL, {}, 1),  # between two factorisations of the metric
    ],
)
def test_a_resumed_run_ends_bit_identical(mini_sd, subject, tmp_path, start, more, stop):
    training = TrainConfig(steps=5, learning_rate=3e-3, validate_every=2, **more)
    validate = validation_loss(mini_sd, subject.only([0]), 8)
    whole = run_training(mini_sd, subject, start, training, validate=validate)
    checkpoints = RunSnapshots(state_path(tmp_path / "x.safetensors"), {"seed": 0}, resume=True)
    kept = []
    with pytest.raises(Cancelled):
        run_training(
            mini_sd,
            subject,
            start,
            training,
            validate=validate,
            checkpoints=checkpoints,
            on_stop=kept.append,
            observer=cancel_after(stop),
        )
    assert kept[0].steps == stop
    events = []
    resumed = run_training(
        mini_sd,
        subject,
        start,
        training,
        validate=validate,
        checkpoints=checkpoints,
        observer=events.append,
    )
    assert next(e.done for e in events if isinstance(e, Training)) == stop
    assert same(whole.lora, resumed.lora)
    assert whole.validations == resumed.validations
    assert whole.kept_step == resumed.kept_step


def test_a_checkpoint_of_another_run_or_a_damaged_one_is_refused(mini_sd, subject, tmp_path):
    path = tmp_path / "x.state.safetensors"
    training = TrainConfig(steps=2, learning_rate=3e-3, validate_every=0)
    run_training(
        mini_sd,
        subject,
        PLAIN,
        training,
        checkpoints=RunSnapshots(path, {"lr": 0.1, "prompt": "a"}, every=1),
    )
    assert not list(tmp_path.glob(".*")), "a partial file was left"
    assert RunSnapshots(path, {"lr": 0.1, "prompt": "a"}).read() is None  # nobody asked to resume
    with pytest.raises(SettingError, match=r"its lr is 0\.1, now it is 0\.2"):
        RunSnapshots(path, {"lr": 0.2, "prompt": "a"}, resume=True).read()
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(SettingError, match="not a readable checkpoint"):
        RunSnapshots(path, {"lr": 0.1}, resume=True).read()


def test_a_run_that_takes_anothers_place_leaves_no_checkpoint_of_it(mini_sd, subject, tmp_path):
    """Nor one that is never due: to resume would rewind what has ended."""
    path = tmp_path / "x.state.safetensors"
    training = TrainConfig(steps=2, learning_rate=3e-3, validate_every=0)
    stopped = {"checkpoints": RunSnapshots(path, {"lr": 0.1}), "observer": cancel_after(1)}
    with pytest.raises(Cancelled):
        run_training(mini_sd, subject, PLAIN, training, **stopped)
    assert path.is_file()
    afresh = RunSnapshots(path, {"lr": 0.2}, overwrite=True)
    afresh.check()
    run_training(mini_sd, subject, PLAIN, training, checkpoints=afresh)
    afresh.remove()
    assert not path.exists()
    stranger = RunSnapshots(path, {"lr": 0.2}, overwrite=True)
    stranger.check()
    path.write_bytes(b"somebody else's")
    stranger.remove()
    assert path.exists()


def test_the_rate_of_a_step_that_is_told_again_is_its_own(mini_sd, subject, tmp_path):
    """A run that was left inside a validation tells its step when that is made."""
    training = TrainConfig(steps=2, learning_rate=3e-3, validate_every=1)
    checkpoints = RunSnapshots(tmp_path / "x.state.safetensors", {}, resume=True)
    looks, told = count(), []

    def stopped_at_the_third():  # of the base, of step 0 at two strengths, of step 1
        if next(looks) == 3:
            raise Cancelled
        return 0.1

    options = {"checkpoints": checkpoints, "observer": told.append}
    with pytest.raises(Cancelled):
        run_training(mini_sd, subject, PLAIN, training, validate=stopped_at_the_third, **options)
    run_training(mini_sd, subject, PLAIN, training, validate=lambda: 0.1, **options)
    assert {event.lr for event in told if isinstance(event, Step)} == {3e-3}


def without_memory(monkeypatch, too_much):
    """Passes of steps of which `too_much(step, config)` is true find no memory."""
    passes = loop._Terms.backward

    def limited(terms, *batches):
        if too_much(terms.state.step, terms.config):
            raise torch.OutOfMemoryError
        return passes(terms, *batches)

    monkeypatch.setattr(loop._Terms, "backward", limited)


@pytest.mark.parametrize("start", [PLAIN, NATURAL])
@pytest.mark.parametrize("first", [0, 2])
def test_a_training_that_runs_out_of_memory_goes_on_smaller(
    mini_sd, subject, monkeypatch, start, first
):
    """The very steps that the run would have made: nothing is drawn twice or left out."""
    training = TrainConfig(steps=4, learning_rate=3e-3, validate_every=0, caption_dropout=0.5)
    whole = run_training(mini_sd, subject, start, training)
    without_memory(monkeypatch, lambda step, config: step >= first and config.batch_size > 1)
    events = []
    run = run_training(mini_sd, subject, start, training, observer=events.append)
    assert run.losses == pytest.approx(whole.losses, rel=1e-3)
    assert (run.training.batch_size, run.training.accumulation) == (1, 2)
    assert run.training.gradient_checkpointing
    told = [e.text for e in events if isinstance(e, Notice) and "memory" in e.text]
    again = "The memory did not suffice. Training goes on with gradient checkpointing on, batch"
    assert told == [f"{again} 2 x 1.", f"{again} 1 x 2."]


@pytest.mark.parametrize(
    ("start", "optimizer"), [(PLAIN, "adamw"), (NATURAL, "natural"), (PLAIN, "schedulefree")]
)
def test_a_step_made_again_is_the_same_to_the_bit(mini_sd, subject, monkeypatch, start, optimizer):
    """Where its batch stays: gradient checkpointing changes no number."""
    if optimizer == "schedulefree":
        pytest.importorskip("schedulefree")
    steps = {"steps": 4, "learning_rate": 3e-3, "validate_every": 0}
    training = TrainConfig(**steps, optimizer=optimizer, batch_size=1)
    whole = run_training(mini_sd, subject, start, training)
    without_memory(
        monkeypatch, lambda step, config: step == 2 and not config.gradient_checkpointing
    )
    run = run_training(mini_sd, subject, start, training)
    assert run.training.gradient_checkpointing
    assert same(run.lora, whole.lora)


def test_no_memory_is_a_sentence_and_the_work_is_kept(mini_sd, subject, monkeypatch):
    without_memory(monkeypatch, lambda step, config: step == 2)
    kept = []
    advice = "Next to try: precision bf16, a lower resolution than 64 px"  # it tried the others
    with pytest.raises(OutOfMemory, match=advice):
        run_training(
            mini_sd,
            subject,
            PLAIN,
            TrainConfig(steps=4, learning_rate=3e-3, validate_every=0),
            on_stop=kept.append,
        )
    assert kept[0].steps == 2
    assert any(f.up.any() for f in kept[0].lora.values())
    assert all(p.grad is None for p in mini_sd.unet.parameters())


def test_a_validation_that_runs_out_of_memory_is_made_again(mini_sd, subject):
    """Neither it nor the step before it is left out."""
    training = TrainConfig(steps=2, learning_rate=3e-3, validate_every=1, batch_size=2)
    real, calls, events = validation_loss(mini_sd, subject, 8), [], []

    def validate():
        calls.append(1)
        if len(calls) == 7:  # the base, two looks at the start, at step 1, and one at step 2
            raise torch.OutOfMemoryError
        return real()

    options = {"validate": validate, "observer": events.append}
    run = run_training(mini_sd, subject, PLAIN, training, **options)
    assert [step for step, _ in run.validations] == [0, 1, 2]
    assert [event.step for event in events if isinstance(event, Step)] == [1, 2]
    whole = run_training(mini_sd, subject, PLAIN, training, validate=real)
    assert same(run.lora, whole.lora)


def test_a_run_that_ends_inside_a_step_gives_what_one_between_steps_gives(
    mini_sd, subject, monkeypatch
):
    """The mean of the steps, not the weights that the next would have started from."""
    training, kept = TrainConfig(steps=8, learning_rate=3e-3, validate_every=0), []
    options = {"observer": cancel_after(4), "on_stop": kept.append}
    with pytest.raises(Cancelled):
        run_training(mini_sd, subject, PLAIN, training, **options)
    without_memory(monkeypatch, lambda step, config: step == 4)
    with pytest.raises(OutOfMemory):
        run_training(mini_sd, subject, PLAIN, training, on_stop=kept.append)
    between, inside = kept
    assert between.steps == inside.steps == 4
    assert same(between.lora, inside.lora)


def test_a_run_stopped_at_its_last_step_goes_on_to_the_same_end(mini_sd, subject, tmp_path):
    """Cancel while patience is at its end: no step is made beyond it."""
    plain = {"validate_every": 1, "patience": 2, "keep_best": False}
    training = TrainConfig(steps=12, learning_rate=3e-3, batch_size=1, **plain)

    def worse():  # the base's loss, then one validation after another
        losses = count(1.0)
        return lambda: next(losses)

    whole = run_training(mini_sd, subject, PLAIN, training, validate=worse())
    assert whole.steps == 2
    checkpoints = RunSnapshots(tmp_path / "x.state.safetensors", {}, resume=True)
    options = {"checkpoints": checkpoints, "validate": worse()}
    with pytest.raises(Cancelled):
        run_training(mini_sd, subject, PLAIN, training, observer=cancel_after(2), **options)
    run = run_training(mini_sd, subject, PLAIN, training, **options)
    assert run.steps == 2
    assert same(run.lora, whole.lora)


def command(out, *more):
    given = [
        "train",
        "--checkpoint",
        "mini-sd",
        "--images",
        str(MINI_SD_FOLDER / "subject"),
        "--prompt",
        "a sks cat",
    ]
    return [*given, "--init", "gaussian", "--validate-every", "0", "--output", str(out), *more]


def test_a_signal_ends_within_a_step_and_resume_goes_on(tmp_path):
    whole, out = tmp_path / "whole.safetensors", tmp_path / "x.safetensors"
    goal = ["--steps", "16", "--resolution", "32"]
    log = tmp_path / "log.jsonl"
    started = subprocess.Popen(
        [
            sys.executable,
            "-m",
            "cntlora_core",
            *command(out, *goal, "--resume", "--events", str(log)),
        ],
        cwd=ROOT,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    while not (log.exists() and '"step"' in log.read_text()):
        assert started.poll() is None, started.stderr.read()
    started.send_signal(signal.SIGTERM)  # tests/faults sends the others
    error = started.communicate(timeout=60)[1]
    assert started.returncode == 143
    assert "--resume goes on from" in error
    with safe_open(out, "pt") as file:
        steps = int(file.metadata()["ss_steps"])
    assert log.read_text().count('"type": "step"') == steps
    assert main(command(out, *goal)) == 1  # the file exists
    assert main(command(out, *goal, "--resume")) == 0
    assert main(command(whole, *goal)) == 0
    assert not state_path(out).exists()
    with safe_open(out, "pt") as first, safe_open(whole, "pt") as second:
        threads = torch.get_num_threads()
        for key in first.keys():  # noqa: SIM118
            tolerance = 0 if threads == 1 else 1e-4  # the child ran on one thread
            assert (first.get_tensor(key) - second.get_tensor(key)).abs().max() <= tolerance, key


def test_two_processes_at_half_the_batch_are_one_process(tmp_path):
    alone, together = tmp_path / "alone.safetensors", tmp_path / "together.safetensors"
    settings = [
        *("--steps", "2", "--init", "target", "--effort", "quick"),
        *("--save-precision", "fp32"),
        *("--validate-every", "2", "--no-hold-out"),
    ]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    for launch, out, batch in (
        ([sys.executable, "-m"], alone, "4"),
        (
            [
                sys.executable,
                "-m",
                "torch.distributed.run",
                "--standalone",
                "--nproc-per-node",
                "2",
                "-m",
            ],
            together,
            "2",
        ),
    ):
        done = subprocess.run(
            [*launch, "cntlora_core", *command(out, "--batch-size", batch, *settings)],
            cwd=ROOT,
            env=environment,
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert done.returncode == 0, done.stderr
    with safe_open(alone, "pt") as first, safe_open(together, "pt") as second:
        assert set(first.keys()) == set(second.keys())
        for key in first.keys():  # noqa: SIM118
            torch.testing.assert_close(
                first.get_tensor(key), second.get_tensor(key), rtol=2e-2, atol=2e-3
            )


def test_accumulated_batches_are_one_large_batch(mini_sd, subject):
    runs = [
        run_training(
            mini_sd,
            subject,
            PLAIN,
            TrainConfig(
                steps=3, learning_rate=3e-3, validate_every=0, batch_size=b, accumulation=a
            ),
        ).lora
        for b, a in ((4, 1), (2, 2))
    ]
    for name in runs[0]:
        torch.testing.assert_close(runs[0][name].up, runs[1][name].up, rtol=1e-2, atol=1e-4)
