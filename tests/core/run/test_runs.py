"""Whole runs: what surrounds calibration and training alike."""

import weakref
from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from cntlora_core.calibration.calibrate import calibrate
from cntlora_core.config import CalibrationConfig, TrainConfig
from cntlora_core.errors import OutOfMemory
from cntlora_core.events import Notice, Progress, Status
from cntlora_core.run import conditions, runs
from cntlora_core.run.runs import run_calibration, run_training
from cntlora_core.training.state import TrainState

QUICK = CalibrationConfig(effort="quick", rank=2, batch_size=2)


def test_calibration_tells_its_phase_and_has_what_a_run_needs_around_it(
    mini_sd, subject, monkeypatch
):
    around = []

    @contextmanager
    def noted(unet):
        around.append("in")
        yield
        around.append("out")

    monkeypatch.setattr(conditions, "convolutions_as_matmul", noted)
    events, inside = [], []

    def observer(event):
        events.append(event)
        inside.append(around[-1:])

    start = run_calibration(mini_sd, subject, QUICK, observer=observer)
    assert isinstance(events[0], Status)
    assert events[-1] is start.report
    assert {tuple(i) for e, i in zip(events, inside, strict=True) if isinstance(e, Progress)} == {
        ("in",)
    }
    assert around[-1] == "out"


@pytest.mark.parametrize("run", ["calibration", "training"])
def test_memory_that_runs_out_while_calibrating_is_a_sentence(mini_sd, subject, run):
    def observer(event):
        if isinstance(event, Progress):
            raise torch.OutOfMemoryError

    def work():
        if run == "calibration":
            return run_calibration(mini_sd, subject, QUICK, observer=observer)
        training = TrainConfig(steps=2, learning_rate=3e-3, validate_every=0)
        return run_training(mini_sd, subject, QUICK, training, observer=observer)

    advice = "precision bf16, a lower resolution than 64 px, a lower rank"  # it tried the others
    with pytest.raises(OutOfMemory, match=advice):
        work()


def test_a_calibration_that_runs_out_of_memory_begins_again_smaller(mini_sd, subject, monkeypatch):
    ways, told, plain = [], [], replace(QUICK, init="gaussian")

    def limited(model, subject, config, *, at_once, **options):
        ways.append((at_once, config.gradient_checkpointing))
        if at_once > 1:
            raise torch.OutOfMemoryError
        return calibrate(model, subject, config, at_once=at_once, **options)

    monkeypatch.setattr(runs, "calibrate", limited)
    start = run_calibration(mini_sd, subject, plain, observer=told.append)
    assert told[-1] is start.report
    assert ways == [(2, False), (2, True), (1, True)]
    notices = [event.text for event in told if isinstance(event, Notice)]
    again = "The memory did not suffice. The calibration begins again with gradient checkpointing"
    assert notices == [f"{again} on, batch 2.", f"{again} on, batch 1."]


def test_one_of_several_processes_does_not_begin_again(mini_sd, subject, monkeypatch):
    """The others would wait for its numbers."""
    ways = []

    def failing(model, subject, config, *, at_once, **options):
        ways.append(at_once)
        raise torch.OutOfMemoryError

    monkeypatch.setattr(runs, "calibrate", failing)
    with pytest.raises(OutOfMemory, match="gradient checkpointing on, batch size 1"):
        run_calibration(mini_sd, subject, QUICK, group=SimpleNamespace(rank=0, size=2))
    assert ways == [2]


def test_memory_that_ran_out_is_given_back_before_the_sentence(mini_sd, subject):
    """The traceback's frames would keep the tensors that filled it."""
    held = []

    class Filling:
        pass

    def observer(event):
        if isinstance(event, Progress):
            filling = Filling()
            held.append(weakref.ref(filling))
            raise torch.OutOfMemoryError

    with pytest.raises(OutOfMemory) as caught:
        run_calibration(mini_sd, subject, QUICK, observer=observer)
    assert held[0]() is None, caught


def test_the_result_names_the_optimiser_that_made_the_steps(mini_sd, subject):
    told = []
    plain = CalibrationConfig(init="gaussian", rank=1)
    asked = TrainConfig(steps=1, learning_rate=1e-3, batch_size=1, optimizer="natural")
    run = run_training(mini_sd, subject, plain, asked, observer=told.append)
    assert run.training == replace(asked, optimizer="adamw")
    assert any("adamw trains instead" in getattr(event, "text", "") for event in told)


def test_numbers_that_fail_at_the_first_step_are_no_steps_fault():
    state = SimpleNamespace(step=0, natural=None, effective_rate=lambda lr: 3 * lr)
    half, full = torch.float16, torch.float32
    said = TrainState.failure(state, "loss", 0.1, full)
    assert "at step 1: nothing was trained. Use another checkpoint" in said
    assert "Use precision bf16 or fp32, or use" in TrainState.failure(state, "loss", 0.1, half)
    state.step = 2
    said = TrainState.failure(state, "gradient", 0.1, full)
    kept = "at step 3; what was learnt before it is kept. Lower the learning rate (it was 0.3)"
    assert said.endswith(kept + ".")
    said = TrainState.failure(state, "gradient", 0.1, torch.bfloat16)
    assert said.endswith(kept + ", or use precision fp32.")
    state.natural = object()
    said = TrainState.failure(state, "gradient", 0.1, torch.bfloat16)
    assert said.endswith("Use precision fp32, or use optimizer adamw.")
