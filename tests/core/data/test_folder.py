"""What is found in a folder, and that whatever is left out is named."""

import importlib.util
import json
import os

import pytest
from PIL import Image

from cntlora_core.data.folder import picture_files, readable
from cntlora_core.data.images import find_pictures
from cntlora_core.errors import ImageError


def save(path, size=(64, 64), color="red", mode="RGB"):
    path.parent.mkdir(exist_ok=True, parents=True)
    Image.new(mode, size, color).save(path)


def found(folder, **options):
    """Names and sentences."""
    said = []
    pictures = find_pictures(folder, said.append, **options)
    return pictures, [event.text for event in said]


@pytest.fixture(scope="module")
def odd(odd_folder):
    folder, gives = odd_folder
    return gives, *found(folder)


def test_the_folder_of_odd_pictures(odd):
    gives, pictures, texts = odd
    assert len(gives) > 50
    colours = {p.name: p.image.getpixel((20, 16)) for p in pictures}
    for name, expected in gives.items():
        if isinstance(expected, tuple):
            near = [abs(a - b) for a, b in zip(colours[name], expected, strict=True)]
            assert max(near) <= (1 if name.endswith("png") else 3), (name, colours[name])
        else:
            assert name not in colours
            assert sum(name in text for text in texts) == (expected is not None), name
            assert expected is None or any(expected in text for text in texts), name


def test_what_was_done_to_odd_pictures_is_said(odd):
    _, pictures, texts = odd
    for name, words in {
        "moves.gif": "the first of its 3 pictures",
        "moves.webp": "the first of its 3",
        "moves.png": "the first of its 3",
        "pages.tiff": "the first of its 3",
        "bad_profile.png": "its colour profile is left out",
        "other_profile.jpg": "its colour profile is left out",
    }.items():
        assert any(text.startswith(f"'{name}': {words}") for text in texts), name
    assert not any("phone" in text or "turned" in text for text in texts)
    assert next(p for p in pictures if p.name == "turned.jpg").image.size == (32, 40)
    for text in [*texts, *(p.name for p in pictures)]:
        json.dumps(text, ensure_ascii=False).encode()  # any file takes it
        assert text.isprintable()
    if importlib.util.find_spec("pillow_heif") is None:
        assert any("pip install pillow-heif" in text for text in texts)


def test_a_colour_profile_changes_what_a_cache_may_give(tmp_path, phone_profile, monkeypatch):
    """The same bytes read in another way are another picture."""
    Image.new("RGB", (20, 20), (230, 30, 30)).save(tmp_path / "a.png", icc_profile=phone_profile)
    (converted,) = find_pictures(tmp_path)
    monkeypatch.setattr("cntlora_core.data.decoding.SAME_COLOUR", 255)
    (plain,) = find_pictures(tmp_path)
    assert converted.digest != plain.digest


def test_heic_with_its_package(tmp_path):
    heif = pytest.importorskip("pillow_heif")
    heif.from_pillow(Image.new("RGB", (64, 48), (230, 30, 30))).save(tmp_path / "a.HEIC")
    (picture,), texts = found(tmp_path)
    assert picture.image.size == (64, 48)
    assert abs(picture.image.getpixel((30, 20))[0] - 230) < 4
    assert not [text for text in texts if "Skipped" in text]


def test_pictures_in_plain_subfolders_alone_are_read(tmp_path):
    save(tmp_path / "day one" / "a.png")
    save(tmp_path / "day two" / "b.png")
    pictures, texts = found(tmp_path)
    assert [p.name for p in pictures] == ["a.png", "b.png"]
    assert [text for text in texts if "subfolder" in text] == [
        "The pictures are those of the subfolder 'day one' (1).",
        "The pictures are those of the subfolder 'day two' (1).",
    ]


def test_a_plain_subfolder_beside_pictures_is_named(tmp_path):
    save(tmp_path / "a.png")
    save(tmp_path / "rejected" / "b.png")
    (tmp_path / "empty").mkdir()
    pictures, texts = found(tmp_path)
    assert [p.name for p in pictures] == ["a.png"]
    assert texts == [
        "Left out the folder 'rejected' with 1 picture: call it '1_rejected' to train on them too."
    ]


@pytest.mark.parametrize(
    ("name", "repeats", "says"),
    [
        ("3_cat", 3, None),
        ("100_cat", 100, None),
        ("0_cat", None, "says 0 times"),
        ("2023_summer", 1, "2023 times cannot be meant"),
        ("20231105_trip", 1, "cannot be meant"),
    ],
)
def test_repeats_that_cannot_be_meant_are_said(tmp_path, name, repeats, says):
    save(tmp_path / "a.png")
    save(tmp_path / name / "b.png", color="blue")
    pictures, texts = found(tmp_path)
    assert [p.repeats for p in pictures[1:]] == ([repeats] if repeats else [])
    assert [text for text in texts if "times" in text] == [t for t in texts if says and says in t]


