"""Scripts of benchmarks/ are no package: they import each other by name, from their own folder."""

import importlib
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture
def benchmark_script(monkeypatch):
    """Import a script as it is run; it and its siblings, whose names are common, are forgotten
    afterwards."""
    monkeypatch.setattr(sys, "path", [*sys.path, str(FOLDER)])
    before = set(sys.modules)
    yield importlib.import_module
    for name in set(sys.modules) - before:
        if FOLDER in Path(getattr(sys.modules[name], "__file__", None) or "/").parents:
            del sys.modules[name]
