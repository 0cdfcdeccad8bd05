"""Several processes: what one of them sends and gets. That a run of two is a run of one is tested
where runs resume."""

from types import SimpleNamespace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from cntlora_core import distributed
from cntlora_core.calibration import measure
from cntlora_core.data.batches import Batch, NoisedSet
from cntlora_core.distributed import ALONE, Processes, least, local_device, process_group
from cntlora_core.errors import NonFiniteError, SettingError
from cntlora_core.model.conditioning import Conditioning
from cntlora_core.run.runs import _found_by_all

CPU = torch.device("cpu")


def test_alone_nothing_is_shared_out():
    value = torch.tensor([1.0])
    ALONE.sum_([value])
    assert (ALONE.rank, ALONE.size, float(value)) == (0, 1, 1.0)


def test_a_sum_is_one_message_and_goes_back_into_each_tensor(monkeypatch):
    """The other process sends ten times what this one does."""
    messages = []

    def all_reduce(flat):
        messages.append(flat.clone())
        flat.mul_(11)

    monkeypatch.setattr(distributed.dist, "all_reduce", all_reduce)
    number, matrix = torch.tensor(2.0), torch.arange(6.0).view(2, 3).T  # not contiguous
    weight = torch.nn.Parameter(torch.ones(2))
    Processes(0, 2, CPU).sum_([number, matrix, weight])
    (message,) = messages
    assert message.shape == (9,)
    assert float(number) == 22
    assert torch.equal(matrix, 11 * torch.arange(6.0).view(2, 3).T)
    assert torch.equal(weight, torch.full((2,), 11.0))
    Processes(0, 2, CPU).sum_([])
    assert len(messages) == 1


def test_what_lies_on_the_host_is_added_up_with_the_rest(monkeypatch):
    """Where the others are a GPU's: one message is on one device."""

    class Sent(Exception):
        pass

    def all_reduce(flat):
        raise Sent(flat.device, len(flat))

    monkeypatch.setattr(distributed.dist, "all_reduce", all_reduce)
    gpu = torch.device("cuda", 0)
    with FakeTensorMode():
        parts = [torch.ones(2, 2, device=gpu), torch.ones(1)]
        with pytest.raises(Sent) as caught:
            Processes(0, 2, gpu).sum_(parts)
    assert caught.value.args == (gpu, 5)


class Beside:
    """This process, and one whose numbers are `theirs`."""

    rank, size = 0, 2

    def __init__(self, *theirs):
        self.theirs = list(theirs)

    def sum_(self, tensors):
        for tensor in tensors:
            tensor[1:] = self.theirs.pop(0)


def test_the_least_of_all_processes_is_taken():
    assert least(7, ALONE) == 7
    assert least(7, Beside(3)) == 3
    assert least(7, Beside(9)) == 7
    assert least(-7, Beside(-9)) == -9


@pytest.mark.parametrize("theirs", [-1, 3])
def test_processes_that_would_go_on_from_other_steps_are_refused(theirs):
    saved = SimpleNamespace(story={"step": 5})
    with pytest.raises(SettingError, match="disk that all of them see"):
        _found_by_all(saved, Beside(theirs, -theirs))
    with pytest.raises(SettingError, match="disk that all of them see"):
        _found_by_all(None, Beside(5, -5))
    assert _found_by_all(saved, Beside(5, -5)) is saved
    assert _found_by_all(None, Beside(-1, 1)) is None


def test_a_process_that_torchrun_did_not_start_is_alone(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with process_group(CPU) as group:
        assert group is ALONE


@pytest.mark.parametrize(
    ("asked", "rank", "given"),
    [
        ("cuda", "1", "cuda:1"),
        ("cuda:0", "1", "cuda:0"),  # said by the user
        ("cuda", None, "cuda"),
        ("cpu", "1", "cpu"),
    ],
)
def test_each_process_takes_its_own_gpu(monkeypatch, asked, rank, given):
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    if rank is not None:
        monkeypatch.setenv("LOCAL_RANK", rank)
    assert local_device(torch.device(asked)) == torch.device(given)


def test_the_group_is_left_when_a_run_fails(monkeypatch):
    calls = []
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(distributed.dist, "init_process_group", calls.append)
    monkeypatch.setattr(distributed.dist, "destroy_process_group", lambda: calls.append("left"))
    monkeypatch.setattr(distributed.dist, "get_rank", lambda: 1)
    monkeypatch.setattr(distributed.dist, "get_world_size", lambda: 2)

    def run():
        with process_group(CPU) as group:
            assert (group.rank, group.size) == (1, 2)
            raise NonFiniteError("stop", step=0)

    with pytest.raises(NonFiniteError):
        run()
    assert calls == ["gloo", "left"]


def test_pictures_that_cannot_be_shared_out_pass_a_few_at_a_time():
    """Of eight processes with batches of 2; sizes come as the pictures have them."""

    def triples(count):
        part = torch.arange(count)
        return Batch(part, part, part, Conditioning(torch.zeros(count, 1, 1)))

    def passes(*sizes):
        given = NoisedSet(tuple(map(triples, sizes)))
        return [(len(b), sharing.size) for b, sharing in measure._shared(given, 2, Eight())]

    class Eight:
        rank, size = 3, 8

    assert passes(16, 8) == [(16, 8), (8, 8)]
    assert passes(11) == [(8, 8), (2, 1), (1, 1)]
    assert passes(23) == [(16, 8), (2, 1), (2, 1), (2, 1), (1, 1)]
