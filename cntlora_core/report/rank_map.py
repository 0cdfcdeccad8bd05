"""The rank map: a picture of the UNet's adapted layers, their ranks and their energies."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping

from PIL import Image

from .canvas import (
    FAINT,
    LOG_FROM,
    MARGIN,
    UNKNOWN,
    Canvas,
    Scale,
    log_ticks,
    number_labels,
    shade,
    text_colour,
    ticks,
)

LOG_DECADES = 4  # energies further below the largest share the palest colour
ONE_PANEL = 24  # more rows than this are set side by side: down, mid, up
NAMES = 96  # pixels left of a panel's cells, for the names of its rows
LISTED = 530  # pixels a projection without a place takes: its whole name as a rule
PROJECTION = re.compile(
    r"(?:(down|up)_blocks\.(\d+)|(mid)_block)\.attentions\.(\d+)\.transformer_blocks\.(\d+)\."
    r"(attn[12]|ff)\.(?:to_(?=[qkvo])|net\.)(q|k|v|out\.0|0\.proj|2)"
)
CONVOLUTION = re.compile(
    r"(?:(down|up)_blocks\.(\d+)|(mid)_block)\."
    r"(?:resnets\.(\d+)\.conv([12])|(?:down|up)samplers\.0\.conv)"
)
GROUPS = {
    "conv": ("convolutions", ("1", "2", "resize")),
    "attn1": ("self-attention", ("q", "k", "v", "out")),
    "attn2": ("cross-attention", ("q", "k", "v", "out")),
    "ff": ("feed-forward", ("in", "out")),
}
ALWAYS = ("attn1", "attn2")
KINDS = {"q": "q", "k": "k", "v": "v", "out.0": "out", "0.proj": "in", "2": "out"}
GAP = 14  # between groups of columns
SIDES = ("down", "mid", "up")
Row = tuple[
    int, int, int, int
]  # side, block, attention, transformer block: the order in which the signal meets them


def rank_map(
    ranks: Mapping[str, int], energy: Mapping[str, float], *, title: str, params: int | None = None
) -> Image.Image:
    """A picture of the UNet: a row per transformer block and the convolutions before it from down
    to up, a cell per projection.

    The number is the projection's rank, the colour the energy its components hold: in proportion,
    or in decades when it spreads over more than a factor of 20 (what is 10^4 below the largest, or
    less, is palest). Grey is a projection without a finite energy >= 0. `params` counts the LoRA's
    parameters. Names that are not those of a diffusers UNet are listed below.
    """
    rows, others = _rows(ranks)
    side_by_side = len(rows) > ONE_PANEL
    panels = (
        [{k: v for k, v in rows.items() if k[0] == side} for side in range(3)]
        if side_by_side
        else [rows]
    )
    panels = [panel for panel in panels if panel]
    cell = (44, 22) if side_by_side else (60, 28)
    columns = _columns(rows.values())
    gaps = len({group for group, _ in columns} - set(ALWAYS))
    step = NAMES + len(columns) * cell[0] + 20 + gaps * GAP
    top = 88
    bottom = max((_lay_out(panel, cell[1], top + 42)[1] for panel in panels), default=top)
    list_top = bottom + (22 if rows else 0)
    lists = min(4, math.ceil(len(others) / 40))
    lines = math.ceil(len(others) / max(lists, 1))
    bottom = list_top + lines * 22 if others else bottom
    width = max(660, 2 * MARGIN + len(panels) * step, 2 * MARGIN + lists * LISTED)
    page = Canvas(width, bottom + (72 if ranks else 20))
    page.text(MARGIN, 18, title, size=20, room=width - 2 * MARGIN)
    page.text(MARGIN, 50, _summary(ranks, params), fill=FAINT)
    scale = _energy_scale([energy[name] for name in ranks if name in energy])
    levels = {n: None if scale is None else _level(scale, energy.get(n)) for n in ranks}
    for i, panel in enumerate(panels):
        _panel(page, MARGIN + i * step, top, cell, panel, columns, ranks, levels)
    for i, name in enumerate(others):
        x, y = MARGIN + i // lines * LISTED, list_top + i % lines * 22
        _cell(page, x, y, 44, 22, ranks[name], levels[name])
        page.text(x + 54, y + 10, name, size=12, anchor="lm", room=LISTED - 70, middle=True)
    if ranks:
        _colour_bar(page, MARGIN, page.height - 52, scale, None in levels.values())
    return page.finish()


def _summary(ranks: Mapping[str, int], params: int | None) -> str:
    if not ranks:
        return "The LoRA has no projections."
    low, high = min(ranks.values()), max(ranks.values())
    each = f"{low} each" if low == high else f"{low} to {high}"
    text = f"{len(ranks)} projections · total rank {sum(ranks.values()):,} ({each})"
    if params is not None:
        text += (
            f" · {params:,} parameters · {_bytes(params * 4)} in fp32, {_bytes(params * 2)} in fp16"
        )
    return text


def _bytes(count: int) -> str:
    return f"{count / 1e6:.1f} MB" if count >= 1e6 else f"{count / 1e3:.0f} kB"


def _rows(names: Iterable[str]) -> tuple[dict[Row, dict[tuple[str, str], str]], list[str]]:
    """The projections by place, in the order in which the signal meets them, and the names that
    have no place."""
    rows: dict[Row, dict[tuple[str, str], str]] = {}
    others, resizing = [], {}
    for name in names:
        if match := PROJECTION.fullmatch(name):
            side, block, mid, attention, transformer, kind, projection = match.groups()
            row = (SIDES.index(side or mid), int(block or 0), int(attention), int(transformer))
            rows.setdefault(row, {})[kind, KINDS[projection]] = name
        elif match := CONVOLUTION.fullmatch(name):
            side, block, mid, resnet, number = match.groups()
            at = SIDES.index(side or mid), int(block or 0)
            if resnet:
                rows.setdefault((*at, int(resnet), 0), {})["conv", number] = name
            else:
                resizing[at] = name
        else:
            others.append(name)
    for at, name in resizing.items():  # with the last of its block
        last = max((row[2] for row in rows if row[:2] == at), default=0)
        rows.setdefault((*at, last, 0), {})["conv", "resize"] = name
    return dict(sorted(rows.items())), others


def _columns(rows: Iterable[Mapping[tuple[str, str], str]]) -> list[tuple[str, str]]:
    """Of both attentions always; of the others where a row has one."""
    used = {group for row in rows for group, _ in row}.union(ALWAYS)
    return [(group, kind) for group in GROUPS if group in used for kind in GROUPS[group][1]]


def _lay_out(rows: Iterable[Row], height: int, y: int) -> tuple[dict[Row, int], int]:
    """The top of each row and the end of the last: attention blocks of several rows, and the sides,
    stand apart."""
    tops: dict[Row, int] = {}
    before: Row | None = None
    deep = any(row[3] for row in rows)
    for row in rows:
        if before is not None and (row[0] != before[0] or (deep and row[:3] != before[:3])):
            y += 8
        tops[row], before = y, row
        y += height
    return tops, y


def _panel(
    page: Canvas,
    left: int,
    top: int,
    cell: tuple[int, int],
    rows: Mapping[Row, Mapping[tuple[str, str], str]],
    columns: list[tuple[str, str]],
    ranks: Mapping[str, int],
    levels: Mapping[str, float | None],
) -> None:
    left += NAMES
    places: dict[tuple[str, str], int] = {}
    x = left
    for n, column in enumerate(columns):
        if n == 0 or columns[n - 1][0] != column[0]:
            x += GAP if n else 0
            page.text(x, top + 12, GROUPS[column[0]][0], fill=FAINT, size=12, anchor="ls")
        places[column] = x
        x += cell[0]
    for (_, kind), x in places.items():
        page.text(x + cell[0] / 2 - 1, top + 34, kind, size=12, anchor="ms")
    tops, _ = _lay_out(rows, cell[1], top + 42)
    deep = any(row[3] for row in rows)
    names = left - (36 if deep else 12)
    page.text(names, top + 34, "block", size=12, fill=FAINT, anchor="rs")
    for row, cells in rows.items():
        middle = tops[row] + cell[1] / 2 - 1
        if row[3] == 0 or (*row[:3], row[3] - 1) not in rows:
            page.text(names, middle, _short(row), size=12, anchor="rm")
        if deep:
            page.text(left - 12, middle, str(row[3]), size=12, fill=FAINT, anchor="rm")
        for column, name in cells.items():
            _cell(page, places[column], tops[row], *cell, ranks[name], levels[name])


def _short(row: Row) -> str:
    """`down 1.0` for down_blocks.1.attentions.0 and the residual block before it."""
    side, block, attention, _ = row
    return (
        f"mid {attention or ''}".rstrip()
        if side == SIDES.index("mid")
        else f"{SIDES[side]} {block}.{attention}"
    )


def _cell(
    page: Canvas, x: float, y: float, width: int, height: int, rank: int, level: float | None
) -> None:
    fill = UNKNOWN if level is None else shade(level)
    page.box(x, y, x + width - 2, y + height - 2, fill)
    page.text(
        x + width / 2 - 1,
        y + height / 2 - 1,
        str(rank),
        size=min(14, height - 9),
        fill=text_colour(fill),
        anchor="mm",
    )


def _energy_scale(values: Iterable[float]) -> Scale | None:
    known = [v for v in values if math.isfinite(v) and v >= 0]
    high, low = max(known, default=0.0), min((v for v in known if v > 0), default=0.0)
    if high == 0:  # also what a plain start reports: nothing was measured
        return None
    if low * LOG_FROM < high:
        return Scale(max(low, high / 10**LOG_DECADES), high, log=True)
    return Scale(0.0, high)


def _level(scale: Scale, value: float | None) -> float | None:
    return scale.place(value) if value is not None and math.isfinite(value) and value >= 0 else None


def _colour_bar(page: Canvas, left: float, y: float, scale: Scale | None, gaps: bool) -> None:
    """What the colours mean, at the foot of the map."""
    if scale is None:
        page.text(
            left,
            y + 14,
            "number: rank of the projection · no energy was measured",
            size=12,
            fill=FAINT,
        )
        return
    width = 260
    for i in range(width):
        page.box(left + i, y, left + i + 1, y + 12, shade(i / (width - 1)))
    marks = (log_ticks if scale.log else ticks)(scale.low, scale.high, 5)
    for value, text in zip(marks, number_labels(marks), strict=True):
        x = left + (width - 1) * scale.place(value) + 0.5
        page.line([(x, y + 12), (x, y + 16)], FAINT)
        page.text(
            max(x, left + page.measure(text, 12) / 2),
            y + 19,
            text,
            size=12,
            fill=FAINT,
            anchor="ma",
        )
    x = left + width + 20
    page.text(
        x,
        y + 6,
        "colour: energy of the kept components" + (", log scale" if scale.log else ""),
        size=12,
        anchor="lm",
    )
    note = "number: rank of the projection" + (" · grey: no energy measured" if gaps else "")
    page.text(x, y + 26, note, size=12, fill=FAINT, anchor="lm")
