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
from safetensors import safe_open

pytestmark = pytest.mark.comfyui
HERE = Path(__file__).parent
KILLS = int(os.environ.get("KILLS", "3"))
SEED = int(os.environ.get("KILLS_SEED", "0"))
STEPS = 24
EARLY = 0.15  # of the kills: before the run trains


def graph(number):
    """A quick start (none where the seed is odd: the other optimiser), a training and a file. How
    often it is kept changes no run, but the cache does not know it."""
    nodes = json.loads((HERE / "workflows/train_a_subject.json").read_text(encoding="utf-8"))
    del nodes["6"]
    if SEED % 2:
        del nodes["3"], nodes["4"]["inputs"]["lora_init"]
    else:
        nodes["3"]["inputs"] |= {"effort": "quick"}
    nodes["4"]["inputs"] |= {
        **{"steps": STEPS, "validate_every": 8, "sample_every": 0},
        **{"checkpoint_every": 2 + number % 4, "learning_rate": 0.003},
    }
    nodes["5"]["inputs"] |= {"name": f"run{number}", "save_precision": "fp32"}
    return nodes


@pytest.fixture
def server(tmp_path):
    if not os.environ.get("COMFYUI_PATH"):
        pytest.skip("COMFYUI_PATH is not set")
    spec = importlib.util.spec_from_file_location("e2e_server", HERE / "server.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    with module.running(tmp_path / "base") as started:
        yield started


def tensors(server, number):
    """The file's data, without the header, which holds the name."""
    content = (server.base / "models/loras" / f"run{number}.safetensors").read_bytes()
    return content[8 + int.from_bytes(content[:8], "little") :]


def left(server):
    """The step that the run which was killed goes on from: 0 for its calibration, None for
    nothing."""
    for path in (server.base / "output/cntlora-unfinished").glob("*.state.safetensors"):
        with safe_open(path, "pt") as file:
            return json.loads(file.metadata()["cntlora.state"])["step"]
    return None


def reached(server, since):
    """The step of the run that was queued then; -1 before it trains."""
    events = server.events("4")
    if not events or events[0]["started"] < since:
        return -1
    return max([0, *(e["step"] for e in events if e["type"] == "step")])


def ends(server, number, *, step=None, seconds=0.0):
    """Whether the run ends before it is at that step, for so long."""
    since, until = time.time(), None
    prompt = server.queue(graph(number))["prompt_id"]
    while step is not None and prompt not in server.get(f"/history/{prompt}"):
        if until is None and reached(server, since) >= step:
            until = time.monotonic() + seconds
        if until is not None and time.monotonic() > until:
            return False
        time.sleep(0.05)
    status = server.result(prompt, 600)["status"]
    assert status["status_str"] == "success"
    assert "4" not in dict(status["messages"])["execution_cached"]["nodes"]
    return True


def test_a_killed_run_goes_on_to_the_same_file(server):
    """One run is killed again and again, most times while it trains, until it ends before it is;
    then the next one begins."""
    dice, began = random.Random(SEED), time.time()
    assert ends(server, 0)
    whole, events = tensors(server, 0), server.events("4")
    training = next(e["time"] for e in events if e["type"] == "training")
    lead, each = training - began, (events[-1]["time"] - training) / STEPS
    done, run, goes_on, step = 0, 1, 0, None
    while done < KILLS or step is not None:
        early = dice.random() < EARLY
        at = -1 if early else dice.randint(step or 0, STEPS)
        moment = dice.random() * (lead if early else each)
        if ends(server, run, step=at if done < KILLS else None, seconds=moment):
            told = [e["text"] for e in server.events("4") if e["type"] == "warning"]
            told = [text for text in told if text.startswith("Goes on")]
            logging.info("run %d ended after %d kills: %s", run, done, told)
            assert told == (
                [f"Goes on after step {step} of the run that was stopped."] * bool(step)
            )
            assert tensors(server, run) == whole
            assert not list((server.base / "output/cntlora-unfinished").iterdir())
            run, step = run + 1, None
        else:
            server.restart()
            done, step = done + 1, left(server)
            goes_on += bool(step)
            logging.info("kill %d, at step %d: goes on from %s", done, at, step)
    text = "%d kills, %d after a step, %d ends alike, %.0f s before a run trains, %.1f a step"
    logging.info(text, done, goes_on, run - 1, lead, each)
