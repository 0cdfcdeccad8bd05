"""Pictures -> cached latents and text embeddings."""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..config import DataConfig
from ..errors import ImageError, SettingError
from ..events import Notice, Observer, Progress, ignore
from ..model.conditioning import Conditioning, encode_prompts
from ..model.loader import StableDiffusion
from .buckets import Crop, crops_of
from .captions import prepare_captions, without_captions
from .checks import check_pictures
from .encoded import EncodedImages
from .folder import counted, some
from .images import Picture, find_pictures
from .latent_cache import LatentCache
from .lengths import rest_unseen
from .tags import MOST_VARIANTS, in_order, tag_variants, variant_count

ENCODE_BATCH = 4
TEXT_BATCH = 16
VIEW_SEED = 7  # of random crops: the same in every run, so that a cache can hold them


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
    captions = [v.picture.caption or prompt for _, v in views]
    texts = tag_variants(captions, data, trigger)
    _tell_fewer(variant_count(captions, data), data, observer)
    prompts = [in_order(caption) for caption in captions]
    _tell_cut(model, list(dict.fromkeys(prompts)), observer)
    with model.encoding(max(v.size[0] * v.size[1] for _, v in views)):
        latents = _encode_all(model, [v for _, v in views], cache, observer)
        conditioning = _conditioning(model, prompts, [v for _, v in views])
        empty_prompt = encode_prompts(model, [""], size=(resolution, resolution))
        variants, variant_rows = _variants(model, texts)
    masked = data.masked and any(p.held_mask is not None for p in pictures)
    encoded = EncodedImages(
        names=tuple(v.picture.name for _, v in views),
        pictures=tuple(n for n, _ in views),
        mean=tuple(mean for mean, _ in latents),
        std=tuple(std for _, std in latents),
        masks=tuple(
            _mask(v, mean, data.unmasked_weight)
            for (_, v), (mean, _) in zip(views, latents, strict=True)
        )
        if masked
        else None,
        repeats=tuple(v.picture.repeats for _, v in views),
        conditioning=conditioning,
        empty_prompt=empty_prompt,
        prompt=prompt,
        resolution=resolution,
        digest=_digest(pictures),
        groups=tuple(v.picture.group for _, v in views),
        captions=tuple(prompts),
        trigger=trigger,
        variants=variants,
        variant_rows=variant_rows,
    )
    return _without_hidden(encoded, observer)


def _without_hidden(encoded: EncodedImages, observer: Observer) -> EncodedImages:
    """Without the views of which the mask shows nothing, which teach nothing. Raises ImageError
    where no other is left."""
    if encoded.masks is None:
        return encoded
    shown = [bool(mask.any()) for mask in encoded.masks]
    if all(shown):
        return encoded
    if not any(shown):
        raise ImageError(
            "The masks show nothing of any picture: white is what is learnt. Turn masked off, or "
            "give masks with white in them."
        )
    hidden = [name for name, seen in zip(encoded.names, shown, strict=True) if not seen]
    said = counted(len(hidden), "view is left out", "views are left out")
    observer(Notice(f"{said}, of which the mask shows nothing: {some(dict.fromkeys(hidden))}."))
    return encoded.only([n for n, seen in enumerate(shown) if seen])


def _digest(pictures: Sequence[Picture]) -> str:
    """Of the pictures and, where they have any, of their captions."""
    digest = hashlib.sha256("".join(p.digest for p in pictures).encode())
    for n, picture in enumerate(pictures):
        digest.update(f"{n} {picture.caption}".encode() if picture.caption else b"")
    return digest.hexdigest()


def _tell_sizes(views: Sequence[Crop], resolution: int, observer: Observer) -> None:
    small = sorted({v.picture.name for v in views if min(v.picture.size) < min(v.size)})
    if small:
        are = counted(len(small), "picture is", "pictures are")
        observer(Notice(f"{are} enlarged to fit the model: {some(small)}."))
    under = sorted({v.picture.name for v in views if v.size[0] * v.size[1] < 0.5 * resolution**2})
    if under:
        are = counted(len(under), "picture is", "pictures are")
        kept = f"small for {resolution} px and kept at their size"
        observer(Notice(f"{are} {kept}: {some(under)}."))


