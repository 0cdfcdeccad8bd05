"""What tradeoff.py found, as tables: what an ordinary LoRA pays for the same loss or the same
fidelity."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Callable, Iterable
from typing import Any

Row = dict[str, Any]
ORDINARY = "ordinary"


def at(curve: list[tuple[float, float]], x: float) -> float | None:
    """y at x on a curve of (x, y), linear between neighbours; None outside."""
    points = sorted(curve)
    for (x0, y0), (x1, y1) in itertools.pairwise(points):
        if x0 <= x <= x1:
            return y0 + (y1 - y0) * ((x - x0) / (x1 - x0) if x1 > x0 else 0.0)
    return None


def compared(x: float, way: list[tuple[float, float]], better: Callable[..., Any]) -> float | None:
    """y where an ordinary LoRA's looks (x, y) are at `x` on their way to the best x, or there where
    `x` is better still (`better`: min or max); None where it is worse than the first."""
    best = better(range(len(way)), key=lambda i: way[i][0])
    return way[best][1] if better(x, way[best][0]) == x else at(way[: best + 1], x)


def least(paths: Iterable[list[tuple[float, float]]], loss: float) -> float:
    """The least forgetting at which some path of (loss, forgetting), from the untouched model on
    and linear between its points, comes to `loss`."""
    found = []
    for path in paths:
        for (x0, y0), (x1, y1) in itertools.pairwise([(1.0, 1.0), *path]):
            found += [y1] if x1 <= loss else []
            if (x0 - loss) * (x1 - loss) < 0:
                found.append(y0 + (y1 - y0) * (loss - x0) / (x1 - x0))
    return min(found)


def at_equal_loss(rows: list[Row]) -> str:
    """Of each contestant the median over subjects and seeds of its forgetting as a share of the
    ordinary's, at the lowest loss that both reach and halfway there."""
    paths: dict[str, dict[tuple[str, int], list[Any]]] = {}
    for r in rows:
        own = paths.setdefault(r["contestant"], {})
        own.setdefault((r["subject"], r["seed"]), []).append([tuple(p) for p in r["path"]])
    columns = ["forgetting", "ordinary", "share of it"]
    head = ["at equal loss", *columns, *(f"halfway there: {name}" for name in columns)]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for contestant in [name for name in paths if name != ORDINARY]:
        cells = [contestant]
        for part in (1.0, 0.5):
            pairs = []
            for run, mine in paths[contestant].items():
                theirs = paths[ORDINARY][run]
                lowest = max(min(x for path in both for x, _ in path) for both in (mine, theirs))
                loss = 1 - part * (1 - lowest)
                pairs.append((least(mine, loss), least(theirs, loss)))
            cells += [f"{statistics.median(side):.3f}" for side in zip(*pairs, strict=True)]
            share = statistics.median((a - 1) / (b - 1) for a, b in pairs)
            cells.append(f"{share:.2f} ({len(pairs)})")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def report(rows: list[Row]) -> str:
    """Every look (medians over subjects and seeds), and what an ordinary LoRA pays for the same
    loss, or the same fidelity."""
    lines = [
        "| contestant | when | loss | forgetting | subject | class | unrelated | forgetting, share "
        "of the ordinary at its loss or its best | unrelated, less the ordinary's at its subject "
        "fidelity or its best |"
    ]
    lines += ["|" + "---|" * 9]
    runs = {(r["subject"], r["seed"]) for r in rows}
    for contestant, when in dict.fromkeys((r["contestant"], r["when"]) for r in rows):
        mine = [r for r in rows if (r["contestant"], r["when"]) == (contestant, when)]
        shares, gains = [], []
        for run in sorted(runs):
            ordinary = [
                r for r in rows if r["contestant"] == ORDINARY and (r["subject"], r["seed"]) == run
            ]
            own = [r for r in mine if (r["subject"], r["seed"]) == run]
            for r in own:
                paid = compared(
                    r["loss"], [(1.0, 1.0)] + [(o["loss"], o["forgetting"]) for o in ordinary], min
                )
                if paid and paid > 1:
                    shares.append((r["forgetting"] - 1) / (paid - 1))
                kept = compared(
                    r["subject_fidelity"],
                    [(o["subject_fidelity"], o["unrelated"]) for o in ordinary],
                    max,
                )
                if kept:
                    gains.append(r["unrelated"] - kept)

        def median(name: str, of: list[Row] = mine) -> str:
            return f"{statistics.median(r[name] for r in of):.3f}"

        cells = [
            median(n) for n in ("loss", "forgetting", "subject_fidelity", "class", "unrelated")
        ]
        share = f"{statistics.median(shares):.2f} ({len(shares)} of {len(mine)})" if shares else "-"
        gain = f"{statistics.median(gains):+.3f} ({len(gains)} of {len(mine)})" if gains else "-"
        lines.append(f"| {contestant} | {when} | {' | '.join(cells)} | {share} | {gain} |")
    return "\n".join(lines)
