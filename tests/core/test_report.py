import pytest
from PIL import Image, ImageChops

from cntlora_core.report import loss_chart, rank_map, sample_sheet


def dark(image):
    """Number of pixels that are not paper."""
    return sum(image.convert("L").histogram()[:200])


@pytest.mark.parametrize(
    "curves",
    [
        {"a": [(0, 1.0), (10, 0.5)], "b": [(0, 1.0), (10, 0.7)]},
        {"constant": [(0, 1.0), (10, 1.0)]},
        {"one": [(0, 0.3)]},
        {"nan": [(0, float("nan")), (5, 0.2), (6, float("inf"))]},
        {"empty": []},
        {},
    ],
)
def test_any_curve_can_be_drawn(curves):
    image = loss_chart(curves, title="Loss", base=1.1)
    assert image.size == (960, 560)
    assert dark(image) > 300


def test_charts_differ_with_their_data_and_repeat():
    first = loss_chart({"a": [(0, 1.0), (10, 0.5)]}, title="Loss")
    assert first.tobytes() == loss_chart({"a": [(0, 1.0), (10, 0.5)]}, title="Loss").tobytes()
    second = loss_chart({"a": [(0, 1.0), (10, 0.8), (20, 0.5)]}, title="Loss")
    assert ImageChops.difference(first, second).getbbox() is not None


def name(side, layer, block, attention, kind):
    return f"{side}.attentions.{layer}.transformer_blocks.{block}.{attention}.{kind}"


@pytest.mark.parametrize("blocks", [1, 10])
def test_rank_maps_of_small_and_large_models(blocks):
    names = [
        name(side, layer, block, attention, kind)
        for side in ("down_blocks.1", "mid_block", "up_blocks.0")
        for layer in range(3)
        for block in range(blocks)
        for attention in ("attn1", "attn2")
        for kind in ("to_q", "to_k", "to_v", "to_out.0")
    ]
    energy = {n: float(i) for i, n in enumerate(names)}
    image = rank_map({n: i % 32 for i, n in enumerate(names)}, energy, title="Ranks", params=12345)
    assert image.height < 2200
    assert dark(image) > 1000
    plain = rank_map(dict.fromkeys(names, 4), {}, title="Ranks")
    assert plain.size == image.size
    assert ImageChops.difference(plain, image).getbbox() is not None


def test_names_of_other_models_are_listed():
    assert dark(rank_map({"some.layer": 3}, {"some.layer": 1.0}, title="Ranks")) > 100
    assert rank_map({}, {}, title="Nothing").width > 100


def test_sample_sheets_hold_every_picture():
    red, blue = Image.new("RGB", (64, 64), "red"), Image.new("RGB", (300, 150), "blue")
    sheet = sample_sheet([("base", [red, blue]), ("trained", [blue])], subject=[red], title="t" * 400)
    colours = {c for _, c in sheet.getcolors(1 << 24)}
    assert {(255, 0, 0), (0, 0, 255)} <= colours
    assert sheet.height > sample_sheet([("base", [red])], title="x").height
