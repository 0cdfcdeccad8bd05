"""The one command for a GPU runs the same code on the miniature, cut short."""

import importlib.util
import sys
from pathlib import Path

import torch

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks"


def script(name):
    spec = importlib.util.spec_from_file_location(name, FOLDER / f"{name}.py")
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_phase_has_its_row(mini_sd, monkeypatch, capsys):
    gpu = script("gpu")
    monkeypatch.setitem(sys.modules["cntlora_core.config"].EFFORTS, "quick", (1, 1))
    monkeypatch.setattr(gpu, "PICTURES", 1)
    monkeypatch.setattr(gpu, "DRAWING_STEPS", 1)
    report = gpu.Report(torch.device("cpu"))
    gpu.run_phases(mini_sd, 64, report, batches=(1,), steps=2, efforts=("quick",))
    assert [row["phase"] for row in report.rows] == [
        "encode 1 pictures",
        "draw a picture, 1 steps",
        "calibrate, quick, batches of 2",
        "adamw step, batch 1",
        "natural step, batch 1",
    ]
    assert all(row["seconds"] > 0 for row in report.rows)
    assert capsys.readouterr().out.count("\n") == 5
    table = gpu.profile_of_a_step(mini_sd, 64, steps=1)
    assert "aten::addmm" in table


def test_what_does_not_fit_says_so(capsys):
    gpu = script("gpu")
    report = gpu.Report(torch.device("cpu"))

    def too_large():
        raise torch.OutOfMemoryError

    report.measure("huge", too_large)
    row = {"phase": "huge", "seconds": None, "held_gb": None, "taken_gb": None}
    assert report.rows == [row]
    assert capsys.readouterr().out == "| huge | too large | - | - |\n"
