"""When a run would have stopped, and what several seeds of it say together."""


def row(method, subject, seed, losses):
    curves = {"0.0": losses, "0.95": losses}
    return {"method": method, "subject": subject, "seed": seed, "curves": curves}


def test_patience_ends_a_run_after_so_many_looks_without_a_better_one(benchmark_script):
    stopping = benchmark_script("stopping")
    curve = [1.0, 0.8, 0.9, 0.85, 0.7]
    assert stopping.stopped(curve, 2) == (3 * stopping.EVERY, 0.8)
    assert stopping.stopped(curve, 3) == (4 * stopping.EVERY, 0.7)


def test_seeds_are_averaged_look_by_look(benchmark_script, monkeypatch):
    stopping = benchmark_script("stopping")
    monkeypatch.setattr(stopping, "DECAYS", (0.0, 0.95))
    rows = [row("ours", "cars", 0, [1.0, 0.6, 0.8]), row("ours", "cars", 1, [1.0, 0.8, 0.6])]
    lines = stopping.table(rows).splitlines()
    assert lines[0] == "| ours: weights averaged | cars | median | at the end |"
    assert lines[2] == "| 0.0 | 0.700 | 0.700 | 1.000 |"
