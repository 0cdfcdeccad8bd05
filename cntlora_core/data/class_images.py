"""What the model should go on knowing: pictures of the class, drawn by the model itself."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from ..events import Observer, Status, ignore
from ..model.conditioning import Conditioning, encode_prompts
from ..model.sampling import sample_latents
from .batches import NoisedSet, draw_noised
from .dataset import check_resolution
from .encoded import EncodedImages
from .latent_cache import LatentCache

if TYPE_CHECKING:
    from ..model.loader import StableDiffusion

# Pictures and sampling steps. For activations few and rough ones are enough, nobody looks at them;
# those that are trained on are drawn with more care.
MEASURED = (8, 12)
TRAINED = (32, 25)
PRIOR_SEED = 1000


def class_images(
    model: StableDiffusion,
    prompt: str,
    resolution: int | None = None,
    *,
    count: int = MEASURED[0],
    steps: int = MEASURED[1],
    guidance: float = 1.0,
    folder: Path | None = None,
    observer: Observer = ignore,
) -> EncodedImages:
    """What the model itself draws for the class prompt, as a subject: for the prior loss and for
    C_p.

    With `folder` the latents are kept there, under a hash of the model and the request, and found
    again.
    """
    side = check_resolution(model, resolution)
    cache = LatentCache(folder, model.unet) if folder else None
    words = encode_prompts(model, [prompt], size=(side, side))
    # The same weights draw something else by another schedule, or read from another layer.
    drawn_by = model.schedule.prediction + (
        f", clip skip {model.prompts.clip_skip}" if (model.prompts.clip_skip or 1) > 1 else ""
    )
    keys = [
        ("class", prompt, side, steps, guidance, drawn_by, PRIOR_SEED + n) for n in range(count)
    ]
    told = _digest(words) if cache else ""  # by the same prompt another text encoder's differ
    kept = [(*key, told) for key in keys]
    held = [found[0].to(model.device) for key in kept if cache and (found := cache.get(key))]
    if len(held) < count:
        how: dict[str, str | int] = {"count": count, "prompt": prompt}
        observer(Status("Drawing {count} pictures of '{prompt}' to preserve", how))
        latents = sample_latents(
            model,
            [prompt] * count,
            range(PRIOR_SEED, PRIOR_SEED + count),
            steps=steps,
            guidance=guidance,
            size=(side, side),
            observer=observer,
        )
        held = list(latents.float())
        for key, latent in zip(kept, held, strict=True) if cache else ():
            cache.put(key, latent, torch.zeros_like(latent))  # type: ignore[union-attr]
    rows = torch.zeros(count, dtype=torch.long)
    return EncodedImages(
        names=tuple(f"drawn {n}" for n in range(count)),
        pictures=tuple(range(count)),
        mean=tuple(held),
        std=tuple(torch.zeros_like(latent) for latent in held),
        masks=None,
        repeats=(1,) * count,
        conditioning=words[rows],
        empty_prompt=encode_prompts(model, [""], size=(side, side)),
        prompt=prompt,
        resolution=side,
        digest=hashlib.sha256(repr(keys).encode()).hexdigest(),
        groups=("",) * count,
    )


def _digest(words: Conditioning) -> str:
    parts = [
        t.detach().float().cpu().numpy() for t in (words.tokens, words.pooled) if t is not None
    ]
    return hashlib.sha256(b"".join(part.tobytes() for part in parts)).hexdigest()


def class_noised(model: StableDiffusion, pictures: EncodedImages) -> NoisedSet:
    """Class pictures at stratified timesteps, each once: their activations give the preservation
    constraint's C_p."""
    generator = torch.Generator().manual_seed(PRIOR_SEED)
    return draw_noised(pictures, len(pictures), len(model.schedule), generator)
