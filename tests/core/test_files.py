"""Files are written whole or not at all; what can be known is said before the work."""

import os

import pytest

from cntlora_core import files
from cntlora_core.errors import OutputError
from cntlora_core.files import (
    LineFile,
    atomic_write,
    check_output,
    check_space,
    free_name,
    other_places,
)

CALLS = 4  # of one write: open, write, sync, rename


@pytest.mark.parametrize("call", range(1, CALLS + 1))
@pytest.mark.parametrize("old", [None, b"old"])
def test_a_failure_leaves_the_old_file_and_nothing_beside_it(tmp_path, failing_disk, call, old):
    path = tmp_path / "a.bin"
    if old:
        path.write_bytes(old)
    with pytest.raises(OutputError, match=r"a\.bin' could not be written \(No space left"):
        atomic_write(path, b"new", disk=failing_disk(call))
    assert os.listdir(tmp_path) == (["a.bin"] if old else [])
    assert not old or path.read_bytes() == old
    atomic_write(path, b"new", disk=failing_disk(CALLS + 1))
    assert path.read_bytes() == b"new"
    assert os.listdir(tmp_path) == ["a.bin"]


def test_what_is_not_read_back_does_not_replace(tmp_path):
    def verify(partial):
        assert partial.read_bytes() == b"new"
        raise OutputError("It is not what was written.")

    (tmp_path / "a").write_bytes(b"old")
    with pytest.raises(OutputError, match="not what was written"):
        atomic_write(tmp_path / "a", b"new", verify=verify)
    assert (tmp_path / "a").read_bytes() == b"old"


def test_a_file_made_meanwhile_is_not_overwritten(tmp_path):
    path = tmp_path / "a"
    with pytest.raises(OutputError, match="exists"):
        atomic_write(path, b"x", overwrite=False, verify=lambda _: path.write_bytes(b"theirs"))
    assert path.read_bytes() == b"theirs"


def test_a_name_as_long_as_the_system_takes_can_be_written(tmp_path):
    name = "n" * (255 - len(".safetensors")) + ".safetensors"
    assert atomic_write(tmp_path / name, b"x").name == name


@pytest.mark.parametrize("name", ["n" * 250 + ".safetensors", "a\0b.safetensors"])
def test_names_that_cannot_be_written_are_refused_before_the_work(tmp_path, name):
    with pytest.raises(OutputError, match="cannot be used"):
        check_output(tmp_path / name)


def test_a_name_that_only_its_checkpoint_makes_too_long_is_refused_too(tmp_path):
    stem = "n" * 238
    path = tmp_path / f"{stem}.safetensors"
    check_output(path)
    with pytest.raises(OutputError, match="shorter, plainer"):
        check_output(path, beside=[tmp_path / f"{stem}.state.safetensors"])


def test_text_that_the_file_system_cannot_encode_is_refused(tmp_path):
    if os.fsencode("\udcff") != b"\xff":
        pytest.skip("another encoding of file names")
    for name in ("\ud800.safetensors", "\udce8.safetensors"):  # bytes that are no UTF-8
        with pytest.raises(OutputError, match="cannot be used"):
            check_output(tmp_path / name)


def test_too_little_space_is_said_with_both_numbers(tmp_path):
    with pytest.raises(OutputError, match=r"MB free, and the LoRA needs 1000000000000\.0 MB"):
        check_space(tmp_path / "a", 10**18, "the LoRA")
    check_space(tmp_path / "a", 1, "the LoRA")


def test_other_places_are_beside_it_then_the_folders(tmp_path):
    path = tmp_path / "ä b.safetensors"
    path.touch()
    folders = [tmp_path / "new" / "state", tmp_path / "second"]
    found = list(other_places(path, folders))
    assert [p.name for p in found] == ["ä b_2.safetensors", " b.safetensors", " b.safetensors"]
    assert [p.parent for p in found[1:]] == folders
    assert all(p.parent.is_dir() for p in found)


def test_a_free_name_counts_up(tmp_path):
    path = tmp_path / "a.safetensors"
    for name in ("a.safetensors", "a_2.safetensors"):
        (tmp_path / name).touch()
    assert free_name(path).name == "a_3.safetensors"


def test_the_users_folders_are_absolute():
    assert files.user_folders()
    assert all(folder.is_absolute() for folder in files.user_folders())


@pytest.mark.parametrize("call", range(1, 5))
def test_a_log_that_cannot_be_written_says_so_once_and_keeps_whole_lines(
    tmp_path, failing_disk, call
):
    log = LineFile(tmp_path / "log", disk=failing_disk(call, stays=True))
    said = [log.write(f"line {n}") for n in range(5)]
    log.close()
    assert [s for s in said if s] == ["No space left on device"]
    text = (tmp_path / "log").read_text() if (tmp_path / "log").exists() else ""
    assert text == "".join(f"line {n}\n" for n in range(max(0, call - 2)))


def test_a_log_goes_on_after_its_last_whole_line(tmp_path):
    (tmp_path / "log").write_text("one\ntw")
    log = LineFile(tmp_path / "log", append=True)
    log.write("three")
    log.close()
    assert (tmp_path / "log").read_text() == "one\nthree\n"
