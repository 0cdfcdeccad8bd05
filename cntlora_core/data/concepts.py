"""Several subjects learnt in one run, each with its own words and an equal share of every pass."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import accumulate, chain
from typing import TypeVar

import torch

from ..errors import SettingError
from ..events import Notice, Observer, ignore
from ..model.conditioning import Conditioning
from .encoded import EncodedImages

Value = TypeVar("Value")


def join_concepts(parts: Sequence[EncodedImages], *, observer: Observer = ignore) -> EncodedImages:
    """The views of all, of as many concepts as there are parts.

    Raises SettingError where their resolutions differ.
    """
    first = parts[0]
    if len(parts) == 1:
        return first
    sizes = {part.resolution for part in parts}
    if len(sizes) > 1:
        raise SettingError(
            f"The subjects of one run have resolutions of {' and '.join(map(str, sorted(sizes)))} "
            "px: choose the same for all."
        )
    triggers = [part.trigger or part.prompt for part in parts]
    for trigger in sorted({t for t in triggers if triggers.count(t) > 1}):
        observer(
            Notice(
                f"Two subjects answer to '{trigger}': they will be learnt as one. Give each its "
                "own trigger."
            )
        )
    masks = [p.masks or tuple(torch.ones_like(m[:1]) for m in p.mean) for p in parts]
    rows_of = (part.variants or part.conditioning for part in parts)
    words = [own.to("cpu", own.tokens.dtype) for own in rows_of]
    varied = any(part.variants for part in parts)
    pictures = _starts([max(part.pictures) + 1 for part in parts])
    rows = _starts([len(w) for w in words])
    return replace(
        first,
        names=_joined(part.names for part in parts),
        pictures=_joined(_moved(p.pictures, n) for p, n in zip(parts, pictures, strict=True)),
        mean=_joined(part.mean for part in parts),
        std=_joined(part.std for part in parts),
        masks=_joined(masks) if any(part.masks for part in parts) else None,
        repeats=_joined(part.repeats for part in parts),
        conditioning=Conditioning.cat([part.conditioning for part in parts]),
        digest=hashlib.sha256("".join(part.digest for part in parts).encode()).hexdigest(),
        groups=_joined([f"{n} {g}" for g in part.groups] for n, part in enumerate(parts)),
        captions=_joined(part.captions for part in parts),
        trigger=", ".join(dict.fromkeys(triggers)),
        concepts=_joined([n] * len(part) for n, part in enumerate(parts)),
        variants=Conditioning.cat(words) if varied else None,
        variant_rows=_joined(
            [_moved(view, n) for view in p.variant_rows or [(i,) for i in range(len(p))]]
            for p, n in zip(parts, rows, strict=True)
        )
        if varied
        else (),
    )


def _joined(values: Iterable[Iterable[Value]]) -> tuple[Value, ...]:
    return tuple(chain.from_iterable(values))


def _moved(numbers: Iterable[int], by: int) -> tuple[int, ...]:
    return tuple(number + by for number in numbers)


def _starts(lengths: Iterable[int]) -> list[int]:
    return [0, *accumulate(lengths)][:-1]
