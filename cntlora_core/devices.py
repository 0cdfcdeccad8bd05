"""Where and in which precision to compute, and how much at once."""

from __future__ import annotations

import torch

from .errors import SettingError

# Of cuDNN's workspaces and of what the allocator cannot use.
RESERVE = 600_000_000

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
INT8 = "int8"  # of the frozen weights' storage; they compute in bf16, on the CPU in fp32


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


def at_once(device: torch.device, each: int, most: int) -> int:
    """How many of something that takes `each` bytes of `device`: `most`, or as many as fit; 0 where
    not even one does."""
    free = free_memory(device)
    return most if free is None else min(most, max(0, free - RESERVE) // each)
