"""Signals at random moments of a run, one to three of them, kill -9 among them: what was trained is
kept, and the run that goes on ends bit-identical."""

import contextlib
import json
import logging
import os
import random
import shutil
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
log = logging.getLogger(__name__)
RUNS = 100
STEPS = 12
KINDS = {
    "natural": ["--effort", "quick", "--class-prompt", "a cat"],
    "adamw": ["--init", "gaussian", "--class-prompt", "a cat", "--prior-loss", "images"],
    "no class": ["--effort", "quick", "--schedule", "cosine", "--flip"],
}


def command(out, kind):
    """A run of every phase, as short as can be."""
    pictures = out.parent.parent / "pictures"
    given = ["--checkpoint", "mini-sd", "--images", str(pictures), "--prompt", "a sks cat"]
    given += ["--validation-images", str(pictures / "held out"), "--validate-every", "4"]
    given += ["--rank", "1", "--batch-size", "1", "--class-count", "2", "--steps", str(STEPS)]
    given += ["--cache", str(out.parent / "cache"), "--events", str(out.with_suffix(".jsonl"))]
    given += ["--checkpoint-every", "3", "--resume", "--resolution", "32"]
    return ["train", *given, *KINDS[kind], "--output", str(out)]


def start(out, kind):
    """The command in a process of its own: its number."""
    child = os.fork()
    if child:
        return child
    status = 1
    with open(out.parent / "said.txt", "a") as said:
        sys.stdout = sys.stderr = said
        try:
            torch.set_num_threads(1)
            status = main(command(out, kind))
        finally:
            said.flush()
            os._exit(status)


def ended(child, wait=0):
    """Its exit status, None while it runs."""
    child, status = os.waitpid(child, wait)
    return os.waitstatus_to_exitcode(status) if child else None


def tensors(path):
    with safe_open(path, "pt") as file:
        return {key: file.get_tensor(key) for key in file.keys()}, file.metadata()  # noqa: SIM118


def last_phase(out):
    """Where the run was: its last event but the steps' own."""
    path = out.with_suffix(".jsonl")
    lines = path.read_bytes().split(b"\n")[:-1] if path.exists() else []
    events = [json.loads(line) for line in lines]
    texts = [str(e.get("text") or e["type"]) for e in events if e["type"] != "warning"]
    return texts[-1] if texts else "loading"


@pytest.fixture(scope="module")
def whole(tmp_path_factory, mini_sd):
    """An undisturbed run of a kind: its LoRA, and how long it took, in seconds. That the model was
    loaded here spares every run the libraries' start."""
    made = {}
    one, two, three = sorted((MINI_SD_FOLDER / "subject").glob("*.png"))[:3]
    held_out = tmp_path_factory.getbasetemp() / "pictures" / "held out"
    held_out.mkdir(parents=True)
    for picture, folder in ((one, held_out.parent), (two, held_out.parent), (three, held_out)):
        shutil.copy(picture, folder)

    def run(kind):
        if kind not in made:
            out = tmp_path_factory.mktemp("whole") / "x.safetensors"
            started = time.monotonic()
            assert ended(start(out, kind)) == 0, (out.parent / "said.txt").read_text()
            made[kind] = tensors(out), time.monotonic() - started
        return made[kind]

    return run


@pytest.mark.parametrize("seed", range(RUNS))
def test_signals_at_random_moments(whole, tmp_path, seed):
    draw = random.Random(seed)
    kind = list(KINDS)[seed % len(KINDS)]
    (expected, about), seconds = whole(kind)
    out = tmp_path / "x.safetensors"
    state = tmp_path / "x.state.safetensors"
    moments = sorted(draw.random() * seconds for _ in range(draw.randint(1, 3)))
    child, began = start(out, kind), time.monotonic()
    status = None
    for moment in moments:
        time.sleep(max(0.0, began + moment - time.monotonic()))
        number = draw.choice([signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
        if (status := ended(child, os.WNOHANG)) is not None:
            break
        log.warning("%s: %s in %s", kind, number.name, last_phase(out))  # shown by -rP
        with contextlib.suppress(ProcessLookupError):
            os.kill(child, number)
    status = ended(child) if status is None else status
    said = (tmp_path / "said.txt").read_text()
    assert status in (0, 130, 143, -signal.SIGTERM, -signal.SIGKILL), said
    if status >= 0 and out.exists() and status:
        assert f"--resume goes on from '{state}'" in said
    if status >= 0:
        assert not [p for p in tmp_path.iterdir() if p.name.startswith(".")]
    if status and (state.exists() or not out.exists()):
        assert ended(start(out, kind)) == 0, (tmp_path / "said.txt").read_text()
    assert "Traceback" not in (tmp_path / "said.txt").read_text()
    found, metadata = tensors(out)
    assert metadata == about
    assert all(torch.equal(found[key], expected[key]) for key in expected)
    assert last_phase(out) in ("done", "saved")
    assert not state.exists()
    assert not [p for p in tmp_path.rglob(".*") if p.is_file()]
