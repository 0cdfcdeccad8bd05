"""Pictures of a run, drawn with Pillow: losses, the rank map of the UNet, samples. Data in, picture out; saving is the caller's."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence

from PIL import Image, ImageDraw, ImageFont

INK, FAINT, GRID, PAPER = "#222222", "#767676", "#e4e4e4", "#ffffff"
# Okabe & Ito's palette: distinct also for colour-blind eyes.
LINES = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")
SCALE = 2  # charts are drawn at this size and reduced, which smooths the lines
# Perceptually even steps from pale yellow to dark blue (ColorBrewer YlGnBu).
SHADES = ((255, 255, 217), (199, 233, 180), (65, 182, 196), (34, 94, 168), (8, 29, 88))
BLOCK = re.compile(r"^(.*?)\.transformer_blocks\.(\d+)\.(attn[12])\.(to_q|to_k|to_v|to_out\.0)$")
COLUMNS = tuple((a, k) for a in ("attn1", "attn2") for k in ("to_q", "to_k", "to_v", "to_out.0"))


def _font(size: float) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size=size)


def _finish(image: Image.Image) -> Image.Image:
    return image.resize((image.width // SCALE, image.height // SCALE), Image.Resampling.LANCZOS)


def _canvas(width: int, height: int) -> tuple[Image.Image, ImageDraw.ImageDraw]:
    image = Image.new("RGB", (width * SCALE, height * SCALE), PAPER)
    return image, ImageDraw.Draw(image)


def _ellipsis(text: str, width: float, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> str:
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(text + "...") > width:
        text = text[:-1]
    return text + "..."


def _ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Round numbers that cover [low, high]."""
    if high <= low:
        return [low]
    raw = (high - low) / count
    power = 10 ** math.floor(math.log10(raw))
    step = next(f * power for f in (1, 2, 2.5, 5, 10) if f * power >= raw)
    first = math.ceil(low / step - 1e-9)
    return [k * step for k in range(first, math.floor(high / step + 1e-9) + 1)]


def loss_chart(
    curves: Mapping[str, Sequence[tuple[int, float]]],
    *,
    title: str,
    y_label: str = "held-out loss (mean squared error)",
    base: float | None = None,
    size: tuple[int, int] = (960, 560),
) -> Image.Image:
    """One line per curve of (step, loss); the best point of each is marked, `base` is a dashed line. NaN points are left out."""
    finite = {n: [(s, v) for s, v in c if math.isfinite(v)] for n, c in curves.items()}
    points = [p for curve in finite.values() for p in curve]
    image, draw = _canvas(*size)
    u = SCALE
    draw.text((24 * u, 18 * u), title, fill=INK, font=_font(20 * u))
    if not points:
        draw.text((24 * u, 60 * u), "No losses were recorded.", fill=FAINT, font=_font(15 * u))
        return _finish(image)
    values = [v for _, v in points] + ([base] if base is not None else [])
    low, high = min(values), max(values)
    margin = 0.08 * (high - low) or 0.05 * abs(high) or 1.0
    low, high, last = low - margin, high + margin, max(1, max(s for s, _ in points))
    left, top, right, bottom = 84 * u, 92 * u, (size[0] - 30) * u, (size[1] - 62) * u

    def at(step: float, value: float) -> tuple[float, float]:
        return left + (right - left) * step / last, bottom - (bottom - top) * (value - low) / (high - low)

    small = _font(13 * u)
    for value in _ticks(low, high):
        y = at(0, value)[1]
        draw.line((left, y, right, y), fill=GRID, width=u)
        draw.text((left - 8 * u, y), f"{value:.4g}", fill=FAINT, font=small, anchor="rm")
    for step in _ticks(0, last):
        draw.text((at(step, low)[0], bottom + 8 * u), f"{step:g}", fill=FAINT, font=small, anchor="ma")
    draw.text(((left + right) / 2, bottom + 30 * u), "training steps", fill=INK, font=small, anchor="ma")
    draw.text((24 * u, 48 * u), y_label, fill=FAINT, font=small)
    if base is not None:
        _dashed(draw, *at(0, base), right)
        draw.text((right, at(0, base)[1] - 4 * u), f"base model {base:.4f}", fill=FAINT, font=small, anchor="rb")
    legend: float = left
    for colour, (name, curve) in zip(_cycle(LINES, len(finite)), finite.items(), strict=True):
        if not curve:
            continue
        path = [at(*p) for p in curve]
        draw.line(path, fill=colour, width=2 * u, joint="curve")
        for x, y in path:
            draw.ellipse((x - 3 * u, y - 3 * u, x + 3 * u, y + 3 * u), fill=colour)
        step, best = min(curve, key=lambda p: p[1])
        x, y = at(step, best)
        draw.ellipse((x - 7 * u, y - 7 * u, x + 7 * u, y + 7 * u), outline=colour, width=2 * u)
        text = f"{name}: best {best:.4f} at {step}"
        draw.line((legend, 80 * u, legend + 22 * u, 80 * u), fill=colour, width=3 * u)
        draw.text((legend + 28 * u, 80 * u), text, fill=INK, font=small, anchor="lm")
        legend += 28 * u + small.getlength(text) + 26 * u
    return _finish(image)


