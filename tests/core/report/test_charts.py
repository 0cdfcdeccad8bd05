import math
from itertools import pairwise, product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import ImageChops

from cntlora_core.errors import SettingError
from cntlora_core.report.canvas import (
    LINES,
    Canvas,
    log_ticks,
    number_labels,
    plain,
    shade,
    text_colour,
    ticks,
)
from cntlora_core.report.charts import loss_chart, rank_map
from cntlora_core.report.rank_map import _rows

NAN, INF = float("nan"), float("inf")
KINDS = [
    f"{attention}.{kind}"
    for attention in ("attn1", "attn2")
    for kind in ("to_q", "to_k", "to_v", "to_out.0")
]
MINI = [
    ("down_blocks.1", 1, 1),
    ("down_blocks.2", 1, 1),
    ("up_blocks.0", 2, 1),
    ("up_blocks.1", 2, 1),
]
SD15 = [(f"down_blocks.{i}", 2, 1) for i in range(3)] + [
    (f"up_blocks.{i}", 3, 1) for i in (1, 2, 3)
]
SDXL = [
    ("down_blocks.1", 2, 2),
    ("down_blocks.2", 2, 10),
    ("up_blocks.0", 3, 10),
    ("up_blocks.1", 3, 2),
]


def names(blocks, middle):
    """As diffusers lists them: the middle last."""
    layout = [*blocks, ("mid_block", 1, middle)]
    return [
        f"{block}.attentions.{a}.transformer_blocks.{t}.{kind}"
        for block, attentions, depth in layout
        for a, t, kind in product(range(attentions), range(depth), KINDS)
    ]


def dark(image, box=None):
    """Number of pixels that are not paper."""
    return sum(image.crop(box).convert("L").histogram()[:200])


def count(image, colour):
    return int((np.asarray(image) == colour).all(axis=-1).sum())


def rgb(colour):
    return tuple(int(colour[i : i + 2], 16) for i in (1, 3, 5))


def margins_are_clean(image, px=5):
    frame = np.array(image)
    frame[px:-px, px:-px] = 255
    return bool((frame == 255).all())


@pytest.fixture
def written(monkeypatch):
    """The lines of text that are drawn."""
    texts = []
    text = Canvas.text

    def record(page, x, y, string, *args, **kwargs):
        texts.append(string)
        return text(page, x, y, string, *args, **kwargs)

    monkeypatch.setattr(Canvas, "text", record)
    return texts


# Losses


@pytest.mark.parametrize(
    "curves",
    [
        {"a": [(0, 1.0), (10, 0.5)], "b": [(0, 1.0), (10, 0.7)]},
        {"constant": [(0, 1.0), (10, 1.0)]},
        {"zero": [(0, 0.0), (10, 0.0)]},
        {"one": [(0, 0.3)]},
        {"nan": [(0, NAN), (5, 0.2), (6, INF)]},
        {"vanishing": [(0, 5e-324), (10, 1.0)]},
        {"diverging": [(s, 0.1 * 3.0**s) for s in range(40)]},
        {f"a long name of a curve, number {i}": [(0, 1.0), (9000, i / 20)] for i in range(20)},
        {"x" * 400: [(s, 1 / (s + 1)) for s in range(3000)]},
        {"empty": []},
        {},
    ],
)
@pytest.mark.parametrize("size", [(960, 560), (320, 240)])
def test_any_curve_can_be_drawn_and_nothing_is_cut_off(curves, size):
    image = loss_chart(
        curves, title="A title that is far too long for any chart " * 5, base=1.1, size=size
    )
    assert image.size == size
    assert image.mode == "RGB"
    assert dark(image) > 300
    assert margins_are_clean(image)


def test_every_curve_has_its_colour_in_legend_and_field():
    curves = {str(i): [(0, 1.0), (10, 0.5 + i / 20)] for i in range(len(LINES))}
    image = loss_chart(curves, title="Loss")
    for part in ((0, 0, 960, 140), (0, 140, 960, 560)):
        assert all(count(image.crop(part), rgb(colour)) > 20 for colour in LINES)


def test_the_best_point_wears_a_ring():
    """All losses are equal, so the first is the best: it stands out above the last by the ring."""
    image = np.asarray(loss_chart({"a": [(0, 1.0), (50, 1.0), (100, 1.0)]}, title=""))[120:480]
    rows = (image == rgb(LINES[0])).all(axis=-1)
    heights = rows.any(axis=0) * (rows.shape[0] - rows[::-1].argmax(axis=0) - rows.argmax(axis=0))
    assert 14 <= heights[:200].max() <= 18
    assert 6 <= heights[200:].max() <= 9


def test_the_best_point_is_the_lowest():
    image = loss_chart({"a": [(0, 1.0), (50, 0.9), (100, 0.5)]}, title="")
    assert dark(image, (915, 460, 936, 476)) > dark(image, (60, 120, 81, 150))


