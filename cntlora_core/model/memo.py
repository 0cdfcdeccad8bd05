"""What was computed with a model, kept beside it: found again by its key, dropped with the
model."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

LIMIT = 256 * 2**20  # bytes; fifty pictures at SDXL's size with their captions are 40 MB


class Memo:
    """Values by key, the last used ones up to `limit` bytes."""

    def __init__(self, limit: int = LIMIT) -> None:
        self.limit = limit
        self.held: dict[Hashable, tuple[Any, int]] = {}

    def get(self, key: Hashable) -> Any | None:
        if key not in self.held:
            return None
        self.held[key] = self.held.pop(key)  # the last one is the last used
        return self.held[key][0]

    def put(self, key: Hashable, value: Any, size: int) -> None:
        """Keep `value`, which takes `size` bytes; the longest unused make room."""
        self.held.pop(key, None)
        self.held[key] = (value, size)
        while sum(size for _, size in self.held.values()) > self.limit:
            del self.held[next(iter(self.held))]
