"""The house rules, read from the syntax tree: which floor imports which, and how large a file may be."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
COMFY = {"comfy", "comfy_api", "comfy_extras", "folder_paths", "server", "nodes", "execution"}
SOURCES = sorted(p for d in ("cntlora_core", "nodes", "tests", "benchmarks") for p in (ROOT / d).rglob("*.py"))


def imported(path):
    """Top-level names of absolute imports, and whether an import climbs above `levels` packages."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names.add((node.module or "").split(".")[0])
    return names


@pytest.mark.parametrize("path", [p for p in SOURCES if p.is_relative_to(ROOT / "cntlora_core")], ids=lambda p: p.name)
def test_the_core_knows_nothing_of_comfyui_and_imports_itself_relatively(path):
    assert not imported(path) & (COMFY | {"cntlora_core"})


def test_only_the_host_file_knows_comfyui_internals():
    for path in (ROOT / "nodes").rglob("*.py"):
        if path.name != "host.py":
            assert not imported(path) & (COMFY - {"comfy_api"}), path


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_no_file_is_over_400_lines(path):
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 400


def test_the_map_in_contributing_names_every_module():
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    missing = [
        p.name for p in (ROOT / "cntlora_core").glob("*.py") if p.name != "__init__.py" and f"`{p.name}`" not in text
    ]
    assert not missing


def test_importing_the_pack_imports_no_torch():
    import subprocess
    import sys

    code = "import sys; sys.path.insert(0, '..'); import importlib.util as u; s = u.spec_from_file_location('p', '__init__.py'); m = u.module_from_spec(s); s.loader.exec_module(m); import cntlora_core; assert 'torch' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True).returncode == 0