def test_charts_say_what_they_show(written):
    loss_chart({"target": [(0, 1.0), (50, 0.12345), (100, NAN)]}, title="Loss", base=1.1)
    expected = {
        "Loss",
        "target",
        "best 0.1235 at step 50",
        "base model",
        "1.1",
        "1 loss left out: not finite",
    }
    assert expected | {"training steps", "held-out loss (mean squared error)"} <= set(written)
    written.clear()
    loss_chart({}, title="Loss")
    assert written == ["Loss", "No losses were recorded."]


def test_markers_of_long_curves_stay_apart():
    """Every fourth pixel has a point: were each marked, the band would be as thick as a marker
    everywhere."""
    image = np.asarray(loss_chart({"a": [(s, 1.0) for s in range(225)]}, title=""))[
        120:480, 150:850
    ]
    thickness = (image == rgb(LINES[0])).all(axis=-1).sum(axis=0)
    assert 5 < thickness.max() < 9
    assert thickness.min() <= 2


def test_the_base_model_is_a_dashed_line():
    curve = {"a": [(0, 1.0), (10, 0.5)]}
    without, dashed = (loss_chart(curve, title="", base=base) for base in (NAN, 1.0))
    assert without.tobytes() == loss_chart(curve, title="").tobytes()
    row = max(range(130, 480), key=lambda y: dark(dashed, (200, y, 960, y + 1)))
    pixels = [dashed.getpixel((x, row))[0] < 200 for x in range(300, 900)]
    assert 30 < sum(a != b for a, b in pairwise(pixels)) < 130


def test_losses_that_are_not_finite_are_counted_below():
    some, none = [(0, 1.0), (5, NAN), (10, 0.5)], [(0, 1.0), (10, 0.5)]
    assert dark(loss_chart({"a": some}, title=""), (0, 525, 300, 560)) > 50
    assert dark(loss_chart({"a": none}, title=""), (0, 525, 300, 560)) == 0


def test_charts_differ_with_their_data_and_repeat():
    first = loss_chart({"a": [(0, 1.0), (10, 0.5)]}, title="Loss")
    assert first.tobytes() == loss_chart({"a": [(10, 0.5), (0, 1.0)]}, title="Loss").tobytes()
    second = loss_chart({"a": [(0, 1.0), (10, 0.8), (20, 0.5)]}, title="Loss")
    assert ImageChops.difference(first, second).getbbox() is not None


def test_a_chart_too_small_to_read_is_refused():
    with pytest.raises(SettingError, match="100 x 560"):
        loss_chart({}, title="Loss", size=(100, 560))


# Ticks, colours, text


@given(st.floats(-1e6, 1e6), st.floats(1e-3, 1e6), st.integers(2, 12))
def test_ticks_are_few_round_and_inside(low, spread, number):
    high = low + spread
    found = ticks(low, high, number)
    assert len(found) <= number + 1
    slack = 1e-6 * spread + 4 * math.ulp(abs(low) + spread)
    assert all(low - slack <= t <= high + slack for t in found)
    assert len(set(number_labels(found))) == len(found)


def test_ticks_of_steps_are_whole():
    assert ticks(0, 1, 10, smallest=1) == [0, 1]
    assert number_labels(ticks(0, 100, 5)) == ["0", "20", "40", "60", "80", "100"]
    assert number_labels([0, 1e9, 2e9]) == ["0", "1e+09", "2e+09"]
    assert number_labels(ticks(0.072, 0.105)) == ["0.08", "0.09", "0.10"]
    assert ticks(3, 3) == [3]


def test_logarithmic_ticks():
    assert number_labels(log_ticks(0.09, 4.0)) == ["0.1", "0.2", "0.5", "1", "2"]
    assert number_labels(log_ticks(0.01, 1e4)) == ["0.01", "0.1", "1", "10", "100", "1000", "10000"]
    assert len(log_ticks(1e-30, 1e30)) <= 8
    assert log_ticks(2.1, 4.9) == [2.1, 4.9]


