"""Names from a stranger's workflow stay inside the folder."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st


@pytest.fixture(scope="module")
def paths(pack):
    return pack.paths


@pytest.mark.parametrize("name", ["cat", "my cat", "people/anna", "10_dog", "über.v2", "a\\b"])
def test_plain_names_are_taken(paths, tmp_path, name):
    assert paths.inside(tmp_path, name).is_relative_to(tmp_path)


@pytest.mark.parametrize(
    "name",
    [
        "",
        ".",
        "..",
        "../x",
        "a/../../x",
        "/etc",
        "\\\\server\\share",
        "C:\\x",
        "c:x",
        "CON",
        "aux.safetensors",
        "lpt1",
        "a//b",
        "a/",
        "x\0",
        "a\nb",
        "name.",
        " lead",
        "trail ",
        "a:b",
        "a|b",
        "con .txt",
        "x" * 300,
        "a/" + "ä" * 120,
        "cat\ud83d",
    ],
)
def test_names_that_lead_elsewhere_are_refused(paths, tmp_path, name):
    with pytest.raises(paths.SettingError, match="use a file or folder name") as refused:
        paths.inside(tmp_path, name)
    assert len(str(refused.value).encode()) < 250


def test_a_link_to_another_place_is_refused(paths, tmp_path):
    root, other = tmp_path / "input", tmp_path / "other"
    root.mkdir()
    other.mkdir()
    (root / "cat").symlink_to(other)
    with pytest.raises(paths.SettingError, match="link to a place outside 'input'"):
        paths.inside(root, "cat")


@given(st.text(max_size=40))
def test_whatever_the_name_the_path_is_inside_or_refused(paths, name):
    root = Path("/nowhere/input")
    try:
        path = paths.inside(root, name)
    except paths.SettingError:
        return
    assert path.resolve().is_relative_to(root)
    assert path != root
