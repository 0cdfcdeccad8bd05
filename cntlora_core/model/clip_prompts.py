"""Prompts through CLIP's text encoders, as ComfyUI encodes them: a long one in chunks of 75 tokens,
each with a start and an end of its own, one after another."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..config import CHUNK, ModelConfig
from ..devices import first_that_fits, memory_sufficing
from ..errors import SettingError
from .encoders import fp32_bytes, temporarily_on
from .tokenizers import as_read

MAX_TOKENS = ModelConfig().max_tokens


def check_text_settings(clip_skip: int, max_tokens: int) -> None:
    """Raises SettingError."""
    if clip_skip < 1:
        raise SettingError(f"clip_skip is {clip_skip}: it must be 1 (none is skipped) or more.")
    if max_tokens < CHUNK or max_tokens % CHUNK:
        raise SettingError(
            f"max_tokens is {max_tokens}: it must be a multiple of {CHUNK}, what CLIP reads."
        )


@dataclass
class CLIPPrompts:
    """Text encoders of transformers with their tokenizers: one, or SDXL's two."""

    encoders: tuple[Any, ...]
    tokenizers: tuple[Any, ...]
    sdxl: bool
    clip_skip: int | None = 1
    max_tokens: int | None = MAX_TOKENS

    def __post_init__(self) -> None:
        layers = self.encoders[0].config.num_hidden_layers
        if self.clip_skip is not None and self.clip_skip > layers:
            raise SettingError(
                f"clip_skip is {self.clip_skip}: this model's text encoder has {layers} layers."
            )

    @property
    def modules(self) -> tuple[nn.Module, ...]:
        return self.encoders

    @property
    def content(self) -> list[dict[str, Tensor]]:
        return [encoder.state_dict() for encoder in self.encoders]

    def encode(
        self, prompts: Sequence[str], device: torch.device
    ) -> list[tuple[Tensor, Tensor | None]]:
        rows = [self._run(which, prompts, device) for which in range(len(self.encoders))]
        if not self.sdxl:
            return rows[0]
        return [(torch.cat([a, b], -1), pooled) for (a, _), (b, pooled) in zip(*rows, strict=True)]

    def cut(self, prompts: Sequence[str]) -> dict[str, tuple[int, ...]]:
        limit = self._chunks * self._chunk(0)
        ids = zip(prompts, self._ids(0, prompts), strict=True)
        return {text: tuple(row[:limit]) for text, row in ids if len(row) > limit}

    @property
    def _chunks(self) -> int:
        """Of a prompt, at most."""
        return (self.max_tokens or MAX_TOKENS) // CHUNK

    def _chunk(self, which: int) -> int:
        """Tokens: a smaller encoder reads fewer at once."""
        return int(self.encoders[which].config.max_position_embeddings) - 2

    def _ids(self, which: int, prompts: Sequence[str]) -> list[list[int]]:
        """Without start and end."""
        rows = self.tokenizers[which]([*map(as_read, prompts)], verbose=False).input_ids
        return [row[1:-1] for row in rows]

    def _run(
        self, which: int, prompts: Sequence[str], device: torch.device
    ) -> list[tuple[Tensor, Tensor | None]]:
        """Of each prompt `[L, D]` and the pooled output of its first chunk, by one encoder."""
        chunked = [self._in_chunks(which, row) for row in self._ids(which, prompts)]
        ids = torch.tensor([chunk for prompt in chunked for chunk in prompt])
        encoder = self.encoders[which]
        ways = {device: fp32_bytes(encoder), torch.device("cpu"): 0}
        with memory_sufficing(device):
            hidden, pooled = first_that_fits(ways, lambda on: self._read(encoder, ids, on), device)
        counts = [len(prompt) for prompt in chunked]
        words = [h.flatten(0, 1) for h in hidden.to(device).split(counts)]
        if pooled is None:
            return [(h, None) for h in words]
        return [(h, p[0]) for h, p in zip(words, pooled.to(device).split(counts), strict=True)]

    def _read(
        self, encoder: Any, ids: Tensor, device: torch.device
    ) -> tuple[Tensor, Tensor | None]:
        """What an encoder makes of chunks `[n, chunk]` on `device`: `[n, chunk, D]` and pooled."""
        with temporarily_on(encoder, device):
            whole = not self.sdxl and self.clip_skip in (None, 1)
            out = encoder(ids.to(device), output_hidden_states=not whole)
            hidden = out.last_hidden_state if whole else self._earlier(encoder, out.hidden_states)
        return hidden, getattr(out, "text_embeds", None)

    def _earlier(self, encoder: Any, hidden_states: Sequence[Tensor]) -> Tensor:
        """SDXL was trained on the last layer but one of both encoders, without their final layer
        norm; elsewhere a skipped layer's output goes through it."""
        if self.sdxl:
            return hidden_states[-2]
        assert self.clip_skip is not None
        normed: Tensor = getattr(encoder, "text_model", encoder).final_layer_norm(
            hidden_states[-self.clip_skip]
        )
        return normed

    def _in_chunks(self, which: int, ids: Sequence[int]) -> list[list[int]]:
        tokenizer, size = self.tokenizers[which], self._chunk(which)
        start, end, pad = (
            int(getattr(tokenizer, f"{name}_token_id")) for name in ("bos", "eos", "pad")
        )
        parts = [ids[n : n + size] for n in range(0, max(1, len(ids)), size)][: self._chunks]
        return [[start, *part, end, *[pad] * (size - len(part))] for part in parts]
