"""Whole runs: what surrounds calibration and training alike."""

import weakref
from contextlib import contextmanager

import pytest
import torch

from cntlora_core.config import CalibrationConfig, TrainConfig
from cntlora_core.errors import OutOfMemory
from cntlora_core.events import Progress, Status
from cntlora_core.run import conditions
from cntlora_core.run.runs import run_calibration, run_training

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

    advice = "gradient checkpointing on, batch size 1, precision bf16"
    with pytest.raises(OutOfMemory, match=advice):
        work()


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
