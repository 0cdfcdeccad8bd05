"""The graphs people run, in a real ComfyUI, to the end."""

import copy
import json
import re
import time
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw
from safetensors import safe_open

pytestmark = pytest.mark.comfyui
WORKFLOWS = Path(__file__).with_name("workflows")
LARGE = {"with_comfyui_model"}  # wants a checkpoint of full size: test_comfyui_model.py
NAMES = sorted({p.stem for p in WORKFLOWS.glob("*.json")} - LARGE)


def workflow(name):
    return json.loads((WORKFLOWS / f"{name}.json").read_text(encoding="utf-8"))


def short(name="train_a_subject", **train):
    """The same graph in a few steps, with a seed of its own so that ComfyUI's cache does not
    answer."""
    graph = workflow(name)
    graph["4"]["inputs"].update(
        {"steps": 6, "sample_every": 3, "validate_every": 3, "seed": time.time_ns() % 2**31} | train
    )
    return graph


def pictures(comfyui, outputs):
    for image in outputs["images"]:
        raw = comfyui.raw(
            f"/view?filename={image['filename']}&subfolder={image['subfolder']}&type={image['type']}"
        )
        yield np.asarray(Image.open(BytesIO(raw)).convert("RGB"), dtype=float)


def failure(result):
    return next(
        m[1]
        for m in result["status"]["messages"]
        if m[0] in ("execution_error", "execution_interrupted")
    )


@pytest.mark.parametrize("name", NAMES)
def test_every_example_runs_to_the_end(comfyui, name):
    graph = workflow(name)
    if name == "continue" and not (comfyui.base / "models/loras/my_subject.safetensors").exists():
        comfyui.run(short())  # the file that it trains on
    result = comfyui.run(graph)
    assert result["status"]["status_str"] == "success", result["status"]
    for outputs in result["outputs"].values():
        for picture in pictures(comfyui, outputs) if "images" in outputs else ():
            assert picture.std() > 1
    assert "lora key not loaded" not in comfyui.text()


def test_the_saved_file_is_listed_and_tells_its_story(comfyui):
    graph = short()
    graph["5"]["inputs"]["name"] = "people/anna"
    result = comfyui.run(graph)
    (text,) = result["outputs"]["5"]["text"]
    name = text.removeprefix("Saved as ")
    listed = comfyui.get("/object_info/LoraLoader")["LoraLoader"]["input"]["required"]["lora_name"][
        0
    ]
    assert name == "people/anna.safetensors"
    assert name in [n.replace("\\", "/") for n in listed]
    with safe_open(comfyui.base / "models/loras" / name, framework="pt") as file:
        # the best of its validations, which the seed decides
        assert file.metadata()["ss_steps"] in ("0", "3", "6")
        assert file.metadata()["ss_output_name"] == "anna"
        assert len(list(file.keys())) % 3 == 0
    graph["4"]["inputs"]["seed"] += 1
    assert comfyui.run(graph)["outputs"]["5"]["text"] == ["Saved as people/anna_2.safetensors"]


def test_the_lora_changes_the_picture(comfyui):
    graph = workflow("train_a_subject")
    graph["7"] = copy.deepcopy(graph["6"])
    graph["7"]["inputs"]["strength"] = 0.0
    outputs = comfyui.run(graph)["outputs"]
    with_lora, without = (list(pictures(comfyui, outputs[n])) for n in ("6", "7"))
    change = np.mean([np.abs(a - b).mean() for a, b in zip(with_lora, without, strict=True)])
    assert change > 5  # of 255; about 67 after 100 steps


def test_comfyuis_own_nodes_take_our_outputs(comfyui):
    graph = short()
    saver = next(n for n in ("SaveLoRA", "SaveLoRANode") if comfyui.get(f"/object_info/{n}"))
    graph["9"] = {"class_type": saver, "inputs": {"lora": ["4", 0], "prefix": "loras/core"}}
    graph["10"] = {
        "class_type": "LossGraphNode",
        "inputs": {"loss": ["4", 1], "filename_prefix": "loss"},
    }
    result = comfyui.run(graph)
    assert result["status"]["status_str"] == "success", result["status"]
    assert list((comfyui.base / "output/loras").glob("core*.safetensors"))


