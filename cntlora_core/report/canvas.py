"""A page to draw on with Pillow, and what every picture of a run shares: text that fits,
ticks, colours."""

from __future__ import annotations

import bisect
import itertools
import math
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from PIL import Image, ImageDraw, ImageFont

INK, FAINT, GRID, PAPER = "#222222", "#6b6b6b", "#e4e4e4", "#ffffff"
UNKNOWN = (236, 236, 236)
MARGIN = 24
LOG_FROM = 20  # a spread of more than this factor is shown in decades
# Okabe & Ito's palette without its yellow, which is too pale on white: distinct also for
# colour-blind eyes.
LINES = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")
MARKERS = ("circle", "square", "diamond", "triangle")
# ColorBrewer's YlGnBu, each stop placed by its CIE lightness, so that equal steps of the value look
# equal.
SHADES = (
    (0.000, (237, 248, 177)),
    (0.079, (199, 233, 180)),
    (0.222, (127, 205, 187)),
    (0.328, (65, 182, 196)),
    (0.475, (29, 145, 192)),
    (0.676, (34, 94, 168)),
    (0.838, (37, 52, 148)),
    (1.000, (8, 29, 88)),
)
Colour = str | tuple[int, int, int]
Point = tuple[float, float]


def shade(fraction: float) -> tuple[int, int, int]:
    """The colour at `fraction` (0 pale yellow .. 1 dark blue) of the sequential scale."""
    place = min(max(fraction, 0.0), 1.0)
    index = min(
        max(bisect.bisect_right(SHADES, place, key=lambda stop: stop[0]) - 1, 0), len(SHADES) - 2
    )
    (low, start), (high, end) = SHADES[index], SHADES[index + 1]
    r, g, b = (
        round(a + (z - a) * (place - low) / (high - low)) for a, z in zip(start, end, strict=True)
    )
    return r, g, b


def _luminance(colour: tuple[int, int, int]) -> float:
    r, g, b = (c / 3294.6 if c <= 10 else ((c / 255 + 0.055) / 1.055) ** 2.4 for c in colour)
    return 0.2126 * r + 0.7152 * g + 0.0722 * b


def text_colour(background: tuple[int, int, int]) -> str:
    """Black or white, whichever contrasts more (WCAG): at least 4.5 : 1 on any background."""
    light = _luminance(background) + 0.05
    return "#000000" if light / 0.05 >= 1.05 / light else "#ffffff"


def plain(text: str) -> str:
    """`text` on one line, in the letters Pillow's own font has: accents are dropped, other scripts
    become `?`."""
    replaced = text.translate(
        {
            0x2010: "-",
            0x2013: "-",
            0x2014: "-",
            0x2018: "'",
            0x2019: "'",
            0xDF: "ss",
            0xE6: "ae",
            0xF8: "o",
        }
    )
    # NFKD would take the ellipsis, which the font has, apart.
    letters = (
        c if c in "…·" else unicodedata.normalize("NFKD", c) for c in " ".join(replaced.split())
    )
    kept = (c for c in "".join(letters) if not unicodedata.combining(c))
    return "".join(c if " " <= c <= "~" or c in "…·" else "?" for c in kept)


def ticks(low: float, high: float, count: int = 6, smallest: float = 0.0) -> list[float]:
    """About `count` round numbers inside [low, high], no closer than `smallest`."""
    if not high > low:
        return [low]
    raw = max((high - low) / count, smallest)
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(f * power for f in (1, 2, 5, 10) if f * power >= raw * (1 - 1e-9))
    return [
        k * step for k in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)
    ]


def log_ticks(low: float, high: float, count: int = 8) -> list[float]:
    """Decades inside [low, high] (0 < low), with their 2 and 5 if there is room."""
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for factors in ((1, 2, 5), (1,)):
        inside = [f * 10.0**d for d in decades for f in factors if low <= f * 10.0**d <= high]
        if len(inside) <= count:
            return inside or [low, high]
    return inside[:: math.ceil(len(inside) / count)]


def number_labels(values: Sequence[float]) -> list[str]:
    """The numbers in as few digits as tell neighbours apart, evenly spaced ones with the same
    decimals."""
    largest = max((abs(v) for v in values), default=0.0)
    gaps = [b - a for a, b in itertools.pairwise(values) if b > a]
    gap = min(gaps, default=largest / 100)
    if gap == 0 or max(gaps, default=gap) > 1.5 * gap:
        return [f"{v:.6g}" for v in values]
    decimals = -math.floor(math.log10(gap) + 1e-9)
    if largest < 1e7 and decimals < 9:
        return [f"{v:.{max(decimals, 0)}f}" for v in values]
    digits = math.floor(math.log10(largest)) + decimals + 1
    return [f"{v:.{min(max(digits, 1), 17)}g}" for v in values]


@dataclass(frozen=True)
class Scale:
    """Where a value lies between `low` and `high` as 0..1, in proportion or in decades."""

    low: float
    high: float
    log: bool = False

    def place(self, value: float) -> float:
        if self.log:
            return math.log(max(value, self.low) / self.low) / math.log(self.high / self.low)
        return (value - self.low) / (self.high - self.low)


