import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from cntlora_core.config import DataConfig
from cntlora_core.data.buckets import crops_of
from cntlora_core.data.checks import check_pictures
from cntlora_core.data.dataset import encode_subject
from cntlora_core.data.images import Picture, find_pictures
from cntlora_core.errors import ImageError, SettingError
from cntlora_core.events import Notice


def save(path, size=(64, 48), color="red", mode="RGB", **options):
    Image.new(mode, size, color).save(path, **options)


def test_pictures_come_by_name_and_others_are_left_alone(tmp_path):
    for name in ("b.png", "a.JPG", "c.webp", "d.jpeg"):
        save(tmp_path / name)
    (tmp_path / "notes.txt").write_text("x")
    assert [p.name for p in find_pictures(tmp_path)] == ["a.JPG", "b.png", "c.webp", "d.jpeg"]


def test_unusable_pictures_are_named_and_skipped(tmp_path):
    save(tmp_path / "good.png")
    save(tmp_path / "dot.png", (1, 1))
    save(tmp_path / "line.png", (20000, 2))
    (tmp_path / "empty.png").write_bytes(b"")
    (tmp_path / "text.jpg").write_text("not a picture")
    whole = tmp_path / "cut.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (80, 80, 3), dtype=np.uint8)).save(
        whole
    )
    whole.write_bytes(whole.read_bytes()[:4000])
    said = []
    assert [p.name for p in find_pictures(tmp_path, said.append)] == ["good.png"]
    texts = {e.text for e in said if isinstance(e, Notice)}
    assert len(texts) == 5
    for name in ("dot.png': 1x1", "line.png': 20000x2", "empty.png", "text.jpg", "cut.png"):
        assert any(name in text for text in texts), name


def test_a_picture_of_400_megapixels_is_not_unpacked(tmp_path):
    Image.MAX_IMAGE_PIXELS, limit = None, Image.MAX_IMAGE_PIXELS
    try:
        save(tmp_path / "bomb.png", (20000, 20000), 0, "1")
    finally:
        Image.MAX_IMAGE_PIXELS = limit
    said = []
    with pytest.raises(ImageError, match="none of 1 could be used"):
        find_pictures(tmp_path, said.append)
    assert "bomb.png" in said[0].text


def test_missing_and_empty_folders(tmp_path):
    with pytest.raises(ImageError, match=r"found 0 of \.png \.jpg .*\.gif\."):
        find_pictures(tmp_path)
    with pytest.raises(ImageError, match="does not exist"):
        find_pictures(tmp_path / "nowhere")


@settings(deadline=None, max_examples=40)
@given(st.binary(max_size=300))
def test_no_bytes_crash_the_reader(tmp_path_factory, content):
    folder = tmp_path_factory.mktemp("fuzz")
    (folder / "x.png").write_bytes(content)
    with pytest.raises(ImageError):
        find_pictures(folder)


def test_transparent_is_white_and_exif_is_obeyed(tmp_path):
    save(tmp_path / "a.png", (20, 20), (255, 0, 0, 0), "RGBA")
    image = Image.new("RGB", (40, 20), "blue")
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by a quarter
    image.save(tmp_path / "b.jpg", exif=exif)
    clear, turned = find_pictures(tmp_path)
    assert clear.image.getpixel((5, 5)) == (255, 255, 255)
    assert turned.image.size == (20, 40)


def test_the_crop_is_centred(tmp_path):
    image = Image.new("RGB", (300, 100), "red")
    image.paste("blue", (100, 0, 200, 100))
    (view,) = crops_of(
        Picture("a", image, "x"), 64, 16, DataConfig(buckets=False), torch.Generator()
    )
    square = view.image()
    assert square.size == (64, 64)
    assert np.asarray(square)[:, 4:-4].reshape(-1, 3).max(0).tolist() == [0, 0, 255]


def test_latents_and_conditioning(mini_sd, subject):
    assert torch.stack(subject.mean).shape == (6, 4, 16, 16)
    assert (torch.stack(subject.std) > 0).all()
    assert subject.conditioning.tokens.shape == (6, 32, 128)
    assert (
        0.5 < float(torch.stack(subject.mean).std()) < 2
    )  # the VAE's scaling factor was not forgotten
    draws = subject.sample_latents(torch.tensor([0, 0]), torch.Generator().manual_seed(0))
    assert not torch.equal(draws[0], draws[1])


def test_resolutions_the_model_cannot_take(mini_sd, tmp_path):
    save(tmp_path / "a.png")
    pictures = find_pictures(tmp_path)
    for size in (50, 8, 8192):
        with pytest.raises(SettingError, match=r"multiples of 16|between 16 and 4096"):
            encode_subject(mini_sd, pictures, "x", DataConfig(resolution=size))
    said = []
    big = DataConfig(resolution=96, upscale=True)
    assert encode_subject(mini_sd, pictures, "x", big, observer=said.append).mean[0].shape == (
        4,
        20,
        28,
    )
    assert any("enlarged" in getattr(e, "text", "") for e in said)
    assert encode_subject(mini_sd, pictures, "x", DataConfig(resolution=96)).mean[0].shape == (
        4,
        12,
        16,
    )


def shape(name, white):
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8))
    mask = Image.new("L", (64, 64), 0)
    mask.paste(255, (0, 0, white, 64))
    return Picture(name, image, name, held_mask=mask)


def test_views_of_which_the_mask_shows_nothing_are_left_out_and_named(mini_sd):
    said, data = [], DataConfig(masked=True)
    pictures = [shape("a.png", 32), shape("b.png", 0), shape("c.png", 64)]
    encoded = encode_subject(mini_sd, pictures, "a cat", data, observer=said.append)
    assert encoded.names == ("a.png", "c.png")
    assert len(encoded.conditioning) == len(encoded.captions) == 2
    texts = [e.text for e in said if isinstance(e, Notice)]
    assert "1 view is left out, of which the mask shows nothing: b.png." in texts
    with pytest.raises(ImageError, match="The masks show nothing of any picture"):
        encode_subject(mini_sd, pictures[1:2], "a cat", data)
    weighed = DataConfig(masked=True, unmasked_weight=0.1)
    assert len(encode_subject(mini_sd, pictures, "a cat", weighed)) == 3


def test_what_has_no_mask_among_those_that_have_is_named(tmp_path):
    plain = Picture("d.png", shape("d.png", 64).image, "d")
    findings = check_pictures([shape("a.png", 32), plain, shape("c.png", 64)], 64, masked=True)
    assert "1 picture has no mask, and all of it is learnt: d.png." in findings
    findings = check_pictures([plain] * 3, 64, masked=True)
    assert "No picture has a mask: all of each is learnt." in findings
    assert not any("mask" in text for text in check_pictures([plain] * 3, 64, masked=False))
