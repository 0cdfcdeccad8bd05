import numpy as np
import torch

from cntlora_core.model.conditioning import Conditioning, encode_prompts
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


def test_diffusers_draws_the_same(mini_sd):
    """Our loop against StableDiffusionPipeline with the same latents."""
    from diffusers import DDIMScheduler, StableDiffusionPipeline

    pipe = StableDiffusionPipeline(
        vae=mini_sd.vae,
        text_encoder=mini_sd.text_encoders[0],
        tokenizer=mini_sd.tokenizers[0],
        unet=mini_sd.unet,
        scheduler=DDIMScheduler.from_config(mini_sd.scheduler_config),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    noise = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        theirs = pipe(
            PROMPT,
            num_inference_steps=5,
            guidance_scale=4.0,
            latents=noise,
            height=64,
            width=64,
            output_type="latent",
        ).images
    torch.testing.assert_close(
        sample_latents(mini_sd, [PROMPT], [5], steps=5, guidance=4.0), theirs, rtol=1e-3, atol=1e-3
    )


def test_conditioning_rows(mini_sd):
    both = encode_prompts(mini_sd, ["a", "b"])
    assert len(both) == 2
    assert torch.equal(both[torch.tensor([1, 1])].tokens[0], both.tokens[1])
    assert torch.equal(Conditioning.cat([both[:1], both[1:]]).tokens, both.tokens)
    pooled = Conditioning(both.tokens, torch.zeros(2, 3), torch.zeros(2, 6))
    assert set(pooled[:1].unet_kwargs()["added_cond_kwargs"]) == {"text_embeds", "time_ids"}
    assert len(Conditioning.cat([pooled, pooled]).pooled) == 4
