"""Benchmarks run for hours and seldom: what they name of the package exists, and settings have the
names they give."""

import ast
import importlib
import inspect
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2] / "benchmarks"
FILES = sorted(ROOT.rglob("*.py"))


def imported(tree):
    """Local name -> (module, attribute) of what a file takes from the package."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("cntlora_core"):
            for alias in node.names:
                yield alias.asname or alias.name, (node.module, alias.name)


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_what_a_benchmark_takes_from_the_package_is_there(path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    found = {}
    for local, (module, name) in imported(tree):
        parent = importlib.import_module(module)
        if not hasattr(parent, name):
            importlib.import_module(f"{module}.{name}")
        found[local] = getattr(parent, name)
    for node in ast.walk(tree):
        if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Name)):
            continue
        called = found.get(node.func.id)
        if called is None or any(k.arg is None for k in node.keywords):
            continue
        parameters = inspect.signature(called).parameters
        unknown = [k.arg for k in node.keywords if k.arg not in parameters]
        takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
        assert takes_any or not unknown, f"{node.func.id}, line {node.lineno}: {unknown}"
