"""Tables and the figure of benchmarks/opponents.py, from its results file alone.

At each cost the strongest ordinary LoRA is the one of lowest loss among all settings, each the mean
of its seeds: nobody could choose better.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import panels
from contestants import METHODS, ORDINARY
from PIL import Image

Curve = Mapping[float, float]  # by cost, from the first on
Setting = tuple[str, float]  # a method and its learning rate


class Results:
    """The results file: a line of JSON for every run of one model, its pictures shown in one way.

    Raises SystemExit for a file of another's.
    """

    def __init__(self, path: Path, model: str) -> None:
        self.path, self.model = path, model
        lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
        self.rows = {json.dumps(row["key"]): row for row in map(json.loads, lines)}
        for other in {row.get("model", "?") for row in self.rows.values()} - {model}:
            raise SystemExit(f"'{path}' holds runs of '{other}': give another --output.")

    def add(self, key: list[Any], row: Mapping[str, Any]) -> None:
        row = {"key": key, "model": self.model, **row}
        self.rows[json.dumps(key)] = row
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")

    def of(self, rank: int, subject: str) -> dict[Setting, list[Curve]]:
        """A curve of held-out losses for each seed."""
        found: dict[Setting, list[Curve]] = {}
        for row in self.rows.values():
            of_rank, of_subject, method, rate, _ = row["key"]
            if (of_rank, of_subject) == (rank, subject):
                begun = {cost: loss for cost, loss in row["loss"] if loss != 1}
                found.setdefault((method, rate), []).append(begun)
        return found


def mean(curves: Sequence[Curve]) -> Curve:
    return {cost: statistics.mean(c[cost] for c in curves) for cost in curves[0]}


def strongest(settings: Mapping[Setting, Sequence[Curve]], methods: Sequence[str]) -> Curve:
    """Of the ordinary ones among `methods`, at each cost."""
    curves = [mean(c) for (m, _), c in settings.items() if m in methods and m in ORDINARY]
    return {cost: min(c[cost] for c in curves) for cost in curves[0]} if curves else {}


def best_so_far(curve: Curve) -> Curve:
    """What is left of a run that keeps its best."""
    return dict(zip(curve, accumulate(curve.values(), min), strict=True))


def cost_to(curve: Curve, loss: float) -> float | None:
    """At which it is reached, between two looks in proportion. None where it never is."""
    if next(iter(curve.values())) <= loss:
        return next(iter(curve))
    for (before, high), (after, low) in pairwise(curve.items()):
        if low <= loss:
            return before + (after - before) * (high - loss) / (high - low)
    return None


def report(results: Results, rank: int, subjects: Sequence[str], methods: Sequence[str]) -> str:
    """Markdown: losses by subject, shares of the strongest, when its best is reached, and ours
    against each setting by itself."""
    found = {name: results.of(rank, name) for name in subjects}
    best = {name: s for name, own in found.items() if (s := strongest(own, methods))}
    if not best:
        return _alone(rank, found, methods)
    head = _row(f"rank {rank}", {c: c for c in next(iter(best.values()))}, digits=0)
    head += "\n" + "|---" * (len(next(iter(best.values()))) + 1) + "|"
    others = [m for m in methods if m not in ORDINARY]
    lines = [head]
    for name, strong in best.items():
        lines.append(_row(f"{_words(name)}: strongest ordinary", strong))
        for method in others:
            if curve := _lowest(found[name], method):
                lines.append(_row(f"{_words(name)}: {method}", _at_all(curve, strong)))
    for method in others:
        if own := {name: c for name in best if (c := _lowest(found[name], method))}:
            lines += _shares(method, own, best)
    lines += ["", *_reached(others, found, best), "", head, *_by_setting(found, best, methods)]
    return "\n".join(lines)


def _alone(
    rank: int, found: Mapping[str, Mapping[Setting, Sequence[Curve]]], methods: Sequence[str]
) -> str:
    """The losses by themselves, where no ordinary LoRA was run to compare with."""
    curves = {
        f"{_words(name)}: {method}": curve
        for name, settings in found.items()
        for method in methods
        if (curve := _lowest(settings, method))
    }
    every = {cost: cost for cost in sorted({c for curve in curves.values() for c in curve})}
    lines = [_row(f"rank {rank}", every, digits=0), "|---" * (len(every) + 1) + "|"]
    lines += [_row(name, _at_all(curve, every)) for name, curve in curves.items()]
    return "\n".join(lines) if curves else "Nothing was run yet."


def _lowest(settings: Mapping[Setting, Sequence[Curve]], method: str) -> Curve:
    """Of the method's rates that of the lowest loss; empty where it was not run."""
    curves = [mean(c) for (m, _), c in settings.items() if m == method]
    return min(curves, key=lambda c: min(c.values()), default={})


