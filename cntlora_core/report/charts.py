"""Pictures of a run, drawn with Pillow: losses, the rank map of the UNet, samples. Data in, picture
out; saving is the caller's. The same data give the same pixels."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

from PIL import Image

from ..errors import SettingError
from .canvas import (
    FAINT,
    GRID,
    LINES,
    LOG_FROM,
    MARGIN,
    MARKERS,
    Canvas,
    Point,
    Scale,
    log_ticks,
    number_labels,
    ticks,
)
from .rank_map import rank_map

__all__ = ["contact_sheet", "loss_chart", "rank_map", "sample_sheet"]
SHEET_COLUMNS, GAP = 8, 8
MOST_SHOWN = 96  # pictures of a contact sheet; a page of thousands nobody looks through
Curve = Sequence[tuple[int, float]]


def loss_chart(
    curves: Mapping[str, Curve],
    *,
    title: str,
    y_label: str = "held-out loss (mean squared error)",
    base: float | None = None,
    size: tuple[int, int] = (960, 560),
) -> Image.Image:
    """One line per curve of (step, loss). A ring marks the best point of each, a dashed line the
    loss `base`.

    Losses that are not finite are left out and counted below the chart. Losses that spread over
    more than a factor of 20 are drawn on a logarithmic axis. `size` is in pixels. Raises
    SettingError when it is below 320 x 240.
    """
    if size[0] < 320 or size[1] < 240:
        raise SettingError(
            f"A chart of {size[0]} x {size[1]} pixels cannot be read: make it 320 x 240 or more."
        )
    lines = {n: sorted(p for p in curve if math.isfinite(p[1])) for n, curve in curves.items()}
    dropped = sum(len(c) for c in curves.values()) - sum(len(c) for c in lines.values())
    lines = {name: curve for name, curve in lines.items() if curve}
    base = base if base is not None and math.isfinite(base) else None
    page = Canvas(*size, scale=3)
    page.text(MARGIN, 18, title, size=20, room=size[0] - 2 * MARGIN)
    if dropped:
        note = f"{dropped} {'loss' if dropped == 1 else 'losses'} left out: not finite"
        page.text(MARGIN, size[1] - 18, note, size=11, fill=FAINT, anchor="ls")
    if not lines:
        page.text(MARGIN, 56, "No losses were recorded.", size=15, fill=FAINT)
        return page.finish()
    styles = [(LINES[i % len(LINES)], MARKERS[i % len(MARKERS)]) for i in range(len(lines))]
    top = _legend(page, lines, styles, base)
    plot = _Plot(page, lines, base, top + 34)
    plot.axes(y_label)
    if base is not None:
        page.dashes(plot.left, plot.right, plot.at(0, base)[1])
    for curve, style in zip(lines.values(), styles, strict=True):
        plot.curve(curve, *style)
    for curve, (colour, _) in zip(lines.values(), styles, strict=True):
        page.ring(*plot.at(*min(curve, key=lambda p: p[1])), 7.5, colour)
    return page.finish()


def _legend(
    page: Canvas,
    lines: Mapping[str, Curve],
    styles: Sequence[tuple[str, str]],
    base: float | None,
) -> float:
    """Draws the names in as many rows as they need, a third of the page at most. Returns where the
    legend ends."""
    entries: list[tuple[str, str, tuple[str, str] | None]] = []
    for (name, curve), look in zip(lines.items(), styles, strict=True):
        step, best = min(curve, key=lambda p: p[1])
        entries.append((name, f"best {best:.4g} at step {step:g}", look))
    if base is not None:
        entries.insert(0, ("base model", f"{base:.4g}", None))
    x, y, right = float(MARGIN), 62.0, page.width - MARGIN
    for i, (name, detail, style) in enumerate(entries):
        name = page.shorten(name, right - MARGIN - 40 - page.measure(detail), middle=True)
        width = 34 + page.measure(name) + 6 + page.measure(detail)
        if x > MARGIN and x + width > right:
            x, y = MARGIN, y + 21
            if y + 21 > page.height / 3 and i < len(entries) - 1:
                page.text(x, y, f"and {len(entries) - i} more", fill=FAINT, anchor="lm")
                break
        if style is None:
            page.dashes(x, x + 26, y)
        else:
            page.line([(x, y), (x + 26, y)], style[0], 2.5)
            page.marker(style[1], x + 13, y, style[0], 4.5)
        page.text(x + 34, y, name, anchor="lm")
        page.text(x + 40 + page.measure(name), y, detail, fill=FAINT, anchor="lm")
        x += width + 28
    return y + 8


class _Plot:
    """The field of a loss chart: where a (step, loss) lies on the page."""

    def __init__(
        self, page: Canvas, lines: Mapping[str, Curve], base: float | None, top: float
    ) -> None:
        self.page = page
        values = [v for curve in lines.values() for _, v in curve] + (
            [base] if base is not None else []
        )
        low, high = min(values), max(values)
        log = low > 0 and low * LOG_FROM < high
        if log:
            low = max(low, high * 1e-12)
            pad = (high / low) ** 0.06
            self.scale = Scale(low / pad, high * pad, log=True)
        else:
            # Differences below the digits that are shown would only magnify rounding.
            pad = (
                0.08 * (high - low)
                if high - low > 1e-7 * max(abs(high), abs(low))
                else 0.05 * abs(high) or 1.0
            )
            self.scale = Scale(low - pad, high + pad)
        self.y_ticks = (log_ticks if log else ticks)(self.scale.low, self.scale.high)
        self.y_labels = number_labels(self.y_ticks)
        self.top, self.bottom = top, page.height - 64
        self.left = MARGIN + max(page.measure(text) for text in self.y_labels) + 10
        self.right = page.width - MARGIN
        self.last = max(1, max(step for curve in lines.values() for step, _ in curve))

    def at(self, step: float, value: float) -> Point:
        """The page's pixel (x, y) of a loss."""
        y = self.bottom - (self.bottom - self.top) * self.scale.place(value)
        # Room on both sides, so that the ring of a best point touches neither the numbers nor the
        # edge.
        return self.left + 12 + (self.right - self.left - 24) * step / self.last, y

    def axes(self, y_label: str) -> None:
        page = self.page
        page.text(
            MARGIN,
            self.top - 12,
            y_label + (", log scale" if self.scale.log else ""),
            fill=FAINT,
            anchor="ls",
        )
        for value, text in zip(self.y_ticks, self.y_labels, strict=True):
            y = self.at(0, value)[1]
            page.line([(self.left, y), (self.right, y)], GRID)
            page.text(self.left - 8, y, text, fill=FAINT, anchor="rm")
        page.line([(self.left, self.bottom), (self.right, self.bottom)], FAINT)
        steps = ticks(0, self.last, count=max(2, min(10, page.width // 90)), smallest=1)
        for step, text in zip(steps, number_labels(steps), strict=True):
            x = self.at(step, self.scale.low)[0]
            page.line([(x, self.bottom), (x, self.bottom + 4)], FAINT)
            page.text(x, self.bottom + 9, text, fill=FAINT, anchor="ma")
        page.text(
            (self.left + self.right) / 2,
            self.bottom + 32,
            "training steps",
            fill=FAINT,
            anchor="ma",
        )

    def curve(self, curve: Sequence[tuple[int, float]], colour: str, marker: str) -> None:
        path = [self.at(*p) for p in curve]
        if len(path) > 1:
            self.page.line(path, colour, 2)
        # Closer points than this would run into a band: show one in so many, and the last.
        every = max(1, math.ceil(10 * len(path) / (self.right - self.left)))
        for x, y in [*path[:-1:every], path[-1]]:
            self.page.marker(marker, x, y, colour)


def sample_sheet(
    rows: Sequence[tuple[str, Sequence[Image.Image]]],
    *,
    title: str,
    subject: Sequence[Image.Image] = (),
    cell: int = 128,
) -> Image.Image:
    """Labelled rows of pictures, the subject's own first, each in a square of `cell` pixels, eight
    to a line.

    Raises SettingError when `cell` is not between 16 and 2048.
    """
    _check_cell(cell)
    every = ([("the subject", subject)] if subject else []) + list(rows)
    columns = max(1, min(SHEET_COLUMNS, max((len(pictures) for _, pictures in every), default=1)))
    heights = [24 + math.ceil(len(pictures) / columns) * (cell + GAP) + 8 for _, pictures in every]
    page = Canvas(
        max(2 * MARGIN + columns * (cell + GAP) - GAP, 420), 62 + (sum(heights) or 34) + 8, scale=1
    )
    page.text(MARGIN, 18, title, size=20, room=page.width - 2 * MARGIN)
    if not every:
        page.text(MARGIN, 62, "There are no pictures.", size=15, fill=FAINT)
    y = 62
    for (label, pictures), height in zip(every, heights, strict=True):
        page.text(
            MARGIN,
            y,
            label if pictures else f"{label}: no pictures",
            size=14,
            room=page.width - 2 * MARGIN,
        )
        for i, picture in enumerate(pictures):
            row, column = divmod(i, columns)
            page.picture(picture, MARGIN + column * (cell + GAP), y + 24 + row * (cell + GAP), cell)
        y += height
    return page.finish()


def contact_sheet(
    images: Iterable[Image.Image],
    labels: Sequence[str],
    *,
    columns: int | None = None,
    cell: int = 128,
) -> Image.Image:
    """Thumbnails with a name under each, to check a dataset by eye, about as many rows as columns.
    Long names lose their middle, not their ending. Of more than 96 pictures the first are drawn
    (no others are asked for) and the rest is counted.

    Raises SettingError when there is not one label per picture, `columns` is below 1 or `cell` is
    not between 16 and 2048.
    """
    _check_cell(cell)
    if columns is None:  # a node of the graph is no wider than high
        columns = max(1, math.ceil(min(len(labels), MOST_SHOWN) ** 0.5))
    if columns < 1:
        raise SettingError(f"columns is {columns}: it must be 1 or more.")
    columns, step = max(1, min(columns, len(labels))), cell + 28
    rows, more = math.ceil(min(len(labels), MOST_SHOWN) / columns), len(labels) - MOST_SHOWN
    height = 2 * MARGIN + rows * step + 24 * (more > 0)
    page = Canvas(2 * MARGIN + columns * (cell + 12) - 12, height, scale=1)
    drawn, pictures = 0, iter(images)
    for label, image in zip(labels[:MOST_SHOWN], pictures, strict=False):
        row, column = divmod(drawn, columns)
        x, y = MARGIN + column * (cell + 12), MARGIN + row * step
        page.picture(image, x, y, cell)
        page.text(x + cell / 2, y + cell + 6, label, size=12, anchor="ma", room=cell, middle=True)
        drawn += 1
    if drawn < min(len(labels), MOST_SHOWN) or (more < 0 and next(pictures, None)):
        raise SettingError(f"There are {len(labels)} labels: give one per picture.")
    if more > 0:
        text = f"and {more} more pictures"
        page.text(MARGIN, MARGIN + rows * step, text, size=15, fill=FAINT)
    if not labels:
        page = Canvas(420, 68, scale=1)
        page.text(MARGIN, MARGIN, "There are no pictures.", size=15, fill=FAINT)
    return page.finish()


def _check_cell(cell: int) -> None:
    if not 16 <= cell <= 2048:
        raise SettingError(f"cell is {cell}: pictures are shown between 16 and 2048 pixels wide.")