def _cycle(colours: Sequence[str], count: int) -> list[str]:
    return [colours[i % len(colours)] for i in range(count)]


def _dashed(draw: ImageDraw.ImageDraw, x: float, y: float, right: float) -> None:
    while x < right:
        draw.line((x, y, min(x + 8 * SCALE, right), y), fill=FAINT, width=SCALE)
        x += 14 * SCALE


def _shade(fraction: float) -> tuple[int, int, int]:
    place = min(max(fraction, 0.0), 1.0) * (len(SHADES) - 1)
    index = min(int(place), len(SHADES) - 2)
    low, high, part = SHADES[index], SHADES[index + 1], place - index
    r, g, b = (round(a + (z - a) * part) for a, z in zip(low, high, strict=True))
    return r, g, b


def _short(block: str) -> str:
    """`down_blocks.1.attentions.0` -> `down 1.0`."""
    text = block.replace("_blocks.", " ").replace("mid_block", "mid").replace(".attentions.", ".")
    return text.replace("mid.0", "mid")


def _position(row: tuple[str, object]) -> tuple[int, str]:
    """The order in which the signal meets the blocks; diffusers lists the middle last."""
    return next((i for i, side in enumerate(("down", "mid", "up")) if row[0].startswith(side)), 3), row[0]


def rank_map(
    ranks: Mapping[str, int], energy: Mapping[str, float], *, title: str, params: int | None = None
) -> Image.Image:
    """A picture of the UNet: one row per transformer block from down to up, one cell per projection; colour is the energy its
    components hold, on a logarithmic scale, the number is its rank."""
    rows: dict[str, dict[tuple[str, str], str]] = {}
    for name in ranks:
        match = BLOCK.match(name)
        row, column = (f"{_short(match[1])} / {match[2]}", (match[3], match[4])) if match else (name, COLUMNS[0])
        rows.setdefault(row, {})[column] = name
    rows = dict(sorted(rows.items(), key=_position))
    cell, height = (64, 30) if len(rows) <= 24 else (52, 17)
    left, top = 150, 108
    image, draw = _canvas(left + 8 * cell + 24 + 24, top + len(rows) * height + 66)
    u = SCALE
    draw.text((24 * u, 18 * u), title, fill=INK, font=_font(20 * u))
    total = (
        f"{len(ranks)} projections, ranks {min(ranks.values())} to {max(ranks.values())}" if ranks else "no projections"
    )
    detail = total if params is None else f"{total}, {params:,} parameters ({params * 4 / 1e6:.2f} MB in fp32)"
    draw.text((24 * u, 47 * u), detail, fill=FAINT, font=_font(13 * u))
    small = _font(12 * u)
    place = {column: left + i * cell + (24 if column[0] == "attn2" else 0) for i, column in enumerate(COLUMNS)}
    for (attention, kind), x in place.items():
        label = kind.removeprefix("to_").removesuffix(".0")
        draw.text(((x + cell / 2) * u, (top - 8) * u), label, fill=INK, font=small, anchor="mb")
        if kind == "to_q":
            name = "self-attention" if attention == "attn1" else "cross-attention"
            draw.text((x * u, (top - 26) * u), name, fill=FAINT, font=small, anchor="lb")
    logs = {n: math.log10(e) for n, e in energy.items() if e > 0}
    low, high = (min(logs.values()), max(logs.values())) if logs else (0.0, 0.0)
    for i, (row, cells) in enumerate(rows.items()):
        y = top + i * height
        text = _ellipsis(row, (left - 34) * u, small)
        draw.text(((left - 10) * u, (y + height / 2) * u), text, fill=INK, font=small, anchor="rm")
        for column, name in cells.items():
            level = (logs[name] - low) / ((high - low) or 1) if name in logs else None
            _cell(draw, place[column], y, cell, height, ranks[name], level)
    _colour_bar(draw, left, top + len(rows) * height + 18, low, high, bool(logs))
    return _finish(image)