def luminance(colour):
    linear = [
        c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4
        for c in (v / 255 for v in colour)
    ]
    return sum(w * c for w, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def test_numbers_can_be_read_on_every_shade_and_shades_darken_evenly():
    shades = [shade(i / 100) for i in range(101)]
    for background in shades:
        pair = sorted((luminance(background), 0.0 if text_colour(background) == "#000000" else 1.0))
        assert (pair[1] + 0.05) / (pair[0] + 0.05) >= 4.5
    lightness = [116 * luminance(s) ** (1 / 3) - 16 for s in shades]
    falls = [a - b for a, b in pairwise(lightness)]
    assert min(falls) > 0.3
    assert max(falls) < 1.6
    assert shade(-3) == shade(0)
    assert shade(7) == shade(1)


def test_text_is_one_line_of_letters_the_font_has():
    assert plain("Größe\n é \u2013 “中”") == "Grosse e - ???"
    page = Canvas(200, 40)
    assert page.shorten("short", 100) == "short"
    long = "holiday_in_the_mountains_0042.png"
    assert page.shorten(long, 100).startswith("holiday")
    assert page.shorten(long, 100).endswith("…")
    assert page.shorten(long, 100, middle=True).endswith(".png")
    assert page.measure(page.shorten(long, 100, middle=True)) <= 100
    assert page.shorten(long, 0) == "…"


# Ranks


@pytest.mark.parametrize(
    ("blocks", "middle", "number"), [(MINI, 1, 56), (SD15, 1, 128), (SDXL, 10, 560)]
)
def test_rank_maps_of_every_family(blocks, middle, number):
    projections = names(blocks, middle)
    assert len(projections) == number
    energy = {n: 1.0 + i for i, n in enumerate(projections)}
    image = rank_map(
        {n: i % 128 + 1 for i, n in enumerate(projections)}, energy, title="Ranks", params=12345
    )
    assert image.height < 1100
    assert image.width < 1500
    assert margins_are_clean(image)
    assert count(image, shade(1.0)) > 50
    plain_map = rank_map(dict.fromkeys(projections, 4), {}, title="Ranks")
    assert plain_map.size == image.size
    assert (
        count(plain_map, (236, 236, 236)) > number * 300
    )  # a grey cell each: no energy was measured


def test_rank_maps_say_what_they_show(written):
    rank_map({n: i % 3 + 1 for i, n in enumerate(names(MINI, 1))}, {}, title="Ranks", params=44704)
    header = (
        "56 projections · total rank 111 (1 to 3) · 44,704 parameters · 179 "
        "kB in fp32, 89 kB in fp16"
    )
    assert {
        "Ranks",
        header,
        "self-attention",
        "cross-attention",
        "down 1.0",
        "mid",
        "up 1.1",
    } <= set(written)
    assert [written.count(rank) for rank in "123"] == [19, 19, 18]


def test_rows_follow_the_signal_and_numbers_are_not_sorted_as_text():
    rows, others = _rows(["some.layer", *reversed(names([*SDXL, ("down_blocks.10", 1, 11)], 10))])
    assert others == ["some.layer"]
    first = [next(iter(cells.values())).split("_")[0] for cells in rows.values()]
    assert first == ["down"] * (24 + 11) + ["mid"] * 10 + ["up"] * 36
    assert [r[3] for r in rows if r[:3] == (0, 10, 0)] == list(range(11))
    assert len(rows) == 70 + 11
    assert all(len(cells) == 8 for cells in rows.values())


def test_the_largest_energy_is_darkest_and_zero_is_palest():
    a, b, c = names(MINI, 1)[:3]
    ranks = dict.fromkeys((a, b, c), 4)
    cell = 1000
    linear = rank_map(ranks, {a: 1.0, b: 2.0, c: 0.0}, title="")
    assert all(count(linear, shade(level)) > cell for level in (0.0, 0.5, 1.0))
    decades = rank_map(ranks, {a: 0.01, b: 0.1, c: 1.0}, title="")
    assert all(count(decades, shade(level)) > cell for level in (0.0, 0.5, 1.0))
    clipped = rank_map(ranks, {a: 1e-30, b: 0.0, c: 1.0}, title="")
    assert count(clipped, shade(0.0)) > 2 * cell
    assert count(rank_map(ranks, {a: 1e-30, b: 1e-2, c: 1.0}, title=""), shade(0.5)) > cell


@pytest.mark.parametrize("value", [NAN, INF, -1.0, None])
def test_an_energy_that_means_nothing_is_grey(value):
    a, b = names(MINI, 1)[:2]
    energy = {a: 1.0} if value is None else {a: 1.0, b: value}
    image = rank_map({a: 1, b: 2}, energy, title="")
    assert count(image, (236, 236, 236)) > 1000
    assert count(image, shade(1.0)) > 1000


def test_a_plain_start_reports_no_energy():
    projections = names(MINI, 1)
    ranks = dict.fromkeys(projections, 4)
    assert (
        rank_map(ranks, dict.fromkeys(projections, 0.0), title="").tobytes()
        == rank_map(ranks, {}, title="").tobytes()
    )


def test_names_of_other_models_are_listed():
    few = rank_map({"some.layer": 3}, {"some.layer": 1.0}, title="Ranks")
    assert count(few, shade(1.0)) > 400
    many = rank_map(
        {f"transformer.blocks.{i}." + "x" * 90: 12345 for i in range(240)}, {}, title="Ranks"
    )
    assert margins_are_clean(many)
    assert many.height < 1600
    mixed = rank_map({**dict.fromkeys(names(MINI, 1), 4), "some.layer": 3}, {}, title="Ranks")
    assert mixed.height > rank_map(dict.fromkeys(names(MINI, 1), 4), {}, title="Ranks").height
    assert dark(rank_map({}, {}, title="Nothing")) > 100


def test_rank_maps_repeat_whatever_the_order_of_the_names():
    ranks = {n: i for i, n in enumerate(names(MINI, 1))}
    energy = {n: float(r) for n, r in ranks.items()}
    again = rank_map(dict(reversed(ranks.items())), dict(reversed(energy.items())), title="Ranks")
    assert rank_map(ranks, energy, title="Ranks").tobytes() == again.tobytes()


@settings(max_examples=15, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 10**6), st.floats(-1e9, 1e9)), max_size=6),
    st.text(max_size=60),
)
def test_no_loss_and_no_name_breaks_the_chart(curve, name):
    assert margins_are_clean(loss_chart({name: curve}, title=name, y_label=name, size=(320, 240)))
