"""The rows of gpu.py as they are measured."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from cntlora_core.errors import OutOfMemory


@dataclass
class Report:
    """Rows as they are measured: seconds, and GB of the device at the peak, held by tensors and
    taken by the process, None where nobody knows."""

    device: torch.device
    path: Path | None = None  # of the JSON, written anew with every row: a run may be cut short
    told: dict[str, Any] = field(default_factory=dict)
    rows: list[dict[str, Any]] = field(default_factory=list)
    apart: int = 0  # bytes that no phase needs

    def add(
        self, phase: str, seconds: float | None, held: float | None, taken: float | None = None
    ) -> None:
        row = {"phase": phase, "seconds": seconds, "held_gb": held, "taken_gb": taken}
        self.rows.append(row)
        cells = ["too large" if seconds is None else f"{seconds:.3f}"]
        cells += ["-" if gb is None else f"{gb:.2f}" for gb in (held, taken)]
        print("| " + " | ".join([phase, *cells]) + " |", flush=True)
        self.write()

    def write(self) -> None:
        if self.path:
            self.path.write_text(json.dumps(self.told | {"rows": self.rows}, indent=1))

    def measure(self, phase: str, run: Callable[[], float | None]) -> Any:
        """`run`'s seconds (those it returns, where it does), with the peak of the device."""
        cuda = self.device.type == "cuda"
        if cuda:
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        started = time.perf_counter()
        try:
            own = run()
        except (OutOfMemory, torch.OutOfMemoryError):
            self.add(phase, None, None)
            return
        if cuda:
            torch.cuda.synchronize()
        seconds = time.perf_counter() - started if own is None else own
        if not cuda:
            return self.add(phase, seconds, None)
        peaks = torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()
        self.add(phase, seconds, *((peak - self.apart) / 1e9 for peak in peaks))
