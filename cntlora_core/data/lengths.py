"""Captions that are longer than what the text encoder reads, found before a model is loaded."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence

from ..model.clip_prompts import MAX_TOKENS
from ..model.tokenizers import as_read, find_tokenizer, load_tokenizers
from .folder import counted, some

# CLIP's vocabulary cuts a text into these first, so that each is a token or more.
PIECES = re.compile(r"'(?:s|t|re|ve|m|ll|d)|[^\W\d_]+|\d|(?:[^\s\w]|_)+", re.IGNORECASE)
SHOWN = 40  # characters of a caption


def too_long(
    texts: Sequence[str],
    limit: int = MAX_TOKENS,
    folders: Sequence[str | os.PathLike[str]] = (),
) -> list[str]:
    """A sentence where some are longer than `limit` tokens. Counted by CLIP's vocabulary in one of
    `folders` or where this machine has it; without it those are found that are so by their words
    alone."""
    read = {text: as_read(text) for text in texts}
    long = {text: own for text, own in read.items() if len(own.encode()) > limit}
    if long and find_tokenizer(folders):  # no token is shorter than a byte
        ids = load_tokenizers("sd1", folders)[0]([*long.values()], verbose=False).input_ids
        counts = [len(row) - 2 for row in ids]  # without start and end
    else:
        counts = [len(PIECES.findall(own)) for own in long.values()]
    cut = [text for text, count in zip(long, counts, strict=True) if count > limit]
    return [rest_unseen(cut, limit)] if cut else []


def rest_unseen(cut: Sequence[str], limit: int, alike: int = 0) -> str:
    """What to say of such captions, `alike` of which differ only in the rest."""
    same = f"; {alike} of them are the same to it" if alike else ""
    are = counted(len(cut), "caption is", "captions are")
    return (
        f"{are} longer than the {limit} tokens that the text encoder reads, the rest is not "
        f"seen{same}: {some([f'{text[:SHOWN]}...' for text in cut])}."
    )
