"""Pictures as the UNet reads them: latents and words, and which of them validate."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..model.conditioning import Conditioning

HOLD_OUT_FROM = 5  # pictures; with fewer each is needed for training


@dataclass(frozen=True)
class EncodedImages:
    """n views of the pictures, ready for the UNet.

    Of each, the scaled latent's mean and standard deviation `[c, h, w]` fp32 (the VAE's posterior;
    sizes may differ), what of it counts (`masks`, `[1, h, w]` of 0 to 1, None: everything), its row
    of conditioning, and how often a pass shows it. `empty_prompt` is one row, the empty prompt.
    `pictures[i]` is the picture that view i shows, `groups[i]` the part of the subject it is of (a
    subfolder): each part keeps a picture to train on.
    """

    names: tuple[str, ...]
    pictures: tuple[int, ...]
    mean: tuple[Tensor, ...]
    std: tuple[Tensor, ...]
    masks: tuple[Tensor, ...] | None
    repeats: tuple[int, ...]
    conditioning: Conditioning
    empty_prompt: Conditioning
    prompt: str
    resolution: int
    digest: str
    groups: tuple[str, ...]
    captions: tuple[str, ...] = ()  # of each view
    trigger: str = ""  # the word that calls the subject, where it was said
    # of all captions, without sizes, in the host's memory: thousands would fill a GPU's. None: one
    # for each
    variants: Conditioning | None = None
    variant_rows: tuple[tuple[int, ...], ...] = ()  # those of each view
    concepts: tuple[int, ...] = ()  # which of several subjects a view is of; empty: one

    def __len__(self) -> int:
        return len(self.mean)

    @property
    def picture_count(self) -> int:
        return len(set(self.pictures))

    @property
    def device(self) -> torch.device:
        return self.mean[0].device

    def sample_latents(self, index: Tensor, generator: torch.Generator) -> Tensor:
        """Draws of the posterior for the views at `index`, which must be of one size: `[len(index),
        c, h, w]`."""
        rows = index.tolist()
        noise = torch.randn(len(rows), *self.mean[rows[0]].shape, generator=generator).to(
            self.device
        )
        return (
            torch.stack([self.mean[i] for i in rows])
            + torch.stack([self.std[i] for i in rows]) * noise
        )

    def draw_words(self, index: Tensor, generator: torch.Generator) -> Conditioning:
        """A variant of the caption of each view at `index`."""
        own = self.conditioning[index]
        if self.variants is None:
            return own
        rows = [self.variant_rows[i] for i in index.tolist()]
        drawn = [r[int(torch.randint(len(r), (1,), generator=generator))] for r in rows]
        words = self.variants[torch.tensor(drawn)].to(self.device, own.tokens.dtype)
        return replace(words, time_ids=own.time_ids)

    def only(self, views: Sequence[int]) -> EncodedImages:
        """The same with some of the views."""

        def part(values: tuple[Any, ...]) -> tuple[Any, ...]:
            return tuple(values[i] for i in views)

        return replace(
            self,
            names=part(self.names),
            pictures=part(self.pictures),
            mean=part(self.mean),
            std=part(self.std),
            masks=None if self.masks is None else part(self.masks),
            repeats=part(self.repeats),
            conditioning=self.conditioning[torch.tensor(list(views), dtype=torch.long)],
            groups=part(self.groups),
            captions=part(self.captions) if self.captions else (),
            variant_rows=part(self.variant_rows) if self.variant_rows else (),
            concepts=part(self.concepts) if self.concepts else (),
        )

    def to(self, device: str | torch.device) -> EncodedImages:
        def moved(tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            return tuple(t.to(device) for t in tensors)

        return replace(
            self,
            mean=moved(self.mean),
            std=moved(self.std),
            masks=None if self.masks is None else moved(self.masks),
            conditioning=self.conditioning.to(device, self.conditioning.tokens.dtype),
            empty_prompt=self.empty_prompt.to(device, self.empty_prompt.tokens.dtype),
        )

    @property
    def nbytes(self) -> int:
        words = [self.conditioning.tokens, self.empty_prompt.tokens]
        words += [self.variants.tokens] if self.variants else []
        return sum(t.nbytes for t in (*self.mean, *self.std, *(self.masks or ()), *words))

    def hold_out(self) -> tuple[EncodedImages, EncodedImages]:
        """All pictures but one to train on, and that one to validate with: the last of each group
        of 5 or more, else the last of the largest. A group's only picture is trained on, so the
        second may be empty."""
        members: dict[str, set[int]] = {}
        for picture, group in zip(self.pictures, self.groups, strict=True):
            members.setdefault(group, set()).add(picture)
        large = [group for group in members.values() if len(group) >= HOLD_OUT_FROM]
        largest = max(members.values(), key=lambda group: (len(group), max(group)))
        held = {max(group) for group in large or [largest] if len(group) > 1}
        views = range(len(self))
        first = {self.pictures[i]: i for i in reversed(views)}
        return (
            self.only([i for i in views if self.pictures[i] not in held]),
            self.only([first[picture] for picture in sorted(held)]),
        )


def with_validation(subject: EncodedImages) -> tuple[EncodedImages, EncodedImages]:
    """What to train on and what to validate with, when nobody gave pictures for it: one left out
    where there are 5 or more, else the same pictures for both."""
    if subject.picture_count < HOLD_OUT_FROM:
        return subject, subject
    training, held = subject.hold_out()
    return (training, held) if len(held) else (subject, subject)


def unvalidated_subjects(subject: EncodedImages, held_out: EncodedImages) -> list[str]:
    """A sentence where pictures were given to validate with that show fewer subjects."""
    count, shown = (len(set(part.concepts)) or 1 for part in (subject, held_out))
    if shown >= count:
        return []
    return [
        f"The pictures to validate with show {shown} of {count} subjects: the best weights and the "
        "strength of all are chosen by these. Give none, and pictures of each are held out."
    ]


def unvalidated(subject: EncodedImages, held_out: EncodedImages) -> list[str]:
    """A sentence where there are too few pictures to hold one out, or where some of several
    subjects have none among those held out."""
    if held_out is subject:
        if subject.picture_count >= HOLD_OUT_FROM:
            return []
        return [
            f"{subject.picture_count} pictures are too few to hold one out ({HOLD_OUT_FROM} or "
            "more): validation looks at those that are trained on, and cannot tell when they are "
            "copied. Judge by the samples."
        ]
    concepts = set(subject.concepts)
    missing = concepts - set(held_out.concepts)
    if not missing:
        return []
    return [
        f"Of {len(missing)} of {len(concepts)} subjects nothing is held out (fewer than "
        f"{HOLD_OUT_FROM} pictures): the best weights are chosen by the others'."
    ]
