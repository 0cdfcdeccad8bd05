"""A training in the graph is killed at random moments and goes on, in a new ComfyUI, until it
writes the file that an undisturbed one writes. `KILLS` says how often (3), `KILLS_SEED` when."""

import importlib.util
import json
import logging
import os
import random
import time
from pathlib import Path

import pytest

pytestmark = pytest.mark.comfyui
HERE = Path(__file__).parent
KILLS = int(os.environ.get("KILLS", "3"))
SEED = int(os.environ.get("KILLS_SEED", "0"))
STEPS = 24
WARM = 0.35  # of a first run's time: the model is loaded, the start is cached
GOES_ON = "Goes on after step"


def graph(number):
    """A quick start, a training and a file. How often it is kept changes no run, but the cache
    does not know it."""
    nodes = json.loads((HERE / "workflows/train_a_subject.json").read_text(encoding="utf-8"))
    del nodes["6"]
    nodes["3"]["inputs"] |= {"effort": "quick"}
    nodes["4"]["inputs"] |= {
        **{"steps": STEPS, "validate_every": 8, "sample_every": 0},
        **{"checkpoint_every": 2 + number % 4, "learning_rate": 0.003},
    }
    nodes["5"]["inputs"] |= {"name": f"run{number}", "save_precision": "fp32"}
    return nodes


@pytest.fixture
def server(tmp_path):
    path = os.environ.get("COMFYUI_PATH")
    if not path:
        pytest.skip("COMFYUI_PATH is not set")
    spec = importlib.util.spec_from_file_location("e2e_server", HERE / "server.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    started = module.Server(Path(path), tmp_path / "base")
    try:
        started.wait()
        yield started
    finally:
        started.stop()


def tensors(server, number):
    """The file's data, without the header, which holds the name."""
    content = (server.base / "models/loras" / f"run{number}.safetensors").read_bytes()
    return content[8 + int.from_bytes(content[:8], "little") :]


def left(server):
    """What runs have left to go on from, half-written files too."""
    return sorted(p.name for p in (server.base / "output/cntlora-unfinished").glob("*"))


def ends(server, number, seconds):
    """Whether the run ends by itself in that time."""
    try:
        status = server.run(graph(number), seconds)["status"]
    except TimeoutError:
        return False
    assert status["status_str"] == "success"
    assert "4" not in dict(status["messages"])["execution_cached"]["nodes"]
    return True


def test_a_killed_run_goes_on_to_the_same_file(server):
    """One run is killed again and again, until it ends before it is; then the next one begins."""
    dice = random.Random(SEED)
    began = time.monotonic()
    assert ends(server, 0, 600)
    whole, seconds = tensors(server, 0), time.monotonic() - began
    done, run, went_on, states, lasts = 0, 1, 0, [], WARM * seconds
    while done < KILLS or states:
        moment = dice.uniform(0.1, 1.0) * lasts
        if ends(server, run, moment if done < KILLS else 600):
            told = [e["text"] for e in server.events("4") if e["type"] == "warning"]
            told = [text for text in told if text.startswith(GOES_ON)]
            logging.info("run %d ended after %d kills: %s", run, done, told)
            assert bool(told) == any("state" in name for name in states)
            assert tensors(server, run) == whole
            assert not left(server)
            run, states, lasts = run + 1, [], WARM * seconds
        else:
            server.restart()
            states, done, lasts = left(server), done + 1, seconds
            went_on += any("state" in name for name in states)
            logging.info("kill %d: %s", done, states)
    text = "%d kills, %d with a checkpoint, %d ends alike, %.0f s a run"
    logging.info(text, done, went_on, run - 1, seconds)