@pytest.mark.parametrize(
    "name", ["cat-masklabel.png", "cat.mask.png", "masks/cat.png", "masks/cat.jpg", "MASK/Cat.PNG"]
)
def test_masks_are_found_and_are_no_pictures(tmp_path, name):
    save(tmp_path / "cat.png")
    save(tmp_path / name, color=0, mode="L")
    Image.new("L", (64, 64), 0).save(tmp_path / name)
    mask = Image.new("L", (64, 64), 0)
    mask.paste(255, (0, 0, 32, 64))
    mask.save(tmp_path / name)
    (picture,), texts = found(tmp_path)
    assert picture.mask.getpixel((10, 10)) > 250
    assert picture.mask.getpixel((50, 10)) < 5
    assert texts == []


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_a_mask_that_is_opaque_everywhere_is_read_by_its_brightness(tmp_path, mode):
    save(tmp_path / "cat.png")
    mask = Image.new("L", (64, 64), 0)
    mask.paste(255, (0, 0, 32, 64))
    mask.convert(mode).save(tmp_path / "cat-masklabel.png")
    (picture,), _ = found(tmp_path)
    assert picture.mask.getpixel((10, 10)) > 250
    assert picture.mask.getpixel((50, 10)) < 5


def test_a_folder_of_masks_elsewhere(tmp_path):
    save(tmp_path / "pictures" / "cat.png")
    save(tmp_path / "shapes" / "cat.webp", color="white")
    (picture,), _ = found(tmp_path / "pictures", masks=tmp_path / "shapes")
    assert picture.mask.getextrema() == (255, 255)
    with pytest.raises(ImageError, match="cannot be read"):
        found(tmp_path / "pictures", masks=tmp_path / "nowhere")


def test_masks_that_do_not_fit_are_said(tmp_path):
    save(tmp_path / "a.png")
    save(tmp_path / "a-masklabel.png", (32, 16), "white")
    save(tmp_path / "b.png", color="blue")
    save(tmp_path / "b-masklabel.png", color="black")
    save(tmp_path / "c.png", color="green")
    (tmp_path / "c-masklabel.png").write_bytes(b"damaged")
    save(tmp_path / "lonely-masklabel.png", color="white")
    pictures, texts = found(tmp_path)
    assert [p.mask and p.mask.size for p in pictures] == [(64, 64), None, None]
    assert "'a.png': its mask of 32x16 px is resized to 64x64." in texts
    assert "'b.png': its mask is black everywhere and is left out." in texts
    assert any(text.startswith("'c.png': its mask 'c-masklabel.png' is left out") for text in texts)


def test_what_nothing_reads_is_named_with_the_reason(tmp_path):
    save(tmp_path / "a.png")
    for name in ("a.txt", "a.caption", "a.png.txt", "b.txt", "metadata.jsonl", "a.psd"):
        (tmp_path / name).write_text("sks")
    for name in ("a-masklabel.png", "a.mask.png", "b.mask.png", "masks/a.png", "masks/z.png"):
        save(tmp_path / name, color="white")
    _, texts = found(tmp_path)
    here = f" of '{tmp_path.name}': "
    assert sorted(texts) == [
        f"Left out a.caption, a.png.txt{here}a second caption of one picture.",
        f"Left out a.mask.png{here}a second mask of one picture.",
        "Left out a.png of 'masks': a second mask of one picture.",
        f"Left out a.psd{here}no kind of picture or caption that is read.",
        f"Left out b.mask.png{here}a mask of no picture here.",
        f"Left out b.txt{here}no picture has that name.",
        f"Left out metadata.jsonl{here}every picture beside it has a caption file.",
        "Left out z.png of 'masks': a mask of no picture here.",
    ]


def test_a_folder_that_vanishes_in_the_middle_is_a_sentence(tmp_path):
    save(tmp_path / "cats" / "a.png")
    files = picture_files(tmp_path / "cats")
    (tmp_path / "cats" / "a.png").unlink()
    (tmp_path / "cats").rmdir()
    from cntlora_core.data.images import open_pictures

    with pytest.raises(ImageError, match="none of 1 could be used"):
        open_pictures(files)


def test_what_a_folder_of_other_things_holds_is_said(tmp_path):
    (tmp_path / "a.mp4").write_bytes(b"x")
    with pytest.raises(ImageError, match=r"found 0 of .*, only a\.mp4"):
        picture_files(tmp_path)


@pytest.mark.skipif(os.name == "nt", reason="every name there is valid text")
def test_names_that_are_no_text_become_text():
    assert readable(os.fsdecode(b"a\xff\n.png")) == "a\ufffd\ufffd.png"
    assert readable("a\ud83d.png") == "a\ufffd.png"
