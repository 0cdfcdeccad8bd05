from copy import deepcopy
from dataclasses import replace

import numpy as np
import torch

from cntlora_core.model.conditioning import Conditioning, encode_prompts
from cntlora_core.model.noise_schedule import NoiseSchedule
from cntlora_core.model.prediction import V_ZERO_SNR, scheduler_keys
from cntlora_core.model.sampling import decode, sample, sample_latents

PROMPT = "red heart emoji"


def test_a_red_heart_is_red(mini_sd):
    """The real model, the real path: the middle of the picture is red, its corners are white."""
    (picture,) = sample(mini_sd, [PROMPT], [3], steps=12)
    pixels = np.asarray(picture).astype(float)
    red, green, blue = pixels[24:40, 24:40].mean((0, 1))
    assert red > 150 > 110 > max(green, blue)
    assert pixels[:4, :4].mean() > 230


def test_a_picture_does_not_depend_on_its_neighbours(mini_sd):
    alone = sample_latents(mini_sd, [PROMPT], [7], steps=3)
    beside = sample_latents(mini_sd, ["a cat face emoji", PROMPT], [1, 7], steps=3)
    torch.testing.assert_close(alone[0], beside[1], rtol=1e-3, atol=1e-3)


def test_size_and_guidance(mini_sd):
    latents = sample_latents(mini_sd, [PROMPT], [1], steps=2, guidance=1.0, size=(64, 96))
    assert latents.shape == (1, 4, 16, 24)
    assert decode(mini_sd, latents)[0].size == (96, 64)


def diffusers_draws(model, scheduler, **options):
    """StableDiffusionPipeline from the noise of seed 5."""
    from diffusers import StableDiffusionPipeline

    pipe = StableDiffusionPipeline(
        vae=model.pictures.vae,
        text_encoder=deepcopy(model.prompts.encoders[0]).float(),
        tokenizer=model.prompts.tokenizers[0],
        unet=model.unet,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    noise = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(5))
    size = {"height": 64, "width": 64, "latents": noise, "output_type": "latent"}
    with torch.no_grad():
        return pipe(PROMPT, num_inference_steps=5, guidance_scale=4.0, **size, **options).images


def test_diffusers_draws_the_same(mini_sd):
    """Our loop against StableDiffusionPipeline with the same latents."""
    from diffusers import DDIMScheduler

    theirs = diffusers_draws(mini_sd, DDIMScheduler.from_config(mini_sd.scheduler_config))
    ours = sample_latents(mini_sd, [PROMPT], [5], steps=5, guidance=4.0)
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)


def test_diffusers_draws_the_same_at_zero_terminal_snr(mini_sd):
    """Trailing timesteps and the rescaled guidance of Lin et al., as diffusers has them."""
    from diffusers import DDIMScheduler

    config = mini_sd.scheduler_config | scheduler_keys(V_ZERO_SNR)
    model = replace(mini_sd, scheduler_config=config, schedule=NoiseSchedule.from_config(config))
    scheduler = DDIMScheduler.from_config(config, timestep_spacing="trailing")
    theirs = diffusers_draws(model, scheduler, guidance_rescale=0.7)
    ours = sample_latents(model, [PROMPT], [5], steps=5, guidance=4.0)
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)


def test_conditioning_rows(mini_sd):
    both = encode_prompts(mini_sd, ["a", "b"])
    assert len(both) == 2
    assert torch.equal(both[torch.tensor([1, 1])].tokens[0], both.tokens[1])
    assert torch.equal(Conditioning.cat([both[:1], both[1:]]).tokens, both.tokens)
    pooled = Conditioning(both.tokens, torch.zeros(2, 3), torch.zeros(2, 6))
    assert set(pooled[:1].unet_kwargs()["added_cond_kwargs"]) == {"text_embeds", "time_ids"}
    assert len(Conditioning.cat([pooled, pooled]).pooled) == 4


def test_sizes_are_told_exactly_whatever_the_precision():
    """Half precision made 1023 px into 1024."""
    words = Conditioning(torch.zeros(1, 2, 3), torch.zeros(1, 3), torch.zeros(1, 6))
    half = words.to("cpu", torch.bfloat16).with_sizes([(1023, 769, 0, 0, 1023, 769)])
    assert half.tokens.dtype == half.pooled.dtype == torch.bfloat16
    assert half.time_ids.tolist() == [[1023, 769, 0, 0, 1023, 769]]
