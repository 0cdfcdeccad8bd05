"""Fidelity along a run: every look has its cost, and the figure shows them all."""

import sys

import numpy as np
import pytest


@pytest.fixture
def progress(benchmark_script):
    return benchmark_script("progress")


def test_looks_are_taken_at_their_cost(progress, mini_sd, subject, monkeypatch):
    monkeypatch.setitem(sys.modules["cntlora_core.config"].EFFORTS, "quick", (1, 1))

    def costs(name, *at):
        method = progress.METHODS[name]
        return [cost for cost, _ in progress.looks(mini_sd, subject, method, None, 0, costs=at)]

    ours = costs("ours", 4, 5)
    assert ours[0] < 4  # a sweep of 2 pictures, a step of 2, and what fits the sweep's length
    assert ours[1:] == pytest.approx([4, 5], abs=0.3)
    assert costs("gaussian start, attention", 1, 2) == [1, 2]


def test_a_run_that_is_there_whole_is_not_made_again(progress, mini_sd, monkeypatch, tmp_path):
    made = []

    def looks(_model, _subject, method, _prior, seed):
        made.append((method, seed))
        yield from (((10.0, {}), (90.0, {})) if seed else ((10.0, {}),))  # seed 0 was cut short

    monkeypatch.setattr(progress, "looks", looks)
    monkeypatch.setattr(progress, "class_images", lambda *_: None)
    monkeypatch.setattr(progress, "class_noised", lambda *_: None)
    monkeypatch.setattr(progress, "subject_reference", lambda *_: None)
    monkeypatch.setattr(progress, "_scores", lambda *_: {"subject": 0.5, "unrelated": 1.0})
    output = tmp_path / "progress.jsonl"
    progress.run(mini_sd, None, [0, 1], output)
    assert len(made) == 2 * len(progress.METHODS)
    made.clear()
    progress.run(mini_sd, None, [0, 1], output)
    assert {seed for _, seed in made} == {0}


def test_table_and_figure_show_what_was_found(progress):
    rows = [
        {"method": name, "seed": seed, "cost": cost, "subject": value + seed / 10, "unrelated": 0.5}
        for name in ("ours", "default start, attention")
        for seed in (0, 1)
        for cost, value in ((0.0, 0.2), (10.0, 0.4))
    ]
    lines = progress.table(rows, "subject").splitlines()
    assert lines[0] == "| subject | cost 0 | cost 10 |"
    assert "| ours | 0.250 | 0.450 |" in lines
    pixels = np.asarray(progress.figure(rows))
    assert pixels.shape == (460, 1080, 3)  # two panels beside each other
    assert pixels.min() < 128
