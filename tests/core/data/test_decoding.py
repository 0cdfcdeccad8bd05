"""Pictures as telephones, messengers and strangers make them."""

import importlib.util
import struct
import subprocess

import numpy as np
import pytest
from PIL import Image, ImageOps

from cntlora_core.data.images import find_pictures


def found(folder):
    """Pictures and sentences."""
    said = []
    pictures = find_pictures(folder, said.append)
    return pictures, [event.text for event in said]


def with_exif(path, exif, **options):
    Image.new("RGB", (40, 32), (230, 30, 30)).save(path, exif=exif, **options)


def test_damaged_exif_costs_no_picture(tmp_path):
    """A mistyped tag beside the orientation, and no EXIF at all where it should be."""
    tags = ((0x112, 3, 1, 6), (0x100, 2, 4, 0x41414141))
    entries = b"".join(struct.pack("<HHII", *tag) for tag in tags)
    mistyped = b"Exif\0\0II*\0\x08\0\0\0" + struct.pack("<H", 2) + entries + b"\0" * 4
    with_exif(tmp_path / "a.jpg", mistyped)
    with_exif(tmp_path / "b.png", b"Exif\0\0garbage garbage")
    with_exif(tmp_path / "c.webp", b"Exif\0\0garbage garbage")
    pictures, texts = found(tmp_path)
    assert [p.size for p in pictures] == [(32, 40), (40, 32), (40, 32)]
    assert not [text for text in texts if "Skipped" in text]
    assert sum("its EXIF cannot be read" in text for text in texts) == 2


@pytest.mark.parametrize("turn", range(1, 9))
def test_every_orientation_is_as_pillow_shows_it(tmp_path, turn):
    noise = np.random.default_rng(0).integers(0, 255, (32, 40, 3), dtype=np.uint8)
    exif = Image.Exif()
    exif[0x0112] = turn
    Image.fromarray(noise).save(tmp_path / "a.png", exif=exif)
    (picture,), _ = found(tmp_path)
    with Image.open(tmp_path / "a.png") as opened:
        shown = ImageOps.exif_transpose(opened)
    assert picture.size == shown.size
    assert picture.image.tobytes() == shown.tobytes()


def test_no_program_is_started_for_a_strangers_picture(tmp_path, monkeypatch):
    """Pillow goes by the content, and hands PostScript to Ghostscript."""
    Image.new("RGB", (64, 64)).save(tmp_path / "cat.png", format="EPS")
    Image.new("RGB", (64, 64)).save(tmp_path / "good.png")
    started = []
    monkeypatch.setattr(subprocess, "Popen", lambda *args, **_: started.append(args))
    (picture,), texts = found(tmp_path)
    assert picture.name == "good.png"
    assert not started
    assert any("cat.png': it cannot be read (no picture" in text for text in texts)


@pytest.mark.parametrize("name", ["a.png", "a.jpg"])
def test_a_grey_profile_takes_no_colours(tmp_path, grey_profile, name):
    Image.new("RGB", (64, 64), (255, 40, 0)).save(tmp_path / name, icc_profile=grey_profile)
    (picture,), texts = found(tmp_path)
    assert picture.image.getpixel((9, 9))[0] > 250
    assert any("its colour profile is left out (it is for GRAY, not RGB)" in t for t in texts)


def test_the_content_says_whether_a_file_is_heic(tmp_path):
    """Telephones, messengers and people name files wrong."""
    Image.new("RGB", (64, 64), "red").save(tmp_path / "a.HEIC", format="JPEG")
    (tmp_path / "b.jpg").write_bytes(b"\0\0\0\x18ftypheic" + bytes(40))
    (picture,), texts = found(tmp_path)
    assert picture.name == "a.HEIC"
    if importlib.util.find_spec("pillow_heif") is None:
        assert any("b.jpg': HEIC needs the package pillow-heif" in text for text in texts)


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize(("size", "reads"), [((12000, 9000), True), ((16000, 12500), False)])
def test_a_telephones_largest_pictures(tmp_path, size, reads):
    Image.new("1", size, 1).save(tmp_path / "large.png")
    Image.new("RGB", (64, 64)).save(tmp_path / "small.png")
    pictures, texts = found(tmp_path)
    assert (pictures[0].name == "large.png") == reads
    assert reads or any("too large (at most 120 megapixels: save it smaller)" in t for t in texts)


def test_a_picture_that_shows_nothing_is_told(tmp_path):
    Image.new("RGBA", (64, 64), (230, 30, 30, 0)).save(tmp_path / "a.png")
    _, texts = found(tmp_path)
    assert any("'a.png': it is transparent everywhere" in text for text in texts)
