"""The short ways in: a blueprint of one node, and the app form of the first template."""

import pytest

pytestmark = [pytest.mark.comfyui, pytest.mark.usefixtures("panels")]
# The graph that the blueprint stands for: a model in, a LoRA out to Save LoRA.
AROUND = """async (id) => {
    const { graph } = window.app;
    const blueprint = graph.nodes.find((n) => n.subgraph);
    const add = (type) => {
        const node = LiteGraph.createNode(type);
        graph.add(node);
        return node;
    };
    const [model, save] = [add('CNTLoRALoadCheckpoint'), add('CNTLoRASaveLoRA')];
    const [x, y] = blueprint.pos;
    model.pos = [x - 400, y];
    save.pos = [x + blueprint.size[0] + 60, y];
    model.connect(0, blueprint, blueprint.findInputSlot('sd_model'));
    blueprint.connect(blueprint.findOutputSlot('lora'), save, save.findInputSlot('lora'));
    model.widgets.find((w) => w.name === 'checkpoint').value = 'mini-sd (embedded)';
}"""


def test_the_blueprint_trains(page, comfyui):
    try:
        blueprints = comfyui.get("/global_subgraphs")
    except OSError:
        pytest.skip("this host has no blueprints")
    (found,) = [b for b in blueprints.values() if b["name"] == "Train a LoRA"]
    assert found["info"]["node_pack"].endswith("CNTLoRA")
    page.evaluate("() => window.app.extensionManager.command.execute('Comfy.NewBlankWorkflow')")
    page.page.wait_for_timeout(1500)
    page.page.mouse.dblclick(760, 560)
    page.page.wait_for_timeout(1000)
    page.page.keyboard.type("Train a LoRA", delay=20)
    page.page.wait_for_timeout(1500)
    page.shot("blueprint_search")
    page.page.keyboard.press("Enter")
    page.page.wait_for_timeout(500)
    page.page.mouse.click(560, 300)  # where newer frontends let the new node down
    page.page.wait_for_function("() => window.app.graph.nodes.some((n) => n.subgraph)")
    page.evaluate(AROUND)
    page.fit()
    page.run(steps=8, sample_every=8, validate_every=4, effort="quick")
    page.wait_for("text", "^Saved as my_subject|^6 pictures", 240)
    page.shot("blueprint")


def running(comfyui):
    return [item[1] for items in comfyui.get("/queue").values() for item in items]


def test_the_app_form_trains(page, comfyui):
    page.open_example("train_a_subject")
    command = "(id) => window.app.extensionManager.command.commands.some((c) => c.id === id)"
    if page.frontend < (1, 36) or not page.evaluate(command, "Comfy.ToggleLinear"):
        pytest.skip("this frontend has no apps, or none with a form")
    page.evaluate("() => window.app.extensionManager.command.execute('Comfy.ToggleLinear')")
    try:
        page.page.wait_for_timeout(1500)
        tour = page.page.get_by_role("button", name="Skip")
        if tour.count():  # the host's own, once
            tour.first.click()
        form = page.page.get_by_test_id("linear-widgets")
        for name in ("checkpoint", "folder", "trigger", "class_name", "name"):
            assert form.get_by_text(name, exact=True).count() >= 1, name
        page.shot("app_form")
        page.shorten(steps=8, sample_every=8, effort="quick")
        known = set(comfyui.get("/history"))
        run = page.page.get_by_test_id("linear-run-button").get_by_role("button", name="Run")
        run.last.click()
        page.page.wait_for_timeout(2000)
        (prompt,) = {*comfyui.get("/history"), *running(comfyui)} - known
        outputs = comfyui.result(prompt)["outputs"]
        (drawn, *_) = outputs["6"]["images"]
        # Vue nodes have it too, behind the form.
        page.page.locator(f"img[src*='{drawn['filename']}']:visible").first.wait_for()
        page.page.wait_for_timeout(1000)
        page.shot("app_done")
    finally:
        page.evaluate("() => window.app.extensionManager.command.execute('Comfy.ToggleLinear')")
        page.page.wait_for_timeout(1000)
