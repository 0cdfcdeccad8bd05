"""Pictures and prompts through the model as the memory holds them: the same, whichever way."""

import contextlib

import pytest
import torch
from pretended_device import pretended

from cntlora_core import devices
from cntlora_core.data.dataset import encode_subject
from cntlora_core.data.images import find_pictures
from cntlora_core.errors import OutOfMemory
from cntlora_core.events import Progress
from cntlora_core.model import vae_tiles
from cntlora_core.model.diffusers_folder import weights_files
from cntlora_core.model.loader import MINI_SD_FOLDER, load_checkpoint
from cntlora_core.model.sampling import sample_latents
from cntlora_core.model.tensor_file import TensorFiles
from cntlora_core.model.vae_tiles import Way, in_tiles, ways

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    monkeypatch.setattr(vae_tiles, "TILES_PX", (32, 16))


@pytest.fixture
def free(monkeypatch):
    """Sets how much memory is free, bytes."""
    return lambda n: monkeypatch.setattr(devices, "free_memory", lambda device: n)


@pytest.fixture
def limited(monkeypatch):
    """Memory runs out in `module` for more than `most` numbers of the first input."""

    def limit(module, name, most):
        whole, tried = getattr(module, name), []

        def run(first, *args, **kwargs):
            tried.append(tuple(first.shape))
            if first.numel() > most:
                raise torch.OutOfMemoryError
            return whole(first, *args, **kwargs)

        monkeypatch.setitem(vars(module), name, run)
        return tried

    return limit


def test_the_ways_of_pictures():
    """From all at once to the smallest tiles; tiles as large as the picture are none."""
    assert ways(3, 64, 32, 2) == {
        Way(3): 3 * 64 * 32 * 2,
        Way(1): 64 * 32 * 2,
        Way(1, 32): 32 * 32 * 2,
        Way(1, 16): 16 * 16 * 2,
    }
    assert list(ways(1, 32, 32, 2)) == [Way(1), Way(1, 16)]


def test_the_vae_is_as_it_was_after_tiles(mini_sd):
    vae = mini_sd.pictures.vae
    before = vae.use_tiling, vae.tile_latent_min_size, vae.tile_sample_min_size
    with in_tiles(vae, 16):
        assert vae.use_tiling
        assert vae.tile_latent_min_size * mini_sd.vae_scale == vae.tile_sample_min_size == 16
    assert (vae.use_tiling, vae.tile_latent_min_size, vae.tile_sample_min_size) == before
    with pytest.raises(KeyError), in_tiles(vae, 16):
        raise KeyError
    assert (vae.use_tiling, vae.tile_latent_min_size, vae.tile_sample_min_size) == before