def _cell(
    draw: ImageDraw.ImageDraw, x: float, y: float, width: int, height: int, rank: int, level: float | None
) -> None:
    fill = (240, 240, 240) if level is None else _shade(level)
    u = SCALE
    draw.rectangle((x * u, y * u, (x + width - 2) * u, (y + height - 2) * u), fill=fill)
    dark = 0.299 * fill[0] + 0.587 * fill[1] + 0.114 * fill[2] < 140
    centre = ((x + (width - 2) / 2) * u, (y + (height - 2) / 2) * u)
    draw.text(centre, str(rank), fill="white" if dark else INK, font=_font(min(14, height - 4) * u), anchor="mm")


def _colour_bar(draw: ImageDraw.ImageDraw, left: int, y: int, low: float, high: float, known: bool) -> None:
    u, width = SCALE, 240
    small = _font(12 * u)
    if not known:
        draw.text((left * u, y * u), "number: rank; no energy was measured", fill=FAINT, font=small)
        return
    for i in range(width):
        draw.rectangle(((left + i) * u, y * u, (left + i + 1) * u, (y + 10) * u), fill=_shade(i / width))
    draw.text((left * u, (y + 14) * u), f"energy 1e{low:.1f}", fill=FAINT, font=small)
    draw.text(((left + width) * u, (y + 14) * u), f"1e{high:.1f}", fill=FAINT, font=small, anchor="ra")
    draw.text(((left + width + 20) * u, (y - 1) * u), "number: rank", fill=FAINT, font=small)


def sample_sheet(
    rows: Sequence[tuple[str, Sequence[Image.Image]]],
    *,
    title: str,
    subject: Sequence[Image.Image] = (),
    cell: int = 128,
) -> Image.Image:
    """Labelled rows of pictures, the subject's own first. Small pictures are enlarged smoothly, large ones reduced."""
    every = ([("the subject", list(subject))] if subject else []) + [(label, list(p)) for label, p in rows]
    columns = max((len(pictures) for _, pictures in every), default=1)
    left, top, gap = 24, 58, 6
    width = max(left * 2 + columns * (cell + gap), 420)
    line = cell + 30
    image = Image.new("RGB", (width, top + len(every) * line + 12), PAPER)
    draw = ImageDraw.Draw(image)
    draw.text((left, 18), _ellipsis(title, width - 2 * left, _font(18)), fill=INK, font=_font(18))
    for i, (label, pictures) in enumerate(every):
        y = top + i * line
        draw.text((left, y), label, fill=FAINT, font=_font(14))
        for j, picture in enumerate(pictures):
            image.paste(_fit(picture, cell), (left + j * (cell + gap), y + 21))
    return image


def _fit(picture: Image.Image, cell: int) -> Image.Image:
    scale = cell / max(picture.size)
    size = (max(1, round(picture.width * scale)), max(1, round(picture.height * scale)))
    framed = Image.new("RGB", (cell, cell), "#f4f4f4")
    framed.paste(
        picture.convert("RGB").resize(size, Image.Resampling.LANCZOS),
        ((cell - size[0]) // 2, (cell - size[1]) // 2),
    )
    return framed
