"""The one command for a GPU runs the same code on the miniature, cut short."""

import json
import sys

import pytest
import torch


@pytest.fixture
def gpu(benchmark_script):
    return benchmark_script("gpu")


def test_every_phase_has_its_row(gpu, mini_sd, monkeypatch, capsys, tmp_path):
    monkeypatch.setitem(sys.modules["cntlora_core.config"].EFFORTS, "quick", (1, 1))
    monkeypatch.setattr(gpu, "PICTURES", 1)
    monkeypatch.setattr(gpu, "DRAWING_STEPS", 1)
    report = gpu.Report(torch.device("cpu"), tmp_path / "gpu.json", {"torch": "2"})
    found = gpu.run_phases(mini_sd, 64, report, batches=(1,), steps=2, efforts=("quick", "quick"))
    assert [row["phase"] for row in report.rows] == [
        "encode 1 pictures",
        "draw a picture, 1 steps",
        "calibrate, quick, batches of 2, first in the process",
        "calibrate, quick, batches of 2",
        "adamw step, batch 1",
        "natural step, batch 1",
    ]
    assert all(row["seconds"] > 0 for row in report.rows)
    assert capsys.readouterr().out.count("\n") == 6
    assert json.loads((tmp_path / "gpu.json").read_text()) == {"torch": "2", "rows": report.rows}
    tables = gpu.profiles_of(mini_sd, found, steps=1)
    assert "aten::addmm" in tables["steps"]
    assert "aten::addmm" in tables["calibration"]


def test_a_model_that_learns_nothing_is_timed_all_the_same(gpu, mini_sd, subject, monkeypatch):
    """Weights of noise fall nowhere; their steps cost what others' do."""
    monkeypatch.setitem(sys.modules["cntlora_core.config"].EFFORTS, "quick", (1, 1))
    still = gpu.Fitted(0.0, 1.0, 0.0)
    monkeypatch.setattr(gpu, "fitted_step", lambda *given: still)
    with gpu.never_standing_still():
        start = gpu.run_calibration(mini_sd, subject, gpu.CalibrationConfig(effort="quick"))
    assert start.report.backward_passes == 4


def test_what_does_not_fit_says_so(gpu, capsys):
    report = gpu.Report(torch.device("cpu"))

    def too_large():
        raise torch.OutOfMemoryError

    report.measure("huge", too_large)
    row = {"phase": "huge", "seconds": None, "held_gb": None, "taken_gb": None}
    assert report.rows == [row]
    assert capsys.readouterr().out == "| huge | too large | - | - |\n"
