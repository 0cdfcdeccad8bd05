"""What every node promises the person who drags it: a tooltip on each input, a help page, an
example, few inputs."""

import json
import os
import re
from pathlib import Path

import pytest

from cntlora_core.config import CalibrationConfig, DataConfig, SampleConfig, TrainConfig
from cntlora_core.settings import settings_of

EXAMPLE = "example: cat faces (embedded)"
WIDGETS = {"COMBO", "STRING", "INT", "FLOAT", "BOOLEAN"}
ROOT = Path(__file__).resolve().parents[2]
IDS = [
    "LoadCheckpoint",
    "UseComfyUIModel",
    "SubjectImages",
    "PriorImages",
    "Calibrate",
    "ContinueLoRA",
    "Train",
    "TrainingSettings",
    "SaveLoRA",
    "PreviewLoRA",
]
UPDATE = bool(
    os.environ.get("UPDATE_NODE_TEXTS")
)  # `make node-texts`: write the texts below instead of checking them


@pytest.fixture(params=[f"CNTLoRA{name}" for name in IDS])
def schema(request, pack):
    return {s.node_id: s for s in (node.define_schema() for node in pack.NODES)}[request.param]


def test_all_nodes_are_here(pack):
    assert [n.define_schema().node_id for n in pack.NODES] == [f"CNTLoRA{name}" for name in IDS]


def test_what_a_node_shows_is_its_own(pack):
    """The cache would give it what another with the same inputs has shown, under that one's id."""
    for node in (pack.SubjectImages, pack.CalibrateLoRA, pack.TrainLoRA):
        assert node.define_schema().not_idempotent


def test_every_input_and_output_has_a_tooltip(schema):
    for field in [*schema.inputs, *schema.outputs]:
        assert len(field.options["tooltip"]) > 10, field.id
        assert field.options["tooltip"].endswith("."), field.id


def test_at_most_eight_inputs_are_visible_and_the_node_describes_itself(schema):
    assert len([f for f in schema.inputs if not f.advanced]) <= 8
    assert schema.category == "training/CNTLoRA"
    assert schema.description.endswith(".")


def test_every_node_is_in_an_example_in_both_forms(schema):
    examples = list((ROOT / "example_workflows").glob("*.json"))
    assert any(
        n["type"] == schema.node_id for e in examples for n in json.loads(e.read_text())["nodes"]
    )
    api = (ROOT / "tests/e2e/workflows").glob("*.json")
    assert any(
        n["class_type"] == schema.node_id for e in api for n in json.loads(e.read_text()).values()
    )


def test_the_examples_name_only_inputs_there_are(pack):
    fields = {
        s.node_id: {f.id for f in s.inputs} for s in (node.define_schema() for node in pack.NODES)
    }
    for example in (ROOT / "tests/e2e/workflows").glob("*.json"):
        for node in json.loads(example.read_text()).values():
            if node["class_type"] in fields:
                assert set(node["inputs"]) <= fields[node["class_type"]], example.name


def test_the_examples_values_stand_in_the_order_of_the_widgets(pack):
    """The page gives `widgets_values` out by place, required widgets first, then optional ones;
    what is missing at the end has its default."""
    schemas = {s.node_id: s for s in (node.define_schema() for node in pack.NODES)}
    for example in (ROOT / "example_workflows").glob("*.json"):
        for node in json.loads(example.read_text())["nodes"]:
            if node["type"] not in schemas:
                continue
            widgets = [
                f
                for f in schemas[node["type"]].inputs
                if f.io_type in WIDGETS and not f.options.get("force_input")
            ]
            widgets.sort(key=lambda f: bool(f.options.get("optional")))
            written = [i["name"] for i in node["inputs"] if "widget" in i]
            assert len(node["widgets_values"]) == len(written), (example.name, node["type"])
            assert written == [f.id for f in widgets[: len(written)]], (example.name, node["type"])
            left = widgets[len(written) :]
            assert all(f.options.get("optional") for f in left), (example.name, node["type"])


