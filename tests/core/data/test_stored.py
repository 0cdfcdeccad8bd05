"""A folder that does not fit in memory is read again when it is used, to the same pictures."""

import itertools
import os

import pytest
import torch
from PIL import Image

from cntlora_core.config import DataConfig
from cntlora_core.data import stored
from cntlora_core.data.dataset import encode_subject
from cntlora_core.data.images import find_pictures
from cntlora_core.data.stored import StoredImage
from cntlora_core.errors import ImageError


@pytest.fixture
def folder(tmp_path):
    """Opaque, transparent, with a mask's file, with one of another size."""
    for n, name in enumerate("abcd"):
        mode, alpha = ("RGBA", (128,)) if name == "b" else ("RGB", ())
        Image.new(mode, (64, 64), (40 * n, 200 - 40 * n, 90, *alpha)).save(tmp_path / f"{name}.png")
    for name, size in (("c", 64), ("d", 32)):
        mask = Image.new("L", (size, size), 255)
        mask.paste(0, (0, 0, size // 2, size))
        mask.save(tmp_path / f"{name}-masklabel.png")
    return tmp_path


def held(pictures):
    return [[isinstance(x, StoredImage) for x in (p.held, p.held_mask)] for p in pictures]


def test_what_stays_on_disk_is_the_same(folder, mini_sd, monkeypatch):
    said = []
    whole = find_pictures(folder)
    monkeypatch.setattr(stored, "HELD_PIXELS", 64 * 64)
    pictures = find_pictures(folder, said.append)
    assert held(whole) == [[False, False]] * 4
    assert held(pictures) == [[False, False], [True, True], [True, True], [True, True]]
    for before, now in zip(whole, pictures, strict=True):
        assert (before.name, before.size, before.digest) == (now.name, now.size, now.digest)
        assert before.image.tobytes() == now.image.tobytes()
        assert (before.mask and before.mask.tobytes()) == (now.mask and now.mask.tobytes())
    assert len(said) == 1  # of the mask that is resized, once
    data = DataConfig(masked=True)
    first, second = (encode_subject(mini_sd, each, "a cat", data) for each in (whole, pictures))
    assert all(map(torch.equal, first.mean, second.mean))
    assert all(map(torch.equal, first.masks, second.masks))


@pytest.mark.parametrize("gone", [True, False])
def test_a_file_that_is_not_what_it_was_is_a_sentence(folder, monkeypatch, gone):
    monkeypatch.setattr(stored, "HELD_PIXELS", 0)
    picture = find_pictures(folder)[0]
    path = folder / "a.png"
    if gone:
        path.unlink()
    else:
        os.utime(path, ns=(1, 1))
    with pytest.raises(ImageError, match=r"^'a.png' can be used no more \(.*\)\. Leave the folder"):
        _ = picture.image


def test_one_thing_of_many_pictures_is_one_sentence(tmp_path):
    for n, ending in itertools.product(range(20), ("png", "gif")):
        path = tmp_path / f"{n:02}.{ending}"
        if ending == "png":
            path.write_bytes(b"no picture")
        else:
            frames = [Image.new("RGB", (32, 32), (n, k, 0)) for k in (0, 99)]
            frames[0].save(path, save_all=True, append_images=frames[1:])
    said = []
    assert len(find_pictures(tmp_path, said.append)) == 20
    texts = [event.text for event in said]
    assert texts == [
        "Skipped '00.png', '01.png', '02.png' and 17 more: it cannot be read (no picture, or of a "
        "kind that is not read).",
        "'00.gif', '01.gif', '02.gif' and 17 more: the first of its 2 pictures is used.",
    ]
