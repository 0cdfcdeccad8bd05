"""Prompts -> what the UNet's cross-attention reads."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from .loader import StableDiffusion


@dataclass(frozen=True)
class Conditioning:
    """n prompts: token embeddings `[n, L, D]`; SDXL adds `pooled` `[n, P]` and `time_ids` `[n, 6]`
    (original height and width, crop top and left, target height and width, in px), fp32 whatever
    the words' precision: half of it knows no 1023."""

    tokens: Tensor
    pooled: Tensor | None = None
    time_ids: Tensor | None = None

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, rows: slice | Tensor) -> Conditioning:
        return self._each(lambda t: t[rows.to(t.device) if isinstance(rows, Tensor) else rows])

    def to(self, device: str | torch.device, dtype: torch.dtype) -> Conditioning:
        sizes = None if self.time_ids is None else self.time_ids.to(device)
        pooled = None if self.pooled is None else self.pooled.to(device, dtype)
        return Conditioning(self.tokens.to(device, dtype), pooled, sizes)

    def with_sizes(self, sizes: Sequence[tuple[int, ...]]) -> Conditioning:
        """The same words with other `time_ids`, a row each; as it is for models that take none."""
        if self.time_ids is None:
            return self
        return Conditioning(self.tokens, self.pooled, torch.tensor(sizes).to(self.time_ids))

    def replaced(self, rows: Tensor, by: Conditioning) -> Conditioning:
        """The same with the words of `by` (one row) where `rows` `[n]` is true; sizes stay."""
        chosen = rows.to(self.tokens.device)
        theirs, own = _of_one_length([by.tokens, self.tokens])
        tokens = torch.where(chosen[:, None, None], theirs, own)
        pooled = self.pooled
        if pooled is not None and by.pooled is not None:
            pooled = torch.where(chosen[:, None], by.pooled, pooled)
        return Conditioning(tokens, pooled, self.time_ids)

    def unet_kwargs(self) -> dict[str, Any]:
        """Keyword arguments of diffusers' UNet."""
        kwargs: dict[str, Any] = {"encoder_hidden_states": self.tokens}
        if self.pooled is not None:
            kwargs["added_cond_kwargs"] = {"text_embeds": self.pooled, "time_ids": self.time_ids}
        return kwargs

    @staticmethod
    def cat(parts: Sequence[Conditioning]) -> Conditioning:
        def join(name: str) -> Tensor | None:
            values = [getattr(part, name) for part in parts]
            return None if values[0] is None else torch.cat(values)

        tokens = torch.cat(_of_one_length([part.tokens for part in parts]))
        return Conditioning(tokens, join("pooled"), join("time_ids"))

    def _each(self, change: Any) -> Conditioning:
        pooled = None if self.pooled is None else change(self.pooled)
        time_ids = None if self.time_ids is None else change(self.time_ids)
        return Conditioning(change(self.tokens), pooled, time_ids)


@torch.no_grad()
def encode_prompts(
    model: StableDiffusion, prompts: Sequence[str], *, size: tuple[int, int] | None = None
) -> Conditioning:
    """Run the text encoders on n prompts. `size` (height, width) in px fills SDXL's size
    conditioning: no crop, the model's resolution when None."""
    rows = model.prompts.encode(prompts, model.device)
    tokens = torch.cat(_of_one_length([tokens[None] for tokens, _ in rows]))
    if model.family != "sdxl":
        return Conditioning(tokens).to(model.device, model.dtype)
    pooled = torch.stack([pooled for _, pooled in rows if pooled is not None])
    height, width = size or (model.resolution, model.resolution)
    time_ids = torch.tensor([[height, width, 0, 0, height, width]], dtype=torch.float32).repeat(
        len(prompts), 1
    )
    return Conditioning(tokens, pooled, time_ids).to(model.device, model.dtype)


def _of_one_length(parts: Sequence[Tensor]) -> list[Tensor]:
    """Token embeddings `[n, L, D]` of several lengths, the shorter ones repeated. Attention sees
    the same in a token once or several times, as long as all of a prompt's are."""
    length = math.lcm(*(part.shape[1] for part in parts))
    return [
        part if part.shape[1] == length else part.repeat(1, length // part.shape[1], 1)
        for part in parts
    ]
