"""A disk that fails at its n-th call, for every call of a short run: the LoRA is never lost, no
partial file stays, and the next run works."""

import copy
import json

import pytest
import torch
from safetensors import safe_open

from cntlora_core.cli import main as command_line
from cntlora_core.model.loader import MINI_SD_FOLDER

STEPS = 2
# One short run: its start is checked, three checkpoints (steps 0, 1, 2), the LoRA: 4 calls each.
CALLS = 4 * (STEPS + 1) + 4
SOME = (1, 6, 11, CALLS - 2)  # each kind of call, and each kind of file


@pytest.fixture
def train(mini_sd, tmp_path, monkeypatch):
    """Run the command with a disk: its exit status."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(command_line, "_load", lambda *_: copy.deepcopy(mini_sd))
    out = tmp_path / "out" / "x.safetensors"
    out.parent.mkdir()

    def run(disk, *more):
        given = ["--checkpoint", "mini-sd", "--images", str(MINI_SD_FOLDER / "subject")]
        given += ["--prompt", "a sks cat", "--init", "gaussian", "--rank", "1", "--steps", "2"]
        given += ["--validate-every", "0", "--batch-size", "1", "--checkpoint-every", "1"]
        return command_line.main(["train", *given, "--output", str(out), *more], disk)

    return run, out


def steps_of(path):
    with safe_open(path, "pt") as file:
        assert all(torch.isfinite(file.get_tensor(key)).all() for key in file.keys())  # noqa: SIM118
        return int(file.metadata()["ss_steps"])


def partial_files(folder):
    return [p for p in folder.rglob(".*") if p.is_file()]


def calls_of(train, failing_disk):
    disk = failing_disk()
    run, out = train
    assert run(disk) == 0
    out.unlink()
    return disk.calls


def test_the_calls_of_a_run_are_those_that_fail_here(train, failing_disk):
    assert calls_of(train, failing_disk) == CALLS


def one_failure(train, failing_disk, tmp_path, capsys, call):
    run, out = train
    assert run(failing_disk(call)) == 0
    said = capsys.readouterr()
    saved = json.loads(said.out.splitlines()[-1])["lora"]
    assert steps_of(saved) == STEPS
    checkpoint_failed = call <= 4 * (STEPS + 1)
    assert ("Training goes on without this checkpoint" in said.err) == checkpoint_failed
    assert ("A second try succeeded" in said.err) != checkpoint_failed
    assert partial_files(tmp_path) == []
    assert not out.with_name("x.state.safetensors").exists()
    assert run(failing_disk(), "--overwrite") == 0


def full_from_then_on(train, failing_disk, tmp_path, capsys, call):
    run, out = train
    assert run(failing_disk(call, stays=True)) == 1
    said = capsys.readouterr().err
    assert "No space left on device" in said
    assert partial_files(tmp_path) == []
    assert not out.exists()
    state = out.with_name("x.state.safetensors")
    assert state.exists() == (call > 4)
    assert (f"--resume goes on from '{state}'" in said) == (call > 4)
    assert run(failing_disk(), *(["--resume"] if call > 4 else [])) == 0
    assert steps_of(out) == STEPS


@pytest.mark.parametrize("call", SOME)
def test_a_failed_call_costs_no_lora(train, failing_disk, tmp_path, capsys, call):
    one_failure(train, failing_disk, tmp_path, capsys, call)


@pytest.mark.parametrize("call", [2, CALLS - 1])
def test_a_disk_that_stays_full_is_told_with_what_is_left(
    train, failing_disk, tmp_path, capsys, call
):
    full_from_then_on(train, failing_disk, tmp_path, capsys, call)


@pytest.mark.slow
@pytest.mark.parametrize("call", range(1, CALLS + 1))
def test_every_failed_call(train, failing_disk, tmp_path, capsys, call):
    one_failure(train, failing_disk, tmp_path, capsys, call)


@pytest.mark.slow
@pytest.mark.parametrize("call", range(1, CALLS + 1))
def test_every_moment_of_a_full_disk(train, failing_disk, tmp_path, capsys, call):
    full_from_then_on(train, failing_disk, tmp_path, capsys, call)
