"""Where and in which precision to compute, and how much at once."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TypeVar

import torch

from .errors import OutOfMemory, SettingError

# Bytes, measured on an H100 and an H200 with SD 1.5 at 512 px and SDXL at 1024 px: what the
# framework takes of the free memory in a run's course, for kernels, and the most that cuDNN's
# workspaces take.
GROWTH, WORKSPACES = 200_000_000, 250_000_000
RESERVE = GROWTH + WORKSPACES
# What the allocator takes for a byte that tensors hold: 1.02 to 1.05 in training, 1.1 in a
# calibration; with gradient checkpointing, which holds little and of many sizes, 1.3 to 1.5.
FRAGMENTATION = 1.1
SCATTERED = 1.35
OUT_OF_MEMORY = ("out of memory", "allocate memory", "not enough memory", "ALLOC_FAILED")

Way = TypeVar("Way")
Made = TypeVar("Made")

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
INT8 = "int8"  # of the frozen weights' storage; they compute in bf16, on the CPU in fp32


def finer_precision(dtype: torch.dtype) -> list[str]:
    """What to say where numbers overflow: the settings of `precision` that do so less, if any."""
    finer = {torch.float16: ["precision bf16 or fp32"], torch.bfloat16: ["precision fp32"]}
    return finer.get(dtype, [])


def pick_device(name: str = "auto") -> torch.device:
    """`auto` is CUDA, else Apple's MPS, else the CPU. Raises SettingError for a device this machine
    lacks."""
    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise SettingError(
            f"The device '{name}' is not available here ({str(error).splitlines()[0]}). Try auto "
            "or cpu."
        ) from error
    return device


def computing_dtype(precision: str, device: torch.device) -> torch.dtype:
    """Of a precision's name. `auto` and `int8`: fp32 on a CPU; elsewhere bf16, but fp16 where bf16
    is not native."""
    if precision in DTYPES:
        return DTYPES[precision]
    if device.type == "cpu":
        return torch.float32
    native = device.type != "cuda" or torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.bfloat16 if native else torch.float16


def free_memory(device: torch.device) -> int | None:
    """Bytes that a run may take on `device`; None where nobody says."""
    if device.type != "cuda":
        return None
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return int(torch.cuda.mem_get_info(device)[0]) + unused


def taken(held: int, recomputing: bool = False) -> int:
    """Bytes that the allocator takes where tensors hold `held`, `recomputing` activations."""
    return int((SCATTERED if recomputing else FRAGMENTATION) * held)


def room(device: torch.device) -> float | None:
    """Bytes that tensors can hold on `device`, workspaces and fragmentation set aside; None where
    nobody says."""
    free = free_memory(device)
    return None if free is None else (free - RESERVE) / FRAGMENTATION


def halved(count: int) -> list[int]:
    """`count`, its half and so on, down to 1."""
    return [count >> n for n in range(count.bit_length())]


def first_that_fits(
    ways: Mapping[Way, int], run: Callable[[Way], Made], device: torch.device
) -> Made:
    """What `run` makes in the first of `ways` that the memory of `device` holds. They come with the
    bytes that each takes, the largest first: one that takes more than there is is not tried, one
    that fails gives its memory back. What the last raises goes on."""
    limit = room(device)
    *larger, smallest = ways
    for way in larger:
        if limit is not None and ways[way] > limit:
            continue
        try:
            return run(way)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            give_back(error, device)
    return run(smallest)


@contextmanager
def memory_sufficing(
    device: torch.device, next_to_try: str = "close other programs that use it, a lower resolution"
) -> Iterator[None]:
    """When memory runs out in the block it is given back, and OutOfMemory says what to try next."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        give_back(error, device)
        raise OutOfMemory(
            f"The memory of {device} did not suffice. Next to try: {next_to_try}."
        ) from error


def is_out_of_memory(error: BaseException) -> bool:
    """Allocators and libraries have words of their own for it."""
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or (
        isinstance(error, RuntimeError) and any(words in str(error) for words in OUT_OF_MEMORY)
    )


def give_back(error: BaseException, device: torch.device) -> None:
    """The memory of what failed: its frames hold the tensors that filled it."""
    traceback.clear_frames(error.__traceback__)
    if device.type == "cuda":
        torch.cuda.empty_cache()
