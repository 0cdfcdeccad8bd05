"""Pictures from the model, for previews: DDIM with classifier-free guidance."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..devices import first_that_fits, halved, memory_sufficing
from ..events import Observer, Progress, ignore
from .conditioning import Conditioning, encode_prompts
from .loader import StableDiffusion
from .noise_schedule import NoiseSchedule

LATENT_CHANNELS = 4
GUIDANCE_RESCALE = 0.7  # of Lin et al. 2024, section 3.4: guidance overexposes where SNR ends at 0
# Of a latent's place in a pass of the UNet without gradients, half precision: the most of all
# families, as `unet_sampling_memory` counts it.
PASS_BYTES = 17_000


@torch.no_grad()
def sample_latents(
    model: StableDiffusion,
    prompts: Sequence[str],
    seeds: Sequence[int],
    *,
    steps: int = 25,
    guidance: float = 4.0,
    negative: str = "",
    size: tuple[int, int] | None = None,
    observer: Observer = ignore,
) -> Tensor:
    """Scaled latents `[n, 4, h, w]` for n prompts; picture i starts from the noise of `seeds[i]`
    whatever the others are, as many at once as the memory holds.

    `size` is (height, width) in px, the model's own resolution when None. `guidance` 1 runs the
    prompt alone, at half the cost.
    """
    height, width = size or (model.resolution, model.resolution)
    rows = 1 if guidance == 1 else 2  # of a picture in a pass
    places = (height // model.vae_scale) * (width // model.vae_scale)
    each = rows * places * PASS_BYTES * model.dtype.itemsize // 2

    def draw(many: int) -> Tensor:
        parts = [slice(start, start + many) for start in range(0, len(prompts), many)]
        drawn = []
        for n, part in enumerate(parts):

            def tell(done: int, before: int = n * steps) -> None:
                observer(Progress("drawing", before + done, len(parts) * steps))

            drawn.append(
                _drawn_together(
                    model, prompts[part], seeds[part],
                    steps, guidance, negative, (height, width), tell,
                )
            )  # fmt: skip
        return torch.cat(drawn)

    ways = {many: many * each for many in halved(len(prompts))}
    with memory_sufficing(model.device):
        return first_that_fits(ways, draw, model.device)


def _drawn_together(
    model: StableDiffusion,
    prompts: Sequence[str],
    seeds: Sequence[int],
    steps: int,
    guidance: float,
    negative: str,
    size: tuple[int, int],
    tell: Callable[[int], None],
) -> Tensor:
    """In one batch; `tell` is told how many steps are done."""
    shape = (LATENT_CHANNELS, *(side // model.vae_scale for side in size))
    latents = torch.stack(
        [torch.randn(shape, generator=torch.Generator().manual_seed(s)) for s in seeds]
    ).to(model.device)
    conditioning = encode_prompts(model, list(prompts), size=size)
    guided = guidance != 1
    if guided:
        empty = encode_prompts(model, [negative] * len(prompts), size=size)
        conditioning = Conditioning.cat([empty, conditioning])
    scheduler = _scheduler(model)
    scheduler.set_timesteps(steps)
    for done, t in enumerate(scheduler.timesteps, 1):
        twice = torch.cat([latents, latents]) if guided else latents
        times = torch.full((len(twice),), int(t), device=model.device)
        predicted = model.unet(
            twice.to(model.dtype), times, return_dict=False, **conditioning.unet_kwargs()
        )[0].float()
        if guided:
            without, with_prompt = predicted.chunk(2)
            predicted = without + guidance * (with_prompt - without)
            if model.schedule.zero_terminal_snr:
                predicted = _rescaled(predicted, with_prompt)
        latents = scheduler.step(predicted, t, latents).prev_sample
        tell(done)
    return latents


def _scheduler(model: StableDiffusion) -> Any:
    from diffusers import DDIMScheduler

    scheduler = DDIMScheduler.from_config(model.scheduler_config, **_ddim_options(model.schedule))
    scheduler.alphas_cumprod = model.schedule.alphas_cumprod
    return scheduler


def _ddim_options(schedule: NoiseSchedule) -> dict[str, Any]:
    """What the sampler must not read from a checkpoint's configuration."""
    options: dict[str, Any] = {
        "clip_sample": False,
        "thresholding": False,
        "rescale_betas_zero_snr": False,  # our own schedule takes its place
        "prediction_type": schedule.prediction_type,
    }
    if schedule.zero_terminal_snr:  # the first step must see noise alone, as training did
        options["timestep_spacing"] = "trailing"
    return options


def _rescaled(guided: Tensor, with_prompt: Tensor) -> Tensor:
    """A guided prediction `[n, c, h, w]` brought towards the spread of the prompt's own."""
    places = (1, 2, 3)
    spread = with_prompt.std(places, keepdim=True) / guided.std(places, keepdim=True)
    return guided * (GUIDANCE_RESCALE * spread + 1 - GUIDANCE_RESCALE)


@torch.no_grad()
def decode(model: StableDiffusion, latents: Iterable[Tensor]) -> list[Image.Image]:
    """Scaled latents, each `[4, h, w]`, of any sizes -> RGB pictures."""
    pictures = []
    with model.pictures.working(model.device):
        for latent in latents:
            pixels = model.pictures.decode(latent[None])
            array = (
                ((pixels[0].clamp(-1, 1) + 1) * 127.5).round().byte().permute(1, 2, 0).cpu().numpy()
            )
            pictures.append(Image.fromarray(np.ascontiguousarray(array)))
    return pictures


def sample(
    model: StableDiffusion, prompts: Sequence[str], seeds: Sequence[int], **options: object
) -> list[Image.Image]:
    """Pictures for `prompts`; options as in `sample_latents`."""
    return decode(model, sample_latents(model, prompts, seeds, **options))  # type: ignore[arg-type]
