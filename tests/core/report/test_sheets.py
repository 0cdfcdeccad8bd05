import numpy as np
import pytest
from PIL import Image

from cntlora_core.errors import SettingError
from cntlora_core.report.charts import contact_sheet, sample_sheet


def dark(image):
    """Number of pixels that are not paper."""
    return sum(image.convert("L").histogram()[:200])


def count(image, colour):
    return int((np.asarray(image) == colour).all(axis=-1).sum())


def margins_are_clean(image, px=5):
    frame = np.array(image)
    frame[px:-px, px:-px] = 255
    return bool((frame == 255).all())


RED, BLUE = Image.new("RGB", (64, 64), "red"), Image.new("RGB", (300, 150), "blue")


def test_sample_sheets_hold_every_picture_at_its_place():
    sheet = sample_sheet(
        [("base", [RED, BLUE]), ("trained", [BLUE])], subject=[RED], title="t" * 400
    )
    assert count(sheet, (255, 0, 0)) == 2 * 128 * 128
    assert count(sheet, (0, 0, 255)) == 2 * 128 * 64
    assert sheet.getpixel((24, 86)) == (255, 0, 0)  # the subject comes first
    assert margins_are_clean(sheet)
    assert sheet.height > sample_sheet([("base", [RED])], title="x").height


def test_many_pictures_go_on_the_next_line():
    sheet = sample_sheet([("base", [RED] * 20), ("none", [])], title="x", cell=64)
    assert count(sheet, (255, 0, 0)) == 20 * 64 * 64
    assert sheet.width < 10 * 80


def test_small_pictures_are_enlarged_smoothly():
    halves = Image.new("RGB", (2, 2), "white")
    halves.paste("black", (0, 0, 1, 2))
    middle = sample_sheet([("", [halves])], title="").crop((24, 150, 152, 151))
    assert len(middle.getcolors()) > 20


def test_transparent_parts_are_white():
    for mode in ("RGBA", "LA"):
        sheet = sample_sheet([("", [Image.new(mode, (64, 64))])], title="")
        assert sheet.getpixel((88, 150)) == (255, 255, 255)


@pytest.mark.parametrize("mode", ["1", "L", "P", "CMYK", "RGBA", "I", "F"])
def test_pictures_of_every_mode(mode):
    picture = Image.new("L", (5, 3)).convert(mode)
    assert sample_sheet([("", [picture])], title="").getpixel((88, 150)) == (0, 0, 0)


def test_contact_sheets_name_each_picture():
    sheet = contact_sheet(
        [RED] * 7, [f"a_very_long_file_name_of_a_picture_{i}.png" for i in range(7)], columns=3
    )
    assert count(sheet, (255, 0, 0)) == 7 * 128 * 128
    assert sheet.width == 2 * 24 + 3 * 128 + 2 * 12
    assert margins_are_clean(sheet)
    unnamed = contact_sheet([RED] * 7, [""] * 7, columns=3)
    assert unnamed.size == sheet.size
    assert dark(sheet) > dark(unnamed) + 7 * 100
    assert contact_sheet([RED], ["a"], columns=5).width < 200
    assert contact_sheet([RED] * 7, [""] * 7).size == unnamed.size  # three rows of three


def test_contact_sheets_of_thousands_stay_one_page():
    asked = []
    images = (asked.append(n) or RED for n in range(3000))
    sheet = contact_sheet(images, [str(n) for n in range(3000)])
    assert len(asked) == 96
    assert count(sheet, (255, 0, 0)) == 96 * 128 * 128
    assert sheet.height == 2 * 24 + 10 * 156 + 24
    assert margins_are_clean(sheet)


@pytest.mark.parametrize("image", [sample_sheet([], title=""), contact_sheet([], [])])
def test_sheets_without_pictures_say_so(image):
    assert dark(image) > 100
    assert margins_are_clean(image)


def test_sheets_leave_their_pictures_alone():
    picture = Image.new("RGBA", (10, 10), (1, 2, 3, 4))
    before = picture.tobytes()
    contact_sheet([picture], ["a"])
    assert (picture.mode, picture.tobytes()) == ("RGBA", before)


def test_sheets_refuse_what_cannot_be_drawn():
    for images in ([RED], [RED] * 3):
        with pytest.raises(SettingError, match="There are 2 labels: give one per picture"):
            contact_sheet(images, ["a", "b"])
    with pytest.raises(SettingError, match="columns is 0"):
        contact_sheet([RED], ["a"], columns=0)
    for cell in (0, 5000):
        with pytest.raises(SettingError, match=f"cell is {cell}"):
            sample_sheet([], title="", cell=cell)