def test_the_two_forms_of_an_example_say_the_same(pack):
    """The workflow that the page opens and the graph that a script sends."""
    schemas = {s.node_id: s for s in (node.define_schema() for node in pack.NODES)}
    for graph in (ROOT / "tests/e2e/workflows").glob("*.json"):
        opened = json.loads((ROOT / "example_workflows" / graph.name).read_text())["nodes"]
        shown = {str(node["id"]): node for node in opened}
        for key, sent in json.loads(graph.read_text()).items():
            if sent["class_type"] not in schemas:
                continue
            names = [i["name"] for i in shown[key]["inputs"] if "widget" in i]
            values = dict(zip(names, shown[key]["widgets_values"], strict=True))
            fields = schemas[sent["class_type"]].inputs
            defaults = {f.id: f.options.get("default") for f in fields if f.id in values}
            assert values == {name: sent["inputs"].get(name, defaults[name]) for name in values}, (
                graph.name,
                key,
            )


@pytest.mark.parametrize(
    ("node", "config", "others"),
    [
        ("Calibrate", CalibrationConfig, ()),
        ("SubjectImages", DataConfig, ()),
        ("PreviewLoRA", SampleConfig, ()),
        ("Train", TrainConfig, ("TrainingSettings",)),
    ],
)
def test_every_setting_is_a_widget_once_with_the_same_text_and_default(pack, node, config, others):
    schemas = {s.node_id: s for s in (n.define_schema() for n in pack.NODES)}
    fields = [f for n in (node, *others) for f in schemas[f"CNTLoRA{n}"].inputs]
    for name, known in settings_of(config).items():
        (widget,) = [f for f in fields if f.id == name]
        assert widget.options["tooltip"] == known.text, name
        assert widget.options["default"] == ("auto" if known.auto else known.default), name
        assert tuple(widget.options.get("options", ())) == known.choices, name
        if widget.io_type in ("INT", "FLOAT"):
            range_ = (widget.options["min"], widget.options["max"])
            assert range_ == (known.low, known.high), name
        # a graph made before the setting existed still runs, with its default
        assert widget.options["optional"], name


@pytest.mark.parametrize(
    ("node", "values", "says"),
    [
        ("TrainLoRA", {"steps": "many"}, "steps is 'many': it must be"),
        ("TrainLoRA", {"learning_rate": "-1"}, "learning_rate is -1.0: it must be"),
        ("SubjectImages", {"folder": EXAMPLE, "resolution": "big"}, "resolution is 'big'"),
        ("PriorImages", {"class_prompt": "x", "resolution": "8"}, "resolution is 8"),
    ],
)
def test_a_text_that_is_no_number_is_refused_before_the_run(pack, node, values, says):
    assert says in getattr(pack, node).validate_inputs(**values)


def test_the_prior_says_that_it_reaches_beyond_the_calibration(pack):
    """What calibration preserves, training goes on to preserve."""
    prior, _ = pack.PriorImages.define_schema().outputs
    assert "the training after it" in prior.options["tooltip"]


@pytest.mark.parametrize("value", ["auto", "128", 0, 128, 128.0, None])
def test_an_automatic_setting_takes_a_number_a_text_or_a_wire(pack, value):
    assert pack.TrainLoRA.validate_inputs(steps=value, learning_rate="auto") is True
    assert pack.SubjectImages.validate_inputs(folder=EXAMPLE, resolution=value) is True


def _list(schema):
    """A list, not a table: the page shows help in a narrow column."""
    inputs = [
        f"- **{f.id}**{' (advanced)' if f.advanced else ''}: {f.options['tooltip']}"
        for f in schema.inputs
    ]
    outputs = [f"- **{f.options['display_name']}**: {f.options['tooltip']}" for f in schema.outputs]
    return "\n".join(["## Inputs", "", *inputs, "", "## Outputs", "", *outputs]) + "\n"


def test_the_help_page_lists_the_inputs_as_they_are(schema):
    page = ROOT / "web/docs" / f"{schema.node_id}.md"
    text = page.read_text(encoding="utf-8")
    written, _, table = text.partition("<!-- inputs -->\n")
    assert re.match(r"# .+\n\n\S.{80,}", written, re.S)
    if UPDATE:
        page.write_text(f"{written}<!-- inputs -->\n{_list(schema)}", encoding="utf-8")
        table = _list(schema)
        _english(page).parent.mkdir(exist_ok=True)
        _english(page).write_text(page.read_text(encoding="utf-8"), encoding="utf-8")
    assert table == _list(schema)
    # The page asks for its language first; other languages fall back to the file without one.
    assert _english(page).read_text(encoding="utf-8") == page.read_text(encoding="utf-8")


def _english(page):
    return page.with_suffix("") / "en.md"