@pytest.mark.parametrize("decode", [False, True], ids=["encoding", "decoding"])
def test_pictures_are_the_same_however_many_go_at_once(mini_sd, limited, decode):
    pictures, scale = mini_sd.pictures, mini_sd.vae_scale
    given = torch.randn(4, 4, 16 // scale, 16 // scale) if decode else torch.randn(4, 3, 16, 16)
    run = pictures.decode if decode else lambda x: torch.stack(pictures.encode(x))
    with torch.no_grad(), pictures.working(CPU):
        together = run(given)
        tried = limited(pictures.vae, "decode" if decode else "encode", given[0].numel())
        torch.testing.assert_close(run(given), together, rtol=1e-3, atol=1e-4)
    assert [shape[0] for shape in tried] == [4, 2, 1, 1, 1, 1]


@pytest.mark.parametrize("decode", [False, True], ids=["encoding", "decoding"])
def test_one_picture_that_fails_whole_goes_in_ever_smaller_tiles(mini_sd, limited, decode):
    pictures, vae = mini_sd.pictures, mini_sd.pictures.vae
    side = 48 // mini_sd.vae_scale if decode else 48
    given = torch.randn(1, 4 if decode else 3, side, side)
    run = pictures.decode if decode else lambda x: torch.stack(pictures.encode(x))
    with torch.no_grad(), pictures.working(CPU):
        with in_tiles(vae, 16):
            expected = run(given)
        part = vae.decoder if decode else vae.encoder
        tried = limited(part, "forward", given.numel() // 9)
        assert torch.equal(run(given), expected)
        refused = [shape[-1] for shape in tried if shape[-1] > side // 3]
        assert refused == [side, side * 2 // 3]
        limited(part, "forward", 0)
        with pytest.raises(OutOfMemory, match=r"cpu did not suffice\. Next to try: close other"):
            working_with(pictures, run, given)
    assert not vae.use_tiling


def working_with(pictures, run, given):
    """As whoever uses the VAE does."""
    with pictures.working(CPU):
        return run(given)


def test_what_does_not_fit_by_its_size_is_not_tried(mini_sd, limited, free):
    """A driver that swaps to the host's memory does not fail: it crawls."""
    pictures = mini_sd.pictures
    with torch.no_grad(), pictures.working(CPU):
        tried = limited(pictures.vae.encoder, "forward", 10**9)
        free(devices.RESERVE + devices.taken(16 * 16 * vae_tiles.ENCODE_BYTES) + 1)
        pictures.encode(torch.zeros(2, 3, 16, 16))
        pictures.encode(torch.zeros(1, 3, 24, 24))
    assert {shape[0] for shape in tried} == {1}
    assert {shape[-1] for shape in tried[2:]} <= {16, 12}


def test_samples_are_the_same_however_many_are_drawn_at_once(mini_sd, limited):
    told, prompts, seeds = [], ["a cat", "a dog", "a cow"], [0, 1, 2]

    def draw():
        return sample_latents(mini_sd, prompts, seeds, steps=1, observer=told.append)

    together = draw()
    tried = limited(mini_sd.unet, "forward", 2 * together[0].numel())  # with guidance
    torch.testing.assert_close(draw(), together, rtol=1e-3, atol=1e-4)
    assert [shape[0] for shape in tried] == [6, 2, 2, 2]
    assert [(e.done, e.total) for e in told] == [(1, 1), (1, 3), (2, 3), (3, 3)]
    limited(mini_sd.unet, "forward", 0)
    with pytest.raises(OutOfMemory, match="a lower resolution"):
        draw()


def test_words_that_do_not_fit_are_read_on_the_host(mini_sd, free):
    (expected,) = mini_sd.prompts.encode(["a cat"], CPU)
    encoder, seen = mini_sd.prompts.encoders[0], []
    handle = encoder.register_forward_pre_hook(
        lambda module, _: seen.append(next(module.parameters()).device.type)
    )
    with contextlib.ExitStack() as stack:
        stack.callback(handle.remove)
        stack.enter_context(pretended("cuda"))
        for n in (10**9, 0):
            free(n)
            ((tokens, _),) = mini_sd.prompts.encode(["a cat"], torch.device("cuda"))
            assert tokens.device.type == "cuda"
            torch.testing.assert_close(tokens.cpu(), expected[0])
    assert seen == ["cuda", "cpu"]


@pytest.mark.parametrize(("memory", "meanwhile"), [(10**12, "cuda"), (0, "cpu")])
def test_the_unet_makes_room_while_pictures_are_encoded(free, memory, meanwhile):
    where = []
    with pretended("cuda"):
        model = load_checkpoint("mini-sd", device="cuda")

        def unet():
            return next(model.unet.parameters()).device.type

        def observer(event):
            if isinstance(event, Progress):
                where.append(unet())

        free(memory)
        (picture, *_) = find_pictures(MINI_SD_FOLDER / "heldout")
        encode_subject(model, [picture], "a cat", observer=observer)
        assert unet() == "cuda"
        with model.at_work():
            pass
        with model.encoding(1):
            assert unet() == "cpu"
        assert unet() == "cpu", "it was not there"
    assert set(where) == {meanwhile}


def test_a_lent_unet_makes_room_by_giving_its_weights_back(free):
    free(0)
    with pretended("cuda"):
        model = load_checkpoint("mini-sd", device="cuda")
        model.lender = lambda: TensorFiles(weights_files(MINI_SD_FOLDER / "model" / "unet"))
        weight = model.unet.conv_in.weight.cpu()
        with model.at_work():
            with model.encoding(1):
                assert model.unet.conv_in.weight.device.type != "cuda"
            assert model.unet.conv_in.weight.device.type == "cuda"
            assert torch.equal(model.unet.conv_in.weight.cpu(), weight)
