"""Prompts -> what the UNet's cross-attention reads."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..errors import SettingError

if TYPE_CHECKING:
    from .loader import StableDiffusion


MOST_CHUNKS = 60  # of the length that prompts of 1 to 6 chunks have in common


@dataclass(frozen=True)
class Conditioning:
    """n prompts: token embeddings `[n, L, D]`; SDXL adds `pooled` `[n, P]` and `time_ids` `[n, 6]`
    (original height and width, crop top and left, target height and width, in px), fp32 whatever
    the words' precision: half of it knows no 1023. `copies` `[n]`, on the host: how often each
    prompt stands in its row, where prompts of several lengths are brought to one (None: once)."""

    tokens: Tensor
    pooled: Tensor | None = None
    time_ids: Tensor | None = None
    copies: Tensor | None = None

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, rows: slice | Tensor) -> Conditioning:
        """Those prompts, at the length that they need together."""

        def chosen(t: Tensor) -> Tensor:
            return t[rows.to(t.device) if isinstance(rows, Tensor) else rows]

        if self.copies is None:
            return self._each(chosen, None)
        once = self.tokens.shape[1] // chosen(self.copies)
        length = math.lcm(*once.tolist())
        copies = length // once
        picked = self._each(chosen, copies if copies.gt(1).any() else None)
        return replace(picked, tokens=picked.tokens[:, :length])

    def to(self, device: str | torch.device, dtype: torch.dtype) -> Conditioning:
        sizes = None if self.time_ids is None else self.time_ids.to(device)
        pooled = None if self.pooled is None else self.pooled.to(device, dtype)
        return Conditioning(self.tokens.to(device, dtype), pooled, sizes, self.copies)

    def with_sizes(self, sizes: Sequence[tuple[int, ...]]) -> Conditioning:
        """The same words with other `time_ids`, a row each; as it is for models that take none."""
        if self.time_ids is None:
            return self
        return replace(self, time_ids=torch.tensor(sizes).to(self.time_ids))

    def replaced(self, rows: Tensor, by: Conditioning) -> Conditioning:
        """The same with the words of `by` (one row) where `rows` `[n]` is true; sizes stay."""
        chosen = rows.to(self.tokens.device)
        (theirs, own), copies = _of_one_length([by, self])
        tokens = torch.where(chosen[:, None, None], theirs, own)
        if copies is not None:
            one, each = copies.split([1, len(self)])
            copies = torch.where(rows.cpu(), one, each)
        pooled = self.pooled
        if pooled is not None and by.pooled is not None:
            pooled = torch.where(chosen[:, None], by.pooled, pooled)
        return Conditioning(tokens, pooled, self.time_ids, copies)

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

        tokens, copies = _of_one_length(parts)
        return Conditioning(torch.cat(tokens), join("pooled"), join("time_ids"), copies)

    def _each(self, change: Callable[[Tensor], Tensor], copies: Tensor | None) -> Conditioning:
        pooled = None if self.pooled is None else change(self.pooled)
        time_ids = None if self.time_ids is None else change(self.time_ids)
        return Conditioning(change(self.tokens), pooled, time_ids, copies)


@torch.no_grad()
def encode_prompts(
    model: StableDiffusion, prompts: Sequence[str], *, size: tuple[int, int] | None = None
) -> Conditioning:
    """Run the text encoders on n prompts. `size` (height, width) in px fills SDXL's size
    conditioning: no crop, the model's resolution when None."""
    rows = model.prompts.encode(prompts, model.device)
    words = Conditioning.cat([Conditioning(tokens[None]) for tokens, _ in rows])
    if model.family != "sdxl":
        return words.to(model.device, model.dtype)
    pooled = torch.stack([pooled for _, pooled in rows if pooled is not None])
    height, width = size or (model.resolution, model.resolution)
    time_ids = torch.tensor([[height, width, 0, 0, height, width]], dtype=torch.float32).repeat(
        len(prompts), 1
    )
    return replace(words, pooled=pooled, time_ids=time_ids).to(model.device, model.dtype)


def _of_one_length(parts: Sequence[Conditioning]) -> tuple[list[Tensor], Tensor | None]:
    """Token embeddings `[n, L, D]` of several lengths, the shorter ones repeated, and the copies of
    all rows. Attention sees the same in a token once or several times, as long as all of a prompt's
    are. Raises SettingError for too many lengths."""
    lengths = [part.tokens.shape[1] for part in parts]
    length = math.lcm(*lengths)
    if length > MOST_CHUNKS * (chunk := math.gcd(*lengths)):
        counts = ", ".join(str(n // chunk) for n in sorted({*lengths}))
        raise SettingError(
            f"The captions have {counts} chunks, too many lengths for one run: set max_tokens to "
            "450 or less, or shorten the longest."
        )
    times = [length // part.tokens.shape[1] for part in parts]
    tokens = [
        part.tokens if n == 1 else part.tokens.repeat(1, n, 1)
        for part, n in zip(parts, times, strict=True)
    ]
    if max(times) == 1 and all(part.copies is None for part in parts):
        return tokens, None
    copies = [
        n * (torch.ones(len(part), dtype=torch.long) if part.copies is None else part.copies)
        for part, n in zip(parts, times, strict=True)
    ]
    return tokens, torch.cat(copies)