def _tell_fewer(count: int, data: DataConfig, observer: Observer) -> None:
    if 0 < count < data.caption_variants:
        observer(
            Notice(
                f"caption_variants is {data.caption_variants}, but so many captions get {count} "
                f"each: {MOST_VARIANTS} are encoded at most."
            )
        )


def _tell_cut(model: StableDiffusion, prompts: Sequence[str], observer: Observer) -> None:
    """Captions that are longer than what is read of them, and those that only differ there."""
    cut = model.prompts.cut(prompts)
    if not cut:
        return
    alike = sum(times for times in Counter(cut.values()).values() if times > 1)
    observer(Notice(rest_unseen(list(cut), len(next(iter(cut.values()))), alike)))


def _encode_all(
    model: StableDiffusion, views: Sequence[Crop], cache: LatentCache | None, observer: Observer
) -> list[tuple[Tensor, Tensor]]:
    found = {i: held for i, v in enumerate(views) if cache and (held := cache.get(v.key))}
    done = len(found)
    with model.pictures.working(model.device):
        for part in _same_size(views, [i for i in range(len(views)) if i not in found]):
            batch = torch.stack([_to_tensor(views[i].image()) for i in part])
            for i, mean, std in zip(part, *model.pictures.encode(batch), strict=True):
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
    """A row a view. SDXL is told each view's size and crop."""
    words, row = _encode_texts(model, prompts)
    rows = words[torch.tensor([row[p] for p in prompts])]
    sizes = [
        (*v.picture.size[::-1], *v.shown_corner[::-1], *v.size[::-1]) for v in views
    ]  # height before width
    return rows.with_sizes(sizes)


def _variants(
    model: StableDiffusion, texts: Sequence[Sequence[str]]
) -> tuple[Conditioning | None, tuple[tuple[int, ...], ...]]:
    """The texts of the views, in the host's memory, and the rows of each view; None where a view
    has no more than one."""
    if all(len(set(view)) < 2 for view in texts):
        return None, ()
    words, row = _encode_texts(model, [text for view in texts for text in view])
    words = words.to("cpu", words.tokens.dtype)
    return words, tuple(tuple(row[text] for text in view) for view in texts)


def _encode_texts(
    model: StableDiffusion, texts: Sequence[str]
) -> tuple[Conditioning, dict[str, int]]:
    """Each distinct text encoded once, a few at a time, and its row."""
    distinct = list(dict.fromkeys(texts))
    parts = [
        encode_prompts(model, distinct[start : start + TEXT_BATCH])
        for start in range(0, len(distinct), TEXT_BATCH)
    ]
    return Conditioning.cat(parts), {text: n for n, text in enumerate(distinct)}


def _mask(view: Crop, latent: Tensor, unmasked_weight: float) -> Tensor:
    """The mask at the latent's size, at least `unmasked_weight`; everything where there is none."""
    shown = view.mask()
    if shown is None:
        return torch.ones_like(latent[:1])
    small = shown.resize((latent.shape[2], latent.shape[1]), Image.Resampling.BOX)
    shows = torch.from_numpy(np.asarray(small, dtype=np.float32) / 255)[None].to(latent.device)
    return unmasked_weight + (1 - unmasked_weight) * shows if unmasked_weight else shows


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
    masks: str | os.PathLike[str] | None = None,
    cache: LatentCache | None = None,
    observer: Observer = ignore,
) -> EncodedImages:
    """A folder of pictures as the trainer reads it. `words` fill `{trigger}` and `{class}` in the
    prompt and the captions; `masks` is a folder of masks with the pictures' names."""
    data = data or DataConfig()
    found = find_pictures(folder, observer, masks=masks)
    if not data.use_captions:
        found = without_captions(found)
    pictures, prompt = prepare_captions(
        found, prompt, words, add_trigger=data.add_trigger, observer=observer
    )
    size = check_resolution(model, data.resolution)
    for finding in check_pictures(pictures, size, masked=data.masked):
        observer(Notice(finding))
    return encode_subject(
        model, pictures, prompt, data, trigger=words[0], cache=cache, observer=observer
    )
