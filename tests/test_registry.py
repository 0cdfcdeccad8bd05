"""What the registry of ComfyUI's nodes would refuse, as far as it does not need the owner."""

import ast
import re
from pathlib import Path

import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]

tomllib = pytest.importorskip("tomllib")  # Python 3.11
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
PROJECT, COMFY = PYPROJECT["project"], PYPROJECT["tool"]["comfy"]


def test_the_name_is_one_the_registry_takes():
    assert re.fullmatch(r"[a-z][a-z0-9._-]{0,98}", PROJECT["name"])
    assert "comfyui" not in PROJECT["name"]


def test_the_version_stands_in_the_file_and_is_the_packages():
    assert re.fullmatch(r"\d+\.\d+\.\d+", PROJECT["version"])
    text = (ROOT / "cntlora_core/__init__.py").read_text(encoding="utf-8")
    assigned = [n for n in ast.parse(text).body if isinstance(n, ast.Assign)]
    (version,) = [n.value.value for n in assigned if n.targets[0].id == "__version__"]
    assert version == PROJECT["version"]


def test_the_licence_is_a_table_that_names_a_file():
    assert (ROOT / PROJECT["license"]["file"]).read_text(encoding="utf-8").startswith("MIT")


def test_addresses_are_public_ones():
    addresses = [*PROJECT.get("urls", {}).values(), COMFY["Icon"], COMFY["Banner"]]
    assert not [a for a in addresses if a and not a.startswith("https://")]


def test_the_icon_is_square_and_the_banner_21_by_9():
    with Image.open(ROOT / "docs/images/icon.png") as icon:
        assert icon.width == icon.height <= 400
    with Image.open(ROOT / "docs/images/banner.png") as banner:
        assert banner.width * 9 == banner.height * 21


def test_the_host_is_bounded_below():
    assert re.fullmatch(r">=\d+\.\d+\.\d+", COMFY["requires-comfyui"])


def test_requirements_leave_the_hosts_torch_alone():
    lines = (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines()
    names = {re.split(r"[^A-Za-z0-9._-]", line)[0] for line in lines if line[:1].isalnum()}
    assert not names & {"torch", "torchvision", "torchaudio"}
    assert not [line for line in lines if "==" in line]
