"""The house rules, read from the syntax tree: which floor imports which, and how large a file may
be."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
COMFY = {"comfy", "comfy_api", "comfy_extras", "folder_paths", "server", "nodes", "execution"}
SOURCES = sorted(
    p for d in ("cntlora_core", "nodes", "tests", "benchmarks") for p in (ROOT / d).rglob("*.py")
)


def imported(path):
    """Top-level names of absolute imports, and whether an import climbs above `levels` packages."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names.add((node.module or "").split(".")[0])
    return names


@pytest.mark.parametrize(
    "path", [p for p in SOURCES if p.is_relative_to(ROOT / "cntlora_core")], ids=lambda p: p.name
)
def test_the_core_knows_nothing_of_comfyui_and_imports_itself_relatively(path):
    assert not imported(path) & (COMFY | {"cntlora_core"})


def test_only_the_host_files_know_comfyui_internals():
    for path in (ROOT / "nodes").rglob("*.py"):
        if path.name not in ("host.py", "comfyui_model.py", "comfyui_encoders.py"):
            assert not imported(path) & (COMFY - {"comfy_api"}), path


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_no_file_is_over_400_lines(path):
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 400


# What each floor of the core may stand on. Files beside the packages are everybody's.
COMMON = {
    "config",
    "defaults",
    "presets",
    "devices",
    "distributed",
    "effects",
    "errors",
    "events",
    "files",
    "settings",
    "__init__",
}
FLOORS = {
    "model": set(),
    "lora": {"model"},
    "data": {"model"},
    "calibration": {"model", "lora", "data"},
    "training": {"model", "lora", "data", "calibration"},
    "report": set(),
    "run": {"model", "lora", "data", "calibration", "training"},
    "cli": {"model", "lora", "data", "calibration", "training", "report", "run"},
    "__main__": {"cli"},
    **{name: COMMON for name in COMMON},
}
CORE = ROOT / "cntlora_core"


def module(path):
    return ".".join(path.relative_to(CORE).with_suffix("").parts)


def relative_imports(path):
    """Modules of the core that a file imports, as dotted names from the core's root."""
    package = path.relative_to(CORE).parts[:-1]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = package[: len(package) - node.level + 1]
            yield ".".join([*base, *([node.module] if node.module else [])]) or "__init__"


@pytest.mark.parametrize("path", sorted(CORE.rglob("*.py")), ids=module)
def test_every_file_stands_on_the_floors_below(path):
    own = module(path).split(".")[0]
    allowed = FLOORS[own] | COMMON | {own}
    assert {name.split(".")[0] for name in relative_imports(path)} <= allowed


def test_no_module_imports_itself_by_a_detour():
    imports = {module(p): set(relative_imports(p)) for p in CORE.rglob("*.py")}
    done, path = set(), []

    def visit(name):
        assert name not in path, " -> ".join([*path, name])
        if name in imports and name not in done:
            path.append(name)
            for below in imports[name]:
                visit(below)
            done.add(path.pop())

    for name in imports:
        visit(name)


def test_the_map_in_contributing_names_every_folder_and_file_beside_them():
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    parts = [p for p in CORE.iterdir() if p.name not in ("__init__.py", "__pycache__")]
    names = [f"{p.name}/" if p.is_dir() else p.name for p in parts]
    assert not [name for name in names if f"`{name}`" not in text]


def test_importing_the_pack_imports_no_torch():
    import subprocess
    import sys

    code = (
        "import sys; sys.path.insert(0, '..'); import importlib.util as u; s "
        "= u.spec_from_file_location('p', '__init__.py'); m = "
        "u.module_from_spec(s); s.loader.exec_module(m); import "
        "cntlora_core; assert 'torch' not in sys.modules"
    )
    assert (
        subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True).returncode == 0
    )
