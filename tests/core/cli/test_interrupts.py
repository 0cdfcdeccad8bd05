"""Signals: the run is left once, between two steps, and what is being kept is not stopped."""

import os
import signal

import pytest

from cntlora_core.cli.interrupts import Interrupts
from cntlora_core.errors import Interrupted
from cntlora_core.events import Notice, Status, Step, Training

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


class Two:
    """This process, and another that has got the signal `other`."""

    rank, size = 0, 2

    def __init__(self, other):
        self.other = other

    def sum_(self, tensors):
        tensors[0][1] = self.other


@pytest.mark.parametrize(("own", "other"), [(1, 0), (0, signal.SIGINT)])
def test_of_several_processes_all_leave_after_the_step_in_which_one_got_it(own, other):
    with Interrupts() as interrupts:
        interrupts.group = Two(other)
        interrupts(Training(10, 0))
        send(own)
        interrupts(Notice("Told by the first process alone."))
        with pytest.raises(Interrupted) as caught:
            interrupts(STEP)
    assert caught.value.status == 130


def test_without_a_signal_nobody_leaves():
    with Interrupts() as interrupts:
        interrupts.group = Two(0)
        interrupts(Training(10, 0))
        interrupts(STEP)
