"""A look at the pictures before training: what a person would want to know, in sentences."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from PIL import Image

from .folder import counted, some
from .images import Picture

NEAR = 3  # of 255: mean difference of thumbnails up to which two pictures count as near-duplicates


def check_pictures(
    pictures: Iterable[Picture], resolution: int, *, masked: bool | None = None
) -> list[str]:
    """What to know before training on these, a sentence each; empty when all is well. `masked`:
    whether masks will be used (None: not known)."""
    pictures = list(pictures)
    findings = []
    if len(pictures) < 3:
        count = "1 picture" if len(pictures) == 1 else f"{len(pictures)} pictures"
        findings.append(f"Only {count}: 3-20 teach a subject better.")
    small = [p.name for p in pictures if min(p.size) < resolution]
    if small:
        are = counted(len(small), f"of {len(pictures)} is", f"of {len(pictures)} are")
        findings.append(f"{are} smaller than {resolution} px: {some(small)}.")
    captioned = sum(p.caption is not None for p in pictures)
    if 0 < captioned < len(pictures):
        missing = [p.name for p in pictures if p.caption is None]
        lack = counted(len(missing), "picture without a caption", "pictures without captions")
        findings.append(f"The prompt serves {lack}: {some(missing)}.")
    shaped = [p.name for p in pictures if p.mask_file]
    if shaped and masked is False:
        have = counted(len(shaped), "picture has a mask", "pictures have masks")
        findings.append(f"{have}, not used: turn on masked.")
    whole = [p.name for p in pictures if p.held_mask is None]
    if masked and len(whole) == len(pictures):
        findings.append("No picture has a mask: all of each is learnt.")
    elif masked and whole:
        have = counted(
            len(whole),
            "picture has no mask, and all of it is learnt",
            "pictures have no mask, and all of them is learnt",
        )
        findings.append(f"{have}: {some(whole)}.")
    pairs = near_duplicates(pictures)
    if pairs:
        named = [f"'{a}' and '{b}'" for a, b in pairs]
        look = counted(len(pairs), "picture looks", "pictures look")
        findings.append(f"{look} almost like another, which teaches it twice: {some(named)}.")
    return findings


def near_duplicates(pictures: Iterable[Picture]) -> list[tuple[str, str]]:
    """Names of pictures and of the first one before each whose 16 x 16 thumbnail differs by at
    most 3 of 255 on average: a copy, another size, another compression."""
    pictures = list(pictures)
    if not pictures:
        return []
    small = np.stack(
        [
            np.asarray(p.image.resize((16, 16), Image.Resampling.BOX), dtype=np.float32).ravel()
            for p in pictures
        ]
    )
    means = small.mean(axis=1)
    pairs = []
    for second in range(1, len(pictures)):
        # Thumbnails differ by what their means do or more: most pairs need no second look.
        near = np.flatnonzero(np.abs(means[:second] - means[second]) <= NEAR)
        same = near[np.abs(small[near] - small[second]).mean(axis=1) <= NEAR]
        if len(same):
            pairs.append((pictures[same[0]].name, pictures[second].name))
    return pairs
