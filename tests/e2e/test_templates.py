"""The templates open in the page as they are meant."""

from pathlib import Path

import pytest

pytestmark = pytest.mark.comfyui
ROOT = Path(__file__).resolve().parents[2]
TEMPLATES = sorted(p.stem for p in (ROOT / "example_workflows").glob("*.json"))


@pytest.mark.parametrize("name", TEMPLATES)
def test_every_template_opens_without_missing_nodes(page, name):
    page.open_example(name)
    # A host may mark nodes whose files are not here: core's loaders and Continue LoRA.
    wrong = page.evaluate(
        """() => window.app.graph.nodes.filter((n) => !LiteGraph.registered_node_types[n.type]
            || (n.has_errors && /^CNTLoRA(?!Continue)/.test(n.type))).map((n) => n.type)"""
    )
    assert wrong == []
    assert page.page.get_by_text("Validation error").count() == 0
    if name not in ("use_the_lora", "with_comfyui_model"):
        assert {"vae", "hold_out"} <= set(page.folded())
    page.shot(f"template_{name}")
