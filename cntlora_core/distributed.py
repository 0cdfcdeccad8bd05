"""Several processes that train one LoRA: what they share out and add up. Started by torchrun."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch import distributed as dist


class Group(Protocol):
    """`size` processes, of which this is number `rank`."""

    @property
    def rank(self) -> int: ...
    @property
    def size(self) -> int: ...
    def sum_(self, tensors: Sequence[Tensor]) -> None:
        """Replace each tensor by its sum over the processes."""


@dataclass(frozen=True)
class Alone:
    """The group of one."""

    rank: int = 0
    size: int = 1

    def sum_(self, tensors: Sequence[Tensor]) -> None:
        pass


ALONE = Alone()


@dataclass(frozen=True)
class Processes:
    """torch.distributed's default group. `device` is where its backend adds up (a GPU for NCCL)."""

    rank: int
    size: int
    device: torch.device

    def sum_(self, tensors: Sequence[Tensor]) -> None:
        if not tensors:
            return
        parts = [t.detach().reshape(-1).to(self.device) for t in tensors]
        flat = torch.cat(parts)  # one message, not hundreds
        dist.all_reduce(flat)
        for tensor, total in zip(tensors, flat.split([t.numel() for t in tensors]), strict=True):
            tensor.detach().copy_(total.view_as(tensor))


@contextmanager
def process_group(device: torch.device) -> Iterator[Group]:
    """The processes that torchrun started (it sets WORLD_SIZE), or this one alone."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield ALONE
        return
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield Processes(dist.get_rank(), dist.get_world_size(), device)
    finally:
        dist.destroy_process_group()


def local_device(device: torch.device) -> torch.device:
    """Each process's own GPU: number LOCAL_RANK, where no other was asked for."""
    if device.type == "cuda" and device.index is None and "LOCAL_RANK" in os.environ:
        return torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    return device


def least(own: int, group: Group) -> int:
    """Of all processes' numbers, to fp32's digits."""
    return int(gathered(torch.tensor(float(own)), group).min()) if group.size > 1 else own


def gathered(own: Tensor, group: Group) -> Tensor:
    """The tensors of all processes, of one shape `[size, ...]`."""
    every = own.new_zeros(group.size, *own.shape)
    every[group.rank] = own
    group.sum_([every])
    return every
