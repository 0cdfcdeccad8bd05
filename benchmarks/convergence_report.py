"""Tables and the figure of benchmarks/convergence.py, from its results file alone."""

from __future__ import annotations

import math
import random
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cntlora_core.report.charts import loss_chart

Row = dict[str, Any]
Point = tuple[float, float, float]  # cost, loss relative to the base model, seconds
RESAMPLES = 2000
# What the figure shows where there are many.
DRAWN = (
    "gaussian",
    "default",
    "eva",
    "lora_ga",
    "domain, data ranks",
    "target balanced",
    "target thorough",
)


def mean_curve(rows: Sequence[Row]) -> list[Point]:
    """Mean over seeds, point by point (calibration costs the same with every seed, to a look or two
    at the pictures)."""
    shortest = min(len(r["curve"]) for r in rows)
    columns = zip(*(r["curve"][:shortest] for r in rows), strict=True)
    return [
        tuple(statistics.mean(axis) for axis in zip(*points, strict=True)) for points in columns
    ]  # type: ignore[misc]


def reached(curve: Sequence[Point], goal: float, axis: int = 0) -> float:
    """Cost (axis 0) or seconds (axis 2) at which the curve first comes down to `goal`, linear
    between points; infinite when it never does."""
    before: Point | None = None
    for point in curve:
        if point[1] <= goal:
            if before is None:
                return point[axis]
            share = (before[1] - goal) / (before[1] - point[1])
            return before[axis] + share * (point[axis] - before[axis])
        before = point
    return math.inf


def chosen(rows: Sequence[Row], tuned: Sequence[str], method: str) -> tuple[float, bool]:
    """The method's learning rate: lowest mean of the tuning subjects' best losses with the first
    seed; whether both neighbours were tried."""
    mine = [r for r in rows if r["key"][1] == method and r["key"][0] in tuned]
    first = min(r["key"][3] for r in mine)
    rates = sorted({r["key"][2] for r in mine})

    def best_loss(lr: float) -> float:
        return statistics.mean(
            min(p[1] for p in r["curve"])
            for r in mine
            if r["key"][2] == lr and r["key"][3] == first
        )

    best = min(rates, key=best_loss)
    return best, rates[0] < best < rates[-1]


def report(
    rows: Sequence[Row],
    tuned: Sequence[str],
    tested: Sequence[str],
    *,
    baselines: Sequence[str],
    peers: Sequence[str],
    figure: Path | None = None,
) -> str:
    """Markdown: a table for each group of subjects, and the medians. Draws the first subject's
    curves into `figure`."""
    methods = list(dict.fromkeys(r["key"][1] for r in rows))
    rates = {m: chosen(rows, tuned, m) for m in methods}
    text = ["| method | learning rate | inside the grid |", "|---|---|---|"]
    text += [f"| {m} | {lr:g} | {'yes' if inside else 'no'} |" for m, (lr, inside) in rates.items()]
    for title, names in (("Tuned on", tuned), ("Not used for any choice", tested)):
        runs = {
            n: {m: [r for r in rows if r["key"][:3] == [n, m, rates[m][0]]] for m in methods}
            for n in names
        }
        curves = {
            n: {m: mean_curve(own) for m, own in found.items() if own} for n, found in runs.items()
        }
        starts = {
            n: {m: statistics.mean(r["step0"] for r in own) for m, own in found.items() if own}
            for n, found in runs.items()
        }
        curves = {
            name: found for name, found in curves.items() if any(b in found for b in baselines)
        }
        if curves:
            text += ["", f"### {title}", "", *_table(curves, starts, methods, baselines, peers)]
        if figure and curves and names is tuned:
            name, found = next(iter(curves.items()))
            drawn = [m for m in found if m in DRAWN or len(found) <= len(DRAWN)]
            loss_chart(
                {m: [(c, x) for c, x, _ in found[m]] for m in drawn},
                title=f"{name}: held-out loss against cost",
                base=1.0,
            ).save(figure)
    return "\n".join(text)


def _table(
    curves: dict[str, dict[str, list[Point]]],
    starts: dict[str, dict[str, float]],
    methods: Sequence[str],
    baselines: Sequence[str],
    peers: Sequence[str],
) -> list[str]:
    goals, costs, seconds = {}, {}, {}
    for name, found in curves.items():
        best = min((b for b in baselines if b in found), key=lambda b: min(p[1] for p in found[b]))
        goals[name] = min(p[1] for p in found[best])
        costs[name], seconds[name] = (
            reached(found[best], goals[name]),
            reached(found[best], goals[name], 2),
        )
    head = [
        "method",
        *curves,
        "cost, share of the baseline's: median (95 %)",
        "time, share",
        "loss at step 0",
        "best",
    ]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    shares: dict[str, list[float]] = {}
    for m in methods:
        found = {name: f[m] for name, f in curves.items() if m in f}
        if not found:
            continue
        shares[m] = [reached(f, goals[n]) / costs[n] for n, f in found.items()]
        times = [reached(f, goals[n], 2) / seconds[n] for n, f in found.items()]
        cells = [
            f"{starts[n][m]:.3f} / {min(p[1] for p in found[n]):.3f} / "
            f"{_number(reached(found[n], goals[n]))}"
            if n in found
            else ""
            for n in curves
        ]
        low, high = _interval(shares[m])
        lines.append(
            f"| {m} | {' | '.join(cells)} | {_number(statistics.median(shares[m]))} "
            f"({_number(low)}-{_number(high)}) | {_number(statistics.median(times))} | "
            f"{statistics.median(starts[n][m] for n in found):.3f} | "
            f"{statistics.median(min(p[1] for p in f) for f in found.values()):.3f} |"
        )
    lines += [
        "",
        (
            "Cells: loss at step 0 / best / cost at which the baseline's best "
            "loss is reached. The baseline reached its best at "
        )
        + ", ".join(f"{n} {g:.3f} after {costs[n]:.0f}" for n, g in goals.items())
        + ".",
    ]
    data_driven = [
        p for p in peers if p in ("pissa", "olora", "eva", "corda", "lora_ga") and p in shares
    ]
    if data_driven:
        best_peer = [min(values) for values in zip(*(shares[p] for p in data_driven), strict=True)]
        lines.append(
            f"The best of {', '.join(data_driven)} on each subject: median share "
            f"{_number(statistics.median(best_peer))}."
        )
    return lines


def _interval(values: Sequence[float]) -> tuple[float, float]:
    """95 % bootstrap interval of the median over subjects."""
    draw = random.Random(0)
    medians = sorted(
        statistics.median(draw.choices(values, k=len(values))) for _ in range(RESAMPLES)
    )
    return medians[int(0.025 * RESAMPLES)], medians[int(0.975 * RESAMPLES) - 1]


def _number(value: float) -> str:
    return "never" if math.isinf(value) else f"{value:.2f}" if value < 10 else f"{value:.0f}"
