"""Signals at random moments of a run, one to three of them: what was trained is kept, and the run
that goes on ends bit-identical."""

import contextlib
import os
import random
import signal
import sys
import time

import pytest
import torch
from safetensors import safe_open

from cntlora_core.cli.main import main
from cntlora_core.model.loader import MINI_SD_FOLDER

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork"),
]
RUNS = 100
STEPS = 6


def command(out):
    given = ["--checkpoint", "mini-sd", "--images", str(MINI_SD_FOLDER / "subject")]
    given += ["--prompt", "a sks cat", "--effort", "quick", "--rank", "1", "--batch-size", "1"]
    given += ["--class-prompt", "a cat", "--steps", str(STEPS), "--validate-every", "2"]
    return ["train", *given, "--save-every", "2", "--resume", "--output", str(out)]


def start(out):
    """The command in a process of its own that has imported everything already: its number."""
    child = os.fork()
    if child:
        return child
    status = 1
    with open(out.parent / "said.txt", "w") as said:
        sys.stdout = sys.stderr = said
        try:
            torch.set_num_threads(1)
            status = main(command(out))
        finally:
            said.flush()
            os._exit(status)


def finish(child):
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def tensors(path):
    with safe_open(path, "pt") as file:
        return {key: file.get_tensor(key) for key in file.keys()}, file.metadata()  # noqa: SIM118


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """An undisturbed run: its LoRA, and how long it took, in seconds."""
    out = tmp_path_factory.mktemp("whole") / "x.safetensors"
    started = time.monotonic()
    assert finish(start(out)) == 0
    return tensors(out), time.monotonic() - started


@pytest.mark.parametrize("seed", range(RUNS))
def test_signals_at_random_moments(whole, tmp_path, seed):
    (expected, about), seconds = whole
    draw = random.Random(seed)
    out = tmp_path / "x.safetensors"
    child = start(out)
    for _ in range(draw.randint(1, 3)):
        time.sleep(draw.random() * seconds / 2)
        with contextlib.suppress(ProcessLookupError):
            os.kill(child, draw.choice([signal.SIGINT, signal.SIGTERM]))
    status = finish(child)
    said = (tmp_path / "said.txt").read_text()
    assert status in (0, 130, 143, -signal.SIGTERM), said  # killed only before there is a run
    assert "Traceback" not in said
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".")]
    state = tmp_path / "x.state.safetensors"
    if out.exists() and status:
        assert state.exists()
        assert f"--resume goes on from '{state}'" in said
    if status:
        assert finish(start(out)) == 0, (tmp_path / "said.txt").read_text()
    found, metadata = tensors(out)
    assert metadata == about
    assert all(torch.equal(found[key], expected[key]) for key in expected)
    assert not state.exists()
