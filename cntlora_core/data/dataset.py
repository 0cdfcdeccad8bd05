"""Pictures -> cached latents and text embeddings."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..config import DataConfig
from ..errors import SettingError
from ..events import Notice, Observer, Progress, ignore
from ..model.conditioning import Conditioning, encode_prompts
from ..model.loader import StableDiffusion, temporarily_on
from .buckets import Crop, crops_of
from .images import Picture, check_pictures, fill_words, find_pictures, with_words
from .latent_cache import LatentCache

ENCODE_BATCH = 4
VIEW_SEED = 7  # of random crops: the same in every run, so that a cache can hold them


@dataclass(frozen=True)
class EncodedImages:
    """n views of the pictures, ready for the UNet.

    Of each, the scaled latent's mean and standard deviation `[c, h, w]` fp32 (the VAE's posterior;
    sizes may differ), what of it counts (`masks`, `[1, h, w]` of 0 to 1, None: everything), its row
    of conditioning, and how often a pass shows it. `empty_prompt` is one row, the empty prompt.
    `pictures[i]` is the picture that view i shows.
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
    captions: tuple[str, ...] = ()  # of each view
    trigger: str = ""  # the word that calls the subject, where it was said

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

    def only(self, views: Sequence[int]) -> EncodedImages:
        """The same with some of the views."""
        rows = torch.tensor(list(views))
        return EncodedImages(
            names=tuple(self.names[i] for i in views),
            pictures=tuple(self.pictures[i] for i in views),
            mean=tuple(self.mean[i] for i in views),
            std=tuple(self.std[i] for i in views),
            masks=None if self.masks is None else tuple(self.masks[i] for i in views),
            repeats=tuple(self.repeats[i] for i in views),
            conditioning=self.conditioning[rows],
            empty_prompt=self.empty_prompt,
            prompt=self.prompt,
            resolution=self.resolution,
            digest=self.digest,
            captions=tuple(self.captions[i] for i in views if self.captions),
            trigger=self.trigger,
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
        return sum(t.nbytes for t in (*self.mean, *self.std, *(self.masks or ()), *words))

    def hold_out(self) -> tuple[EncodedImages, EncodedImages]:
        """All pictures but the last to train on, and that one to validate with."""
        chosen = max(self.pictures)
        views = range(len(self))
        held = [i for i in views if self.pictures[i] == chosen]
        return self.only([i for i in views if self.pictures[i] != chosen]), self.only(held[:1])


def check_resolution(model: StableDiffusion, resolution: int | None) -> int:
    """The training resolution in px: the model's own when None. Raises SettingError when the model
    cannot take it."""
    size, multiple = resolution or model.resolution, size_step(model)
    if size < multiple or size > 4096 or size % multiple:
        raise SettingError(
            f"resolution is {size} px: this model takes multiples of {multiple} px up to 4096."
        )
    return size


def size_step(model: StableDiffusion) -> int:
    """What every side must divide by, px: the UNet halves the latent at every level but the
    last."""
    return int(model.vae_scale * 2 ** (len(model.unet.config.block_out_channels) - 1))


@torch.no_grad()
def encode_subject(
    model: StableDiffusion,
    pictures: Sequence[Picture],
    prompt: str,
    data: DataConfig | None = None,
    *,
    trigger: str = "",
    cache: LatentCache | None = None,
    observer: Observer = ignore,
) -> EncodedImages:
    """Run the VAE and the text encoders once; training reads only what comes out. `prompt` serves
    pictures without a caption."""
    data = data or DataConfig()
    resolution = check_resolution(model, data.resolution)
    generator = torch.Generator().manual_seed(VIEW_SEED)
    step = size_step(model)
    views = [
        (n, v)
        for n, p in enumerate(pictures)
        for v in crops_of(p, resolution, step, data, generator)
    ]
    _tell_sizes([v for _, v in views], resolution, observer)
    latents = _encode_all(model, [v for _, v in views], cache, observer)
    prompts = [v.picture.caption or prompt for _, v in views]
    masked = data.masked and any(p.mask is not None for p in pictures)
    return EncodedImages(
        names=tuple(v.picture.name for _, v in views),
        pictures=tuple(n for n, _ in views),
        mean=tuple(mean for mean, _ in latents),
        std=tuple(std for _, std in latents),
        masks=tuple(_mask(v, mean) for (_, v), (mean, _) in zip(views, latents, strict=True))
        if masked
        else None,
        repeats=tuple(v.picture.repeats for _, v in views),
        conditioning=_conditioning(model, prompts, [v for _, v in views]),
        empty_prompt=encode_prompts(model, [""], size=(resolution, resolution)),
        prompt=prompt,
        resolution=resolution,
        digest=hashlib.sha256("".join(p.digest for p in pictures).encode()).hexdigest(),
        captions=tuple(prompts),
        trigger=trigger,
    )


def _tell_sizes(views: Sequence[Crop], resolution: int, observer: Observer) -> None:
    small = sorted({v.picture.name for v in views if min(v.picture.image.size) < min(v.size)})
    if small:
        observer(
            Notice(f"{len(small)} pictures are enlarged to fit the model: {', '.join(small[:3])}.")
        )
    under = sorted({v.picture.name for v in views if v.size[0] * v.size[1] < 0.5 * resolution**2})
    if under:
        observer(
            Notice(
                f"{len(under)} pictures are small for {resolution} px and keep their size: "
                f"{', '.join(under[:3])}."
            )
        )


def _encode_all(
    model: StableDiffusion, views: Sequence[Crop], cache: LatentCache | None, observer: Observer
) -> list[tuple[Tensor, Tensor]]:
    found = {i: held for i, v in enumerate(views) if cache and (held := cache.get(v.key))}
    done = len(found)
    with temporarily_on(model.vae, model.device):
        for part in _same_size(views, [i for i in range(len(views)) if i not in found]):
            batch = torch.stack([_to_tensor(views[i].image()) for i in part])
            posterior = model.vae.encode(batch.to(model.device, model.vae.dtype)).latent_dist
            scale = model.vae.config.scaling_factor
            for i, mean, std in zip(
                part, posterior.mean.float() * scale, posterior.std.float() * scale, strict=True
            ):
                found[i] = (mean, std)
                if cache:
                    cache.put(views[i].key, mean, std)
            done += len(part)
            observer(Progress("encoding pictures", done, len(views)))
    return [
        (mean.to(model.device), std.to(model.device))
        for mean, std in (found[i] for i in range(len(views)))
    ]


def _same_size(views: Sequence[Crop], index: Sequence[int]) -> Iterator[list[int]]:
    """`index` in batches of one size each, in order."""
    for size in dict.fromkeys(views[i].size for i in index):
        same = [i for i in index if views[i].size == size]
        yield from (
            same[start : start + ENCODE_BATCH] for start in range(0, len(same), ENCODE_BATCH)
        )


def _conditioning(
    model: StableDiffusion, prompts: Sequence[str], views: Sequence[Crop]
) -> Conditioning:
    """A row a view; each distinct prompt is encoded once. SDXL is told each view's size and
    crop."""
    distinct = list(dict.fromkeys(prompts))
    rows = encode_prompts(model, distinct)[torch.tensor([distinct.index(p) for p in prompts])]
    sizes = [
        (*v.picture.image.size[::-1], *v.corner[::-1], *v.size[::-1]) for v in views
    ]  # height before width
    return rows.with_sizes(sizes)


def _mask(view: Crop, latent: Tensor) -> Tensor:
    """The alpha channel at the latent's size; everything where there is none."""
    shown = view.mask()
    if shown is None:
        return torch.ones_like(latent[:1])
    small = shown.resize((latent.shape[2], latent.shape[1]), Image.Resampling.BOX)
    return torch.from_numpy(np.asarray(small, dtype=np.float32) / 255)[None].to(latent.device)


def _to_tensor(image: Image.Image) -> Tensor:
    pixels = torch.from_numpy(np.asarray(image, dtype=np.float32) / 127.5 - 1)
    return pixels.permute(2, 0, 1)


def read_subject(
    model: StableDiffusion,
    folder: str | os.PathLike[str],
    prompt: str,
    data: DataConfig | None = None,
    *,
    words: tuple[str, str] = ("", ""),
    cache: LatentCache | None = None,
    observer: Observer = ignore,
) -> EncodedImages:
    """A folder of pictures as the trainer reads it. `words` fill `{trigger}` and `{class}` in the
    prompt and the captions."""
    pictures = with_words(find_pictures(folder, observer), *words)
    for finding in check_pictures(
        pictures, check_resolution(model, data.resolution if data else None)
    ):
        observer(Notice(finding))
    return encode_subject(
        model,
        pictures,
        fill_words(prompt, *words),
        data,
        trigger=words[0],
        cache=cache,
        observer=observer,
    )


HOLD_OUT_FROM = 5  # pictures; with fewer each is needed for training


def with_validation(subject: EncodedImages) -> tuple[EncodedImages, EncodedImages]:
    """What to train on and what to validate with, when nobody gave pictures for it: the last
    picture where there are 5 or more, else the same pictures for both."""
    return subject.hold_out() if subject.picture_count >= HOLD_OUT_FROM else (subject, subject)
