"""Curves against cost in several panels of one picture, with one legend above them."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from PIL import Image

from cntlora_core.report.canvas import (
    FAINT,
    GRID,
    LINES,
    MARGIN,
    MARKERS,
    Canvas,
    Scale,
    number_labels,
    ticks,
)

HEIGHT = 400  # of a panel with what is written around it
Field = tuple[float, float, float, float]  # left, top, right, bottom


@dataclass(frozen=True)
class Line:
    """By cost, a value for each seed: a line through their means, bars from the lowest to the
    highest. Lines of one name have one look; those in the `background` are thin and grey."""

    name: str
    values: Mapping[float, Sequence[float]]
    background: bool = False


Panels = Mapping[str, Sequence[Line]]  # by title


def figure(panels: Panels, columns: int = 2, width: int = 1080) -> Image.Image:
    """`panels` row by row; the legend has each name once."""
    lines = [line for own in panels.values() for line in own]
    names = dict.fromkeys(line.name for line in lines if not line.background)
    styles = dict(zip(names, zip(LINES, MARKERS * 2, strict=False), strict=False))
    thin = dict.fromkeys(line.name for line in lines if line.background)
    rows = -(-len(panels) // columns)
    page = Canvas(width, 60 + rows * HEIGHT, scale=3)
    top = _legend(page, styles, list(thin)) + 50
    tall, wide = (page.height - top - 10) / rows, width / columns
    for place, (title, own) in enumerate(panels.items()):
        row, column = divmod(place, columns)
        left, above = column * wide + MARGIN + 34, top + row * tall
        right, below = (column + 1) * wide - MARGIN, top + (row + 1) * tall - 84
        _panel(page, title, own, styles, (left, above, right, below))
    return page.finish()


def _legend(page: Canvas, styles: Mapping[str, tuple[str, str]], thin: Sequence[str]) -> float:
    """Returns where it ends."""
    x, y = float(MARGIN), 22.0
    for name in [*styles, *thin]:
        width = 40 + page.measure(name)
        if x + width > page.width - MARGIN:
            x, y = float(MARGIN), y + 22
        colour, marker = styles.get(name, (FAINT, None))
        page.line([(x, y), (x + 26, y)], colour, 2.5 if marker else 1)
        if marker:
            page.marker(marker, x + 13, y, colour, 4.5)
        page.text(x + 34, y, name, anchor="lm")
        x += width + 24
    return y


def _panel(
    page: Canvas,
    title: str,
    lines: Sequence[Line],
    styles: Mapping[str, tuple[str, str]],
    field: Field,
) -> None:
    left, top, right, bottom = field
    every = [v for line in lines for values in line.values.values() for v in values]
    pad = 0.06 * (max(every) - min(every)) or 0.05
    scale = Scale(min(every) - pad, max(every) + pad)
    last = max(cost for line in lines for cost in line.values)

    def at(cost: float, value: float) -> tuple[float, float]:
        across = left + 10 + (right - left - 20) * cost / last
        return across, bottom - (bottom - top) * scale.place(value)

    page.text(left, top - 14, title, size=15, anchor="ls")
    marks = ticks(scale.low, scale.high)
    for value, text in zip(marks, number_labels(marks), strict=True):
        page.line([(left, at(0, value)[1]), (right, at(0, value)[1])], GRID)
        page.text(left - 8, at(0, value)[1], text, fill=FAINT, anchor="rm")
    marks = ticks(0, last, count=7, smallest=1)
    for cost, text in zip(marks, number_labels(marks), strict=True):
        page.text(at(cost, scale.low)[0], bottom + 8, text, fill=FAINT, anchor="ma")
    page.text((left + right) / 2, bottom + 30, "cost, steps of 4 pictures", fill=FAINT, anchor="ma")
    for line in sorted(lines, key=lambda line: not line.background):
        means = [at(cost, statistics.mean(own)) for cost, own in sorted(line.values.items())]
        if line.background:
            page.line(means, FAINT, 0.5)
            continue
        colour, marker = styles[line.name]
        for cost, own in line.values.items():
            page.line([at(cost, min(own)), at(cost, max(own))], colour, 1.2)
        if len(means) > 1:
            page.line(means, colour, 2)
        for point in means:
            page.marker(marker, *point, colour)
