"""The templates as an artist opens them: a note, groups, room for what a run shows, and the values
that the nodes expect."""

import json
from itertools import combinations
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
TEMPLATES = sorted((ROOT / "example_workflows").glob("*.json"))
API = ROOT / "tests/e2e/workflows"
BLUEPRINT = ROOT / "subgraphs/Train a LoRA.json"

# Folded, after a run, in the renderer that needs more (px): panels, words, pictures.
SHOWN = {
    "CNTLoRACalibrate": (380, 440),
    "CNTLoRATrain": (420, 560),
    "CNTLoRASubjectImages": (320, 600),
    "CNTLoRAPreviewLoRA": (320, 430),
    "CNTLoRASaveLoRA": (270, 190),
}
HEAD = 30  # a node's title lies above its position
SMALLEST_ZOOM = 8 / 14  # below, the canvas draws no text
# ComfyUI fits a template that it opens into three quarters of the page, the groups and all.
FITTED = 0.75 * 1920, 0.75 * 1080

of_every_template = pytest.mark.parametrize("path", TEMPLATES, ids=lambda p: p.stem)


def nodes_of(path):
    return json.loads(path.read_text(encoding="utf-8"))["nodes"]


@of_every_template
def test_a_note_says_what_to_change_and_groups_say_what_belongs_together(path):
    template = json.loads(path.read_text(encoding="utf-8"))
    (note,) = [n for n in template["nodes"] if n["type"] == "MarkdownNote"]
    assert note["widgets_values"][0].startswith("# ")
    assert len(template["groups"]) >= 3
    assert template["extra"]["ds"]["scale"] >= SMALLEST_ZOOM


@of_every_template
def test_a_page_of_usual_size_shows_the_words_of_all_nodes(path):
    template = json.loads(path.read_text(encoding="utf-8"))
    boxes = [group["bounding"] for group in template["groups"]]
    boxes += [[*node["pos"], *node["size"]] for node in template["nodes"]]
    for axis, room in enumerate(FITTED):
        first = min(box[axis] for box in boxes)
        last = max(box[axis] + box[axis + 2] for box in boxes)
        assert (last - first) * SMALLEST_ZOOM <= room


@of_every_template
def test_nodes_have_room_for_what_a_run_shows(path):
    nodes = nodes_of(path)
    for node in nodes:
        width, height = SHOWN.get(node["type"], (0, 0))
        assert node["size"][0] >= width, node["id"]
        assert node["size"][1] >= height, node["id"]
    for a, b in combinations(nodes, 2):
        apart = [
            a["pos"][i] + a["size"][i] + gap <= b["pos"][i]
            or b["pos"][i] + b["size"][i] + gap <= a["pos"][i]
            for i, gap in ((0, 0), (1, HEAD))
        ]
        assert any(apart), (a["type"], b["type"])


@of_every_template
def test_the_api_form_says_the_same(path):
    """Every widget has its value, in order, and every link its source."""
    api_path = API / path.name
    if not api_path.exists():
        assert not any(n["type"].startswith("CNTLoRA") for n in nodes_of(path))
        return
    api = json.loads(api_path.read_text(encoding="utf-8"))
    template = json.loads(path.read_text(encoding="utf-8"))
    links = {link[0]: [str(link[1]), link[2]] for link in template["links"]}
    for node in template["nodes"]:
        if node["type"] == "MarkdownNote":
            continue
        same = api[str(node["id"])]
        assert same["class_type"] == node["type"]
        widgets = [slot["name"] for slot in node["inputs"] if "widget" in slot]
        values = dict(zip(widgets, node["widgets_values"], strict=True))
        linked = {s["name"]: links[s["link"]] for s in node["inputs"] if s["link"] is not None}
        assert same["inputs"] == values | linked


TYPES = {"LORAMODEL": "LORA_MODEL"}


def check_inputs(nodes, pack):
    schemas = {s.node_id: s for s in (node.define_schema() for node in pack.NODES)}
    for node in nodes:
        if node["type"] not in schemas:
            continue
        fields = schemas[node["type"]].inputs
        fields = sorted(fields, key=lambda f: bool(f.options.get("optional")))  # as the host does
        assert [slot["name"] for slot in node["inputs"]] == [f.id for f in fields], node["type"]
        for slot, field in zip(node["inputs"], fields, strict=True):
            kind = field.io_type.upper()
            kind = TYPES.get(kind, kind)
            assert kind in slot["type"].split(","), (node["type"], slot["name"])


@of_every_template
def test_the_widgets_are_the_schemas_in_its_order(path, pack):
    check_inputs(nodes_of(path), pack)


def test_the_blueprint_takes_a_model_and_words_and_gives_a_lora(pack):
    """One node for the graph of the first template, in ComfyUI's list of blueprints."""
    blueprint = json.loads(BLUEPRINT.read_text(encoding="utf-8"))
    ((node,), (inner,)) = blueprint["nodes"], blueprint["definitions"]["subgraphs"]
    assert node["type"] == inner["id"]
    assert inner["name"] == BLUEPRINT.stem
    check_inputs(inner["nodes"], pack)
    for outer in (node, inner):
        names = [slot["name"] for slot in outer["inputs"]]
        assert names == ["sd_model", "folder", "trigger", "class_name"]
        assert [slot["name"] for slot in outer["outputs"]] == ["lora", "samples"]
    template = {n["id"]: n for n in nodes_of(ROOT / "example_workflows/train_a_subject.json")}
    for same in inner["nodes"]:
        assert same["widgets_values"] == template[same["id"]]["widgets_values"]


def test_the_first_template_alone_is_an_app_too():
    """The form asks for what the note says to change, and its outputs are pictures."""
    template = json.loads((ROOT / "example_workflows/train_a_subject.json").read_text("utf-8"))
    nodes = {n["id"]: n for n in template["nodes"]}
    form = template["extra"]["linearData"]
    asked = [name for _, name, _ in form["inputs"]]
    assert asked == ["checkpoint", "folder", "trigger", "class_name", "name"]
    for node, name, shown in form["inputs"]:
        assert shown["description"]
        assert name in [slot["name"] for slot in nodes[node]["inputs"] if "widget" in slot]
    assert [nodes[node]["type"] for node in form["outputs"]] == ["CNTLoRAPreviewLoRA"]
    assert template["extra"]["linearMode"] is False  # it opens as a graph
    others = [path for path in TEMPLATES if path.stem != "train_a_subject"]
    assert not any("linearData" in json.loads(p.read_text("utf-8"))["extra"] for p in others)


@of_every_template
def test_the_first_template_validates_on_nothing_foreign(path):
    """An own folder must not be measured by the example's pictures."""
    folders = [n for n in nodes_of(path) if n["type"] == "CNTLoRASubjectImages"]
    if path.stem == "compare_starts":
        assert [n.get("title") for n in folders] == [None, "Pictures to validate with"]
    elif path.stem == "two_concepts":
        assert [n.get("title") for n in folders] == ["One subject", "And another"]
    else:
        assert len(folders) <= 1