class Canvas:
    """A white page measured in picture pixels. It is drawn `scale` times larger and reduced, which
    smooths edges."""

    def __init__(self, width: int, height: int, scale: int = 2) -> None:
        self.width, self.height, self.scale = width, height, scale
        self.image = Image.new("RGB", (width * scale, height * scale), PAPER)
        self.draw = ImageDraw.Draw(self.image)
        self.fonts: dict[float, Any] = {}

    def finish(self) -> Image.Image:
        # The mean of whole blocks: a sharper filter would ring along the edges of the cells.
        return self.image.reduce(self.scale)

    def measure(self, text: str, size: float = 13) -> float:
        """Width of `text` in picture pixels."""
        if size not in self.fonts:
            self.fonts[size] = ImageFont.load_default(size=size * self.scale)
        return float(self.fonts[size].getlength(plain(text))) / self.scale

    def shorten(self, text: str, room: float, size: float = 13, middle: bool = False) -> str:
        """`text`, or as much of it as `room` pixels hold: the start, or with `middle` both ends,
        which tells names apart."""
        text = plain(text)
        if self.measure(text, size) <= room:
            return text

        def cut(keep: int) -> str:
            tail = keep // 2 if middle else 0
            return text[: keep - tail].rstrip() + "…" + text[len(text) - tail :]

        fits = bisect.bisect_left(
            range(1, len(text)), True, key=lambda keep: self.measure(cut(keep), size) > room
        )
        return cut(fits)

    def text(
        self,
        x: float,
        y: float,
        text: str,
        size: float = 13,
        fill: Colour = INK,
        anchor: str = "la",
        room: float | None = None,
        middle: bool = False,
    ) -> float:
        """Draws one line, shortened to `room` (by default to the page), and returns its width."""
        page = {"l": self.width - x, "r": x, "m": 2 * min(x, self.width - x)}[anchor[0]] - 4
        text = self.shorten(text, page if room is None else min(room, page), size, middle)
        width = self.measure(text, size)
        self.draw.text(
            (x * self.scale, y * self.scale), text, fill=fill, font=self.fonts[size], anchor=anchor
        )
        return width

    def line(self, points: Sequence[Point], fill: Colour, width: float = 1) -> None:
        scaled = [(x * self.scale, y * self.scale) for x, y in points]
        self.draw.line(scaled, fill=fill, width=round(width * self.scale), joint="curve")

    def dashes(self, left: float, right: float, y: float, fill: Colour = FAINT) -> None:
        for k in range(math.ceil((right - left) / 12)):
            self.line([(left + 12 * k, y), (min(left + 12 * k + 7, right), y)], fill, 1.5)

    def box(self, left: float, top: float, right: float, bottom: float, fill: Colour) -> None:
        s = self.scale  # Pillow's rectangles include their last pixel
        self.draw.rectangle((left * s, top * s, right * s - 1, bottom * s - 1), fill=fill)

    def ring(self, x: float, y: float, radius: float, colour: Colour) -> None:
        r = radius * self.scale
        x, y = x * self.scale, y * self.scale
        self.draw.ellipse((x - r, y - r, x + r, y + r), outline=colour, width=2 * self.scale)

    def marker(self, kind: str, x: float, y: float, fill: Colour, radius: float = 3.5) -> None:
        x, y, r = x * self.scale, y * self.scale, radius * self.scale
        if kind == "circle":
            self.draw.ellipse((x - r, y - r, x + r, y + r), fill=fill)
        elif kind == "square":
            self.draw.rectangle((x - 0.86 * r, y - 0.86 * r, x + 0.86 * r, y + 0.86 * r), fill=fill)
        elif kind == "diamond":
            self.draw.polygon(
                [(x, y - 1.25 * r), (x + 1.25 * r, y), (x, y + 1.25 * r), (x - 1.25 * r, y)],
                fill=fill,
            )
        else:
            self.draw.polygon(
                [(x, y - 1.3 * r), (x + 1.2 * r, y + 0.9 * r), (x - 1.2 * r, y + 0.9 * r)],
                fill=fill,
            )

    def picture(self, picture: Image.Image, x: int, y: int, side: int) -> None:
        """Pastes `picture` into a square cell: small ones enlarged, large ones reduced, transparent
        parts on white.

        Only on a page of scale 1: there the pixels stay as they are.
        """
        if picture.has_transparency_data:
            rgba = picture.convert("RGBA")
            picture = Image.alpha_composite(Image.new("RGBA", rgba.size, PAPER), rgba)
        self.box(x - 1, y - 1, x + side + 1, y + side + 1, GRID)
        self.box(x, y, x + side, y + side, "#f6f6f6")
        ratio = side / max(*picture.size, 1)
        size = (max(1, round(picture.width * ratio)), max(1, round(picture.height * ratio)))
        if picture.width and picture.height:
            fitted = picture.convert("RGB").resize(size, Image.Resampling.LANCZOS, reducing_gap=3.0)
            self.image.paste(fitted, (x + (side - size[0]) // 2, y + (side - size[1]) // 2))
