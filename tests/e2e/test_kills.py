"""A training in the graph is killed at random moments and goes on, in a new ComfyUI, to the file
that an undisturbed one writes. `KILLS` says how often (3)."""

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
STEPS = 24


def graph(name):
    """A quick start, a training and a file."""
    nodes = json.loads((HERE / "workflows/train_a_subject.json").read_text(encoding="utf-8"))
    del nodes["6"]
    nodes["3"]["inputs"] |= {"effort": "quick"}
    nodes["4"]["inputs"] |= {
        **{"steps": STEPS, "validate_every": 8, "sample_every": 0},
        **{"checkpoint_every": 3, "learning_rate": 0.003},
    }
    nodes["5"]["inputs"] |= {"name": name, "precision": "fp32"}
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


def saved(server, name):
    return server.base / "models/loras" / f"{name}.safetensors"


def tensors(path):
    """The file's data, without the header, which holds the name."""
    content = path.read_bytes()
    return content[8 + int.from_bytes(content[:8], "little") :]


def test_a_killed_run_goes_on_to_the_same_file(server):
    dice = random.Random(0)
    began = time.monotonic()
    assert server.run(graph("whole"), 600)["status"]["status_str"] == "success"
    whole, seconds = tensors(saved(server, "whole")), time.monotonic() - began
    done, went_on = 0, 0
    while done < KILLS:
        server.restart()  # an empty cache: everything runs again
        server.queue(graph(f"killed{done}"))
        time.sleep(dice.uniform(0.1, 1.0) * seconds)
        server.restart()
        left = list((server.base / "output/cntlora-unfinished").glob("*.state.safetensors"))
        assert server.run(graph(f"again{done}"), 600)["status"]["status_str"] == "success"
        told = [e["text"] for e in server.events("4") if e["type"] == "warning"]
        went_on += any(text.startswith("Goes on after step") for text in told)
        logging.info("kill %d: %s %s", done, [p.name for p in left], told)
        assert bool(left) == any(text.startswith("Goes on after step") for text in told)
        assert tensors(saved(server, f"again{done}")) == whole
        assert not list((server.base / "output/cntlora-unfinished").glob("*.state.safetensors"))
        done += 1
    logging.info("%d kills, %d after a checkpoint, %.0f s a run", done, went_on, seconds)