def test_unchanged_inputs_are_served_from_the_cache(comfyui):
    graph = short()
    comfyui.run(graph)
    messages = comfyui.run(graph)["status"]["messages"]
    cached = next(m[1]["nodes"] for m in messages if m[0] == "execution_cached")
    assert set(cached) == set(graph)


def test_what_nodes_show_is_their_own_in_other_graphs_too(comfyui):
    graph = short()
    comfyui.run(graph)
    others = json.loads(re.sub(r'"(\d)"', r'"1\1"', json.dumps(graph)))  # nodes 11, 12, ...
    outputs = comfyui.run(others)["outputs"]
    for output in outputs.values():
        for trace in map(json.loads, output.get("cntlora_shown", [])):
            assert others[trace["node"]]["class_type"] == trace["class"]
    assert {"13", "14"} <= {n for n, output in outputs.items() if "cntlora_shown" in output}


def test_changed_pictures_run_again_and_nothing_else(comfyui):
    folder = comfyui.base / "input/cat"
    folder.mkdir()
    for n in range(4):
        image = Image.new("RGB", (64, 64), "white")
        ImageDraw.Draw(image).ellipse((8 + n, 8, 50, 50 + n), fill="orange")
        image.save(folder / f"{n}.png")
    graph = short()
    graph["2"]["inputs"]["folder"] = "cat"
    comfyui.run(graph)
    Image.new("RGB", (64, 64), "orange").save(folder / "4.png")
    messages = comfyui.run(graph)["status"]["messages"]
    cached = next(m[1]["nodes"] for m in messages if m[0] == "execution_cached")
    assert "1" in cached
    assert not {"2", "3", "4"} & set(cached)


def test_cancel_keeps_the_work_and_the_next_prompt_runs(comfyui):
    graph = short(steps=5000, sample_every=0, validate_every=0)
    prompt_id = comfyui.queue(graph)["prompt_id"]
    until = time.monotonic() + 120
    while time.monotonic() < until:
        time.sleep(0.2)
        events = comfyui.events("4")
        steps = [e["step"] for e in events if e["type"] == "step" and events[0]["steps"] == 5000]
        if steps and steps[-1] >= 5 and comfyui.get("/queue")["queue_running"]:
            break
    comfyui.post("/interrupt", {})
    result = comfyui.result(prompt_id, 30)
    assert failure(result)["node_type"] == "CNTLoRATrain"
    events = comfyui.events("4")
    last = max(e["step"] for e in events if e["type"] == "step")
    assert last < 5000
    (saved,) = [e["path"] for e in events if e["type"] == "saved"]
    with safe_open(comfyui.base / "models" / saved, framework="pt") as file:
        assert file.metadata()["ss_steps"] == str(last)
    assert events[-1] | {"ok": False, "type": "end"} == events[-1]
    assert comfyui.run(short())["status"]["status_str"] == "success"


@pytest.mark.parametrize(
    ("node", "field", "value", "says"),
    [
        ("2", "folder", "../../etc", "is not a name inside"),
        ("2", "folder", "/etc", "is not a name inside"),
        ("2", "folder", "nowhere", "does not exist"),
        ("5", "name", "../escaped", "is not a name inside"),
        ("5", "name", "con", "is not a name inside"),
        ("1", "checkpoint", "../../secret.safetensors", "is not in models/checkpoints"),
    ],
)
def test_a_strangers_names_are_refused_before_the_run(comfyui, node, field, value, says):
    graph = workflow("train_a_subject")
    graph[node]["inputs"][field] = value
    if node == "5":  # an output of its own: ComfyUI would run the others
        graph = {k: graph[k] for k in ("1", "2", "3", "5", "4")}
    answer = comfyui.queue(graph)
    errors = answer["node_errors"][node]["errors"]
    assert says in " ".join(e["details"] for e in errors)
    if "prompt_id" in answer:
        comfyui.post("/interrupt", {})
        comfyui.result(answer["prompt_id"], 60)


def test_an_empty_folder_says_what_to_do(comfyui):
    (comfyui.base / "input/empty").mkdir()
    graph = workflow("train_a_subject")
    graph["2"]["inputs"]["folder"] = "empty"
    text = json.dumps(comfyui.queue(graph)["node_errors"])
    assert "No images in 'input/empty': found 0 of .png" in text
