"""Pictures, masks and captions in ComfyUI's form, and as CNTLoRA knows them."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..cntlora_core.data.decoding import MIN_SIDE, fitted_mask
from ..cntlora_core.data.images import Picture
from ..cntlora_core.errors import ImageError
from ..cntlora_core.events import Notice, Observer

SHOWN_PX = 256  # the miniature's pictures have 64


def to_image(pictures: Sequence[Image.Image]) -> Tensor:
    """Pictures of one size as ComfyUI's IMAGE: `[n, h, w, 3]` fp32, 0 to 1."""
    return torch.from_numpy(
        np.stack([np.asarray(p.convert("RGB"), dtype=np.float32) / 255 for p in pictures])
    )


def large_enough(picture: Image.Image) -> Image.Image:
    """The picture, in a whole multiple of its size where that is too small to be looked at: a page
    shows none larger than it is."""
    times = max(1, SHOWN_PX // max(picture.size))
    return picture.resize((picture.width * times, picture.height * times), Image.Resampling.BICUBIC)


def from_image(batch: Tensor) -> list[Image.Image]:
    """The other way, what is transparent on white."""
    if batch.shape[-1] == 4:
        batch = 1 - (1 - batch[..., :3]) * batch[..., 3:]
    elif batch.shape[-1] < 3:
        batch = batch[..., :1].expand(*batch.shape[:-1], 3)
    array = (batch[..., :3].detach().cpu().float().clamp(0, 1) * 255).round().byte().numpy()
    return [Image.fromarray(np.ascontiguousarray(a)) for a in array]


def from_batches(batches: Sequence[Tensor]) -> list[Picture]:
    """A list of ComfyUI's IMAGEs, of any sizes, as pictures named by their number. Raises
    ImageError for none, and for one that is too small or not of numbers."""
    for n, values in enumerate((one for batch in batches for one in batch), 1):
        if not torch.isfinite(values).all():
            raise ImageError(
                f"Image {n} is not of numbers (NaN): the node that gives it has failed. A VAE that "
                "decodes in fp16 does so; try it in fp32."
            )
        height, width = values.shape[:2]
        if min(height, width) < MIN_SIDE:
            raise ImageError(
                f"Image {n} is {width}x{height} px, which is too small (at least {MIN_SIDE} px a "
                "side)."
            )
    images = [image for batch in batches for image in from_image(batch)]
    if not images:
        raise ImageError("No pictures came in: the node that gives them let none through.")
    return [
        Picture(f"image {n}", image, hashlib.sha256(image.tobytes()).hexdigest())
        for n, image in enumerate(images, 1)
    ]


def with_captions(pictures: Sequence[Picture], texts: Sequence[str]) -> list[Picture]:
    """The pictures with a caption each, or one for all; an empty one stays the prompt's. Raises
    ImageError for another number."""
    if len(texts) not in (1, len(pictures)):
        raise ImageError(
            f"{len(texts)} captions for {len(pictures)} pictures: connect one for each picture, or "
            "one for all."
        )
    lines = [" ".join(str(text).split()) for text in texts]
    return [
        replace(p, caption=lines[n % len(lines)] or None, caption_file="captions")
        for n, p in enumerate(pictures)
    ]


def with_masks(
    pictures: Sequence[Picture], masks: Sequence[Tensor], observer: Observer
) -> list[Picture]:
    """The pictures with ComfyUI's MASKs `[n, h, w]` (or `[h, w]`), 1 where the subject is: one
    each, or one for all. Raises ImageError for another number."""
    plain = [m for mask in masks for m in mask.detach().cpu().float().reshape(-1, *mask.shape[-2:])]
    if len(plain) not in (1, len(pictures)):
        raise ImageError(
            f"{len(plain)} masks for {len(pictures)} pictures: connect one mask for each picture, "
            "or one for all."
        )
    shapes = [Image.fromarray((m.clamp(0, 1) * 255).round().byte().numpy()) for m in plain]
    masked = []
    for n, picture in enumerate(pictures):
        said: list[str] = []
        shape = fitted_mask(shapes[n % len(shapes)], picture.size, said)
        for text in said:
            observer(Notice(f"'{picture.name}': {text}."))
        if shape is None:
            masked.append(picture)
            continue
        digest = hashlib.sha256(picture.digest.encode() + shape.tobytes()).hexdigest()
        masked.append(replace(picture, held_mask=shape, digest=digest, mask_file="MASK"))
    return masked
