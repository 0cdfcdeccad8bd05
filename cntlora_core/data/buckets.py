"""How a picture is shown to the model: its size among the buckets, its crop, mirrored or not."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from PIL import Image, ImageOps

from ..config import DataConfig
from .images import Picture

RANDOM_CROPS = 4  # crops of each picture that are encoded once and drawn from, the centre first
CLOSER = 1.05  # times as large as it need be, that is how far a random crop goes in at most


@dataclass(frozen=True)
class Crop:
    """`picture` resized to cover `size` (width, height) and cropped at `corner` (left, top), in px
    after resizing."""

    picture: Picture
    resized: tuple[int, int]
    corner: tuple[int, int]
    size: tuple[int, int]
    mirrored: bool = False

    def image(self) -> Image.Image:
        return self._of(self.picture.image)

    def mask(self) -> Image.Image | None:
        mask = self.picture.mask
        return None if mask is None else self._of(mask)

    @property
    def shown_corner(self) -> tuple[int, int]:
        """Left and top in the picture as it is shown: mirrored, where it is."""
        left, top = self.corner
        return (self.resized[0] - left - self.size[0] if self.mirrored else left), top

    @property
    def key(self) -> tuple[object, ...]:
        """Tells this view from every other: for a cache."""
        return (self.picture.digest, self.resized, self.corner, self.size, self.mirrored)

    def _of(self, image: Image.Image) -> Image.Image:
        (left, top), (width, height) = self.corner, self.size
        shown = image.resize(self.resized, Image.Resampling.LANCZOS).crop(
            (left, top, left + width, top + height)
        )
        return ImageOps.mirror(shown) if self.mirrored else shown


def bucket_size(
    width: int, height: int, resolution: int, step: int, *, upscale: bool = False
) -> tuple[int, int]:
    """Sides that are multiples of `step` px, nearest in shape and area to the picture's, width and
    height in px.

    Never more than resolution^2 px, never longer than twice the resolution, and, unless `upscale`,
    never larger than the picture (but for one step a side).
    """
    sides = range(step, min(2 * resolution, 4096) + 1, step)
    area = resolution**2 if upscale else min(resolution**2, width * height)
    fitting = (
        (w, h)
        for w in sides
        for h in sides
        if w * h <= resolution**2
        and (upscale or (w <= max(width, step) and h <= max(height, step)))
    )

    def loss(
        size: tuple[int, int],
    ) -> float:  # a wrong shape crops away, a small area throws detail away
        w, h = size
        return abs(math.log(w * height / (h * width))) + 0.5 * abs(math.log(area / (w * h)))

    return min(fitting, key=loss)


def crops_of(
    picture: Picture, resolution: int, step: int, config: DataConfig, generator: torch.Generator
) -> Iterator[Crop]:
    """One view of the picture, centred, or several when crops are random or it is mirrored. Random
    ones are of any place and up to `CLOSER` in, so that pictures of the bucket's own shape have
    room for them too."""
    width, height = picture.size
    size = (resolution, resolution)
    if config.buckets:
        size = bucket_size(width, height, resolution, step, upscale=config.upscale)
    elif not config.upscale and min(width, height) < resolution:
        side = max(step, min(width, height) // step * step)
        size = (side, side)
    cover = max(size[0] / width, size[1] / height)
    draws = [(0.0, 0.5, 0.5)]
    if config.random_crop:
        draws += torch.rand(RANDOM_CROPS - 1, 3, generator=generator).tolist()
    for closer, x, y in draws:
        scale = cover * (1 + (CLOSER - 1) * closer)
        resized = (max(size[0], round(width * scale)), max(size[1], round(height * scale)))
        room = (resized[0] - size[0], resized[1] - size[1])
        corner = (_nearest(x * room[0]), _nearest(y * room[1]))
        for mirrored in (False, True) if config.flip else (False,):
            yield Crop(picture, resized, corner, size, mirrored)


def _nearest(value: float) -> int:
    """A half is taken down, where the centre always was: pictures cached before are found again."""
    return math.ceil(value - 0.5)
