"""Several processes: what one of them sends and gets. That a run of two is a run of one is tested
where runs resume."""

import pytest
import torch

from cntlora_core import distributed
from cntlora_core.distributed import ALONE, Processes, local_device, process_group
from cntlora_core.errors import NonFiniteError

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
