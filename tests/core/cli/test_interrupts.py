"""Signals: the run is left once, between two steps, and what is being kept is not stopped."""

import os
import signal

import pytest

from cntlora_core.cli.interrupts import Interrupts
from cntlora_core.errors import Interrupted
from cntlora_core.events import Status, Step, Training

STEP = Step(1, 0.1, 1e-3)


def send(times=1):
    for _ in range(times):
        os.kill(os.getpid(), signal.SIGINT)


def test_one_signal_waits_for_the_next_event():
    with Interrupts() as interrupts:
        send()
        with pytest.raises(Interrupted) as caught:
            interrupts(Status("Loading"))
    assert caught.value.status == 130


def test_a_second_one_leaves_at_once_before_training():
    with Interrupts() as interrupts:
        interrupts(Status("Loading"))
        send()
        with pytest.raises(KeyboardInterrupt):
            send()


def test_while_steps_are_made_no_number_of_signals_leaves_half_of_one():
    with Interrupts() as interrupts:
        interrupts(Training(10, 0))
        send(5)
        with pytest.raises(Interrupted):
            interrupts(STEP)
        send(3)  # while the work is kept
        interrupts(STEP)


def test_what_comes_while_all_is_saved_changes_nothing():
    with Interrupts() as interrupts:
        interrupts(Training(10, 0))
        interrupts.finish()
        send(3)
        interrupts(STEP)


def test_the_handlers_before_are_back():
    before = signal.getsignal(signal.SIGINT)
    with Interrupts():
        assert signal.getsignal(signal.SIGINT) != before
    assert signal.getsignal(signal.SIGINT) == before
