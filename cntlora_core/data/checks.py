"""A look at the pictures before training: what a person would want to know, in sentences."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from PIL import Image

from .folder import some
from .images import Picture

NEAR = 3  # of 255: mean difference of thumbnails up to which two pictures count as near-duplicates


def check_pictures(
    pictures: Iterable[Picture], resolution: int, *, masked: bool = True
) -> list[str]:
    """What to know before training on these, a sentence each; empty when all is well. `masked`:
    whether masks will be used."""
    pictures = list(pictures)
    findings = []
    if len(pictures) < 3:
        count = "1 picture" if len(pictures) == 1 else f"{len(pictures)} pictures"
        findings.append(f"Only {count}: 3-20 teach a subject better.")
    small = [p.name for p in pictures if min(p.image.size) < resolution]
    if small:
        findings.append(
            f"{len(small)} of {len(pictures)} are smaller than {resolution} px: {some(small)}."
        )
    captioned = sum(p.caption is not None for p in pictures)
    if 0 < captioned < len(pictures):
        missing = [p.name for p in pictures if p.caption is None]
        findings.append(
            f"{len(missing)} have no caption of their own and take the prompt: {some(missing)}."
        )
    shaped = [p.name for p in pictures if p.mask_file]
    if shaped and not masked:
        findings.append(f"{len(shaped)} have a mask that is not used: turn on masked.")
    pairs = near_duplicates(pictures)
    if pairs:
        named = [f"'{a}' and '{b}'" for a, b in pairs]
        findings.append(
            f"{len(pairs)} pairs look almost the same, which teaches them twice: {some(named)}."
        )
    return findings


def near_duplicates(pictures: Iterable[Picture]) -> list[tuple[str, str]]:
    """Pairs of names whose 16 x 16 thumbnails differ by at most 3 of 255 on average: a copy,
    another size, another compression."""
    pictures = list(pictures)
    if not pictures:
        return []
    small = np.stack(
        [
            np.asarray(p.image.resize((16, 16), Image.Resampling.BOX), dtype=np.float32).ravel()
            for p in pictures
        ]
    )
    return [
        (pictures[first].name, pictures[second].name)
        for second in range(1, len(pictures))
        for first in np.flatnonzero(
            np.abs(small[:second] - small[second]).mean(axis=1) <= NEAR
        ).tolist()
    ]
