"""What every node promises the person who drags it: a tooltip on each input, a help page, an
example, few inputs."""

import json
import os
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
IDS = [
    "LoadCheckpoint",
    "SubjectImages",
    "PriorImages",
    "Calibrate",
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


def test_graphs_made_before_an_input_existed_still_run(pack):
    """What came after the first release's inputs is optional: an API graph without it is not an
    error."""
    fields = {f.id: f for f in pack.SubjectImages.define_schema().inputs}
    for name in ("keep_shape", "flip", "random_crop", "masked", "images"):
        assert fields[name].options["optional"], name


def _table(schema):
    rows = ["| input | what it does |", "|---|---|"]
    for field in schema.inputs:
        rows.append(
            f"| `{field.id}`{' (advanced)' if field.advanced else ''} | {field.options['tooltip']} "
            "|"
        )
    rows += ["", "| output | what it is |", "|---|---|"]
    rows += [
        f"| `{field.options['display_name']}` | {field.options['tooltip']} |"
        for field in schema.outputs
    ]
    return "\n".join(rows) + "\n"


def test_the_help_page_lists_the_inputs_as_they_are(schema):
    page = ROOT / "web/docs" / f"{schema.node_id}.md"
    text = page.read_text(encoding="utf-8")
    written, _, table = text.partition("<!-- inputs -->\n")
    assert re.match(r"# .+\n\n\S.{80,}", written, re.S)
    if UPDATE:
        page.write_text(f"{written}<!-- inputs -->\n{_table(schema)}", encoding="utf-8")
        table = _table(schema)
    assert table == _table(schema)


def test_the_english_locale_says_what_the_schema_says(pack):
    def inputs(schema):
        return {f.id: {"name": f.id, "tooltip": f.options["tooltip"]} for f in schema.inputs}

    def outputs(schema):
        fields = enumerate(schema.outputs)
        return {
            str(i): {"name": f.options["display_name"], "tooltip": f.options["tooltip"]}
            for i, f in fields
        }

    expected = {
        s.node_id: {
            "display_name": s.display_name,
            "description": s.description,
            "inputs": inputs(s),
            "outputs": outputs(s),
        }
        for s in (node.define_schema() for node in pack.NODES)
    }
    path = ROOT / "locales/en/nodeDefs.json"
    if UPDATE:
        path.write_text(json.dumps(expected, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    assert json.loads(path.read_text(encoding="utf-8")) == expected
