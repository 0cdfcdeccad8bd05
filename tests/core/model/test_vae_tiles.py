"""Pictures through the VAE, as many at once as the memory holds."""

import pytest
import torch

from cntlora_core import devices
from cntlora_core.devices import RESERVE, at_once
from cntlora_core.model import sampling
from cntlora_core.model.vae_tiles import DECODE_BYTES, TILE_PX, fitting

CPU = torch.device("cpu")


@pytest.fixture
def free(monkeypatch):
    """Sets how much memory is free beside the reserve."""
    return lambda n: monkeypatch.setattr(devices, "free_memory", lambda device: RESERVE + n)


def test_as_many_as_fit(free):
    assert at_once(CPU, 10, 4) == 4  # nobody says how much is free
    for room, fits in ((100, 4), (39, 3), (10, 1), (9, 0), (-5, 0)):
        free(room)
        assert at_once(CPU, 10, 4) == fits


def test_a_picture_that_does_not_fit_whole_goes_in_tiles(mini_sd, free):
    vae = mini_sd.pictures.vae
    before = vae.tile_latent_min_size
    free(8 * 8 * 10 - 1)
    with fitting(vae, 640, 4) as many:
        assert (many, vae.use_tiling) == (1, True)
        assert vae.tile_latent_min_size * mini_sd.vae_scale == vae.tile_sample_min_size == TILE_PX
    assert (vae.use_tiling, vae.tile_latent_min_size) == (False, before)
    free(3 * 8 * 8 * 10)
    with fitting(vae, 640, 4) as many:
        assert (many, vae.use_tiling) == (3, False)


def test_pictures_encoded_one_at_a_time_are_the_same(mini_sd, free):
    pixels = torch.randn(2, 3, 16, 16)
    with torch.no_grad(), mini_sd.pictures.working(CPU):
        together = mini_sd.pictures.encode(pixels)
        latents = torch.randn(2, 4, 4, 4)
        drawn = mini_sd.pictures.decode(latents)
        free(16 * 16 * DECODE_BYTES)
        torch.testing.assert_close(mini_sd.pictures.encode(pixels), together, rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(mini_sd.pictures.decode(latents), drawn, rtol=1e-3, atol=1e-4)


def test_samples_drawn_one_at_a_time_are_the_same(mini_sd, monkeypatch):
    told = []

    def draw():
        return sampling.sample_latents(
            mini_sd, ["a cat", "a dog"], [0, 1], steps=1, observer=told.append
        )

    together = draw()
    monkeypatch.setattr(sampling, "at_once", lambda device, each, most: 0)
    torch.testing.assert_close(draw(), together, rtol=1e-3, atol=1e-4)
    assert [(e.done, e.total) for e in told] == [(1, 1), (1, 2), (2, 2)]
