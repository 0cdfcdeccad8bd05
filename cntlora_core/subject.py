"""A folder of pictures -> cached latents and text embeddings."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from .checkpoint import StableDiffusion, visiting
from .conditioning import Conditioning, encode_prompts
from .errors import ImageError, SettingError
from .events import Notice, Observer, Progress, ignore

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
MIN_SIDE = 16  # px; below this there is nothing to learn from
MAX_PIXELS = 100_000_000  # a decompression bomb, not a photograph
ENCODE_BATCH = 4


@dataclass(frozen=True)
class Picture:
    """A readable picture of the subject: RGB, upright, transparent parts on white."""

    name: str
    image: Image.Image
    digest: str  # SHA-256 of the file


@dataclass(frozen=True)
class Subject:
    """n pictures ready for the UNet: scaled latents' mean and standard deviation `[n, c, h, w]` fp32 (the VAE's posterior),
    and n rows of conditioning."""

    names: tuple[str, ...]
    mean: Tensor
    std: Tensor
    conditioning: Conditioning
    prompt: str
    resolution: int
    digest: str

    def __len__(self) -> int:
        return len(self.names)

    def sample_latents(self, index: Tensor, generator: torch.Generator) -> Tensor:
        """Draws of the posterior for the pictures at `index`, `[len(index), c, h, w]`."""
        noise = torch.randn(len(index), *self.mean.shape[1:], generator=generator)
        index = index.to(self.mean.device)
        return self.mean[index] + self.std[index] * noise.to(self.mean.device)


def find_pictures(folder: str | os.PathLike[str], observer: Observer = ignore) -> list[Picture]:
    """All usable pictures of a folder, by name. Unusable ones are named in a Notice and left out.

    Raises ImageError when the folder is missing or nothing usable is in it.
    """
    path = Path(folder)
    if not path.is_dir():
        raise ImageError(
            f"The picture folder '{path}' does not exist. Give a folder with 3-20 pictures of the subject."
        )
    files = sorted(p for p in path.iterdir() if p.suffix.lower() in SUFFIXES and p.is_file())
    pictures = []
    for file in files:
        try:
            pictures.append(_open(file))
        except ImageError as error:
            observer(Notice(str(error)))
    if not pictures:
        seen = f"found 0 of {' '.join(SUFFIXES)}" if not files else f"none of {len(files)} could be used"
        raise ImageError(f"No images in '{path}': {seen}. Put 3-20 pictures of the subject there.")
    return pictures


def _open(file: Path) -> Picture:
    try:
        with Image.open(file) as opened:
            width, height = opened.size
            if min(width, height) < MIN_SIDE:
                raise ImageError(
                    f"Skipped '{file.name}': {width}x{height} px is too small (at least {MIN_SIDE} px a side)."
                )
            if width * height > MAX_PIXELS:
                raise ImageError(f"Skipped '{file.name}': {width}x{height} px is too large (at most 100 megapixels).")
            image = _on_white(ImageOps.exif_transpose(opened))
        digest = hashlib.sha256(file.read_bytes()).hexdigest()
    except ImageError:
        raise
    except (OSError, ValueError, SyntaxError, MemoryError, Image.DecompressionBombError) as error:
        reason = str(error).rstrip(".") or type(error).__name__
        raise ImageError(f"Skipped '{file.name}': it cannot be read ({reason}).") from error
    return Picture(file.name, image, digest)


def _on_white(image: Image.Image) -> Image.Image:
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        rgba = image.convert("RGBA")
        white = Image.new("RGBA", rgba.size, "white")
        return Image.alpha_composite(white, rgba).convert("RGB")
    return image.convert("RGB")


def crop_square(image: Image.Image, resolution: int) -> Image.Image:
    """The centred square, resized to `resolution` px a side."""
    return ImageOps.fit(image, (resolution, resolution), Image.Resampling.LANCZOS)


def _to_tensor(image: Image.Image) -> Tensor:
    pixels = torch.from_numpy(np.asarray(image, dtype=np.float32) / 127.5 - 1)
    return pixels.permute(2, 0, 1)


def check_resolution(model: StableDiffusion, resolution: int | None) -> int:
    """The training resolution in px: the model's own when None. Raises SettingError when the model cannot take it."""
    size = resolution or model.resolution
    # The UNet halves the latent at every level but the last: each side must divide.
    multiple = model.vae_scale * 2 ** (len(model.unet.config.block_out_channels) - 1)
    if size < multiple or size > 4096 or size % multiple:
        raise SettingError(f"resolution is {size} px: this model takes multiples of {multiple} px up to 4096.")
    return size


@torch.no_grad()
def encode_subject(
    model: StableDiffusion,
    pictures: Sequence[Picture],
    prompt: str,
    *,
    resolution: int | None = None,
    observer: Observer = ignore,
) -> Subject:
    """Run the VAE and the text encoders once; training reads only what comes out."""
    size = check_resolution(model, resolution)
    small = [p.name for p in pictures if min(p.image.size) < size]
    if small:
        observer(
            Notice(
                f"{len(small)} of {len(pictures)} pictures are smaller than {size} px and were enlarged: {', '.join(small[:3])}."
            )
        )
    means, stds = [], []
    with visiting(model.vae, model.device):
        for start in range(0, len(pictures), ENCODE_BATCH):
            part = pictures[start : start + ENCODE_BATCH]
            batch = torch.stack([_to_tensor(crop_square(p.image, size)) for p in part])
            posterior = model.vae.encode(batch.to(model.device, model.vae.dtype)).latent_dist
            means.append(posterior.mean.float() * model.vae.config.scaling_factor)
            stds.append(posterior.std.float() * model.vae.config.scaling_factor)
            observer(Progress("encoding pictures", start + len(part), len(pictures)))
    conditioning = encode_prompts(model, [prompt], size=(size, size))
    rows = torch.zeros(len(pictures), dtype=torch.long)
    digest = hashlib.sha256("".join(p.digest for p in pictures).encode()).hexdigest()
    return Subject(
        names=tuple(p.name for p in pictures),
        mean=torch.cat(means),
        std=torch.cat(stds),
        conditioning=conditioning[rows],
        prompt=prompt,
        resolution=size,
        digest=digest,
    )