def _shares(method: str, own: Mapping[str, Curve], best: Mapping[str, Curve]) -> Iterator[str]:
    """Of the strongest's loss, over the subjects."""
    every = next(iter(best.values()))

    def shares(kept: Callable[[Curve], Curve]) -> list[Curve]:
        pairs = [(kept(curve), kept(best[name])) for name, curve in own.items()]
        return [{c: mine[c] / other[c] for c in mine} for mine, other in pairs]

    def over(rows: Sequence[Curve], of: Callable[[list[float]], float]) -> Curve:
        return _at_all({c: of([row[c] for row in rows]) for c in rows[0]}, every)

    yield _row(f"median share: {method}", over(shares(dict), statistics.median))
    if METHODS[method].held_out:
        return  # its best by the pictures that judge would be hindsight
    so_far = shares(best_so_far)
    name = f"median share, each keeping its best so far: {method}"
    yield _row(name, over(so_far, statistics.median))
    yield _row(f"highest share, so: {method}", over(so_far, max))


def _reached(
    methods: Sequence[str],
    found: Mapping[str, Mapping[Setting, Sequence[Curve]]],
    best: Mapping[str, Curve],
) -> Iterator[str]:
    yield "| | best of the strongest, at cost | reached for this share of it, and the own best |"
    yield "|---|---|---|"
    for name, strong in best.items():
        for method in methods:
            if curve := _lowest(found[name], method):
                goal = min(strong.values())
                spent = next(c for c, loss in strong.items() if loss == goal)
                at = cost_to(curve, goal)
                reached = "never" if at is None else f"{at / spent:.2f}"
                yield (
                    f"| {_words(name)}: {method} | {goal:.3f}, {spent} | {reached}, "
                    f"{min(curve.values()) / goal:.3f} |"
                )


def _by_setting(
    found: Mapping[str, Mapping[Setting, Sequence[Curve]]],
    best: Mapping[str, Curve],
    methods: Sequence[str],
) -> Iterator[str]:
    """Ours as a share of every setting's loss, median over the subjects: a person tunes once."""
    every = dict.fromkeys(s for own in found.values() for s in own if s[0] in methods)
    for method, rate in (s for s in every if s[0] in ORDINARY):
        pairs = [
            (ours, mean(found[name][method, rate]))
            for name in best
            if (method, rate) in found[name] and (ours := _lowest(found[name], "ours"))
        ]
        if pairs:
            share = {c: statistics.median(a[c] / b[c] for a, b in pairs) for c in pairs[0][1]}
            yield _row(f"ours, of {method} at {rate:g}", share)


def _words(name: str) -> str:
    return name.replace("_", " ")


def _at_all(curve: Curve, every: Curve) -> dict[float, float | None]:
    """With gaps where it had not begun."""
    return {cost: curve.get(cost) for cost in every}


def _row(name: str, curve: Mapping[float, float | None], digits: int = 3) -> str:
    cells = ("" if x is None else f"{x:.{digits}f}" for x in curve.values())
    return f"| {name} | " + " | ".join(cells) + " |"


def figure(
    results: Results, rank: int, subjects: Sequence[str], methods: Sequence[str]
) -> Image.Image:
    """A panel for each subject: every ordinary setting, the strongest at each cost, ours."""
    drawn: dict[str, list[panels.Line]] = {}
    for name in subjects:
        settings = results.of(rank, name)
        if not (strong := strongest(settings, methods)):
            continue
        each = [
            panels.Line("each ordinary setting", {c: [x] for c, x in mean(curves).items()}, True)
            for (method, _), curves in settings.items()
            if method in methods and method in ORDINARY
        ]
        shown = [panels.Line("strongest ordinary", {c: [x] for c, x in strong.items()})]
        for (method, _), curves in settings.items():
            if method in ("ours", "ours, held out"):
                seeds = {c: [curve[c] for curve in curves] for c in curves[0]}
                shown.append(panels.Line(method, seeds))
        drawn[_words(name)] = each + shown
    return panels.figure(drawn, columns=3)
