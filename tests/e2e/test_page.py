"""The page itself, in a real browser: the template opens, the panel shows the run live, and again
after a reload.

Needs playwright and a Chromium (CHROMIUM_PATH, or Debian's). Screenshots land in E2E_OUTPUT, when
it is set. E2E_RENDERER=vue runs everything in the Vue renderer (frontend 1.35 or later), otherwise
it is the canvas.
"""

import json
import os
import shutil
import time
from pathlib import Path

import pytest

pytestmark = pytest.mark.comfyui
EXAMPLES = Path(__file__).resolve().parents[2] / "example_workflows"


@pytest.fixture
def page(comfyui):
    sync_api = pytest.importorskip("playwright.sync_api")
    chromium = os.environ.get("CHROMIUM_PATH") or shutil.which("chromium")
    if not chromium:
        pytest.skip("no Chromium: set CHROMIUM_PATH")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1440, "height": 900}, locale="en-US")
        page.errors = []
        page.on(
            "console",
            lambda m: page.errors.append(f"{m.text} {m.location}") if m.type == "error" else None,
        )
        comfyui.post(
            "/settings/Comfy.TutorialCompleted", True
        )  # else the template browser lies over the graph
        comfyui.post("/settings/Comfy.VueNodes.Enabled", os.environ.get("E2E_RENDERER") == "vue")
        page.goto(comfyui.url)
        page.wait_for_function(
            "() => window.app?.graph && window.app.extensionManager", timeout=90_000
        )
        page.wait_for_timeout(3000)
        yield page
        browser.close()


def open_example(page, name):
    open_graph(page, json.loads((EXAMPLES / f"{name}.json").read_text(encoding="utf-8")))


def open_graph(page, graph):
    page.evaluate("async (graph) => { await window.app.loadGraphData(graph) }", graph)
    page.wait_for_timeout(1500)


def shot(page, name):
    if os.environ.get("E2E_OUTPUT"):
        page.screenshot(path=str(Path(os.environ["E2E_OUTPUT"]) / f"{name}.png"))


@pytest.mark.parametrize("name", sorted(p.stem for p in EXAMPLES.glob("*.json")))
def test_every_template_opens_without_missing_nodes(page, name):
    open_example(page, name)
    # A host may mark core's loaders, whose files are not here.
    wrong = page.evaluate(
        """() => window.app.graph.nodes.filter((n) => !LiteGraph.registered_node_types[n.type]
            || (n.has_errors && n.type.startsWith('CNTLoRA'))).map((n) => n.type)"""
    )
    assert wrong == []
    assert page.get_by_text("Validation error").count() == 0
    shot(page, f"template_{name}")


def text(page, part):
    return page.evaluate(
        f"() => [...document.querySelectorAll('.cntlora-{part}')].map((e) => e.textContent).join(' "
        "| ')"
    )


def queue(page, **values):
    """Press Run, every train node set to `values`, and all with seeds of their own, so that no
    cache answers."""
    page.evaluate(
        """([values, seed]) => {
            const all = [window.app.graph, ...(window.app.graph.subgraphs?.values() ??
            [])].flatMap((g) => g.nodes); for (const node of all.filter((n) => ['CNTLoRATrain',
            'CNTLoRACalibrate'].includes(n.comfyClass))) {
                const settings = { seed: seed++, ...(node.comfyClass === 'CNTLoRATrain' ? values :
                {}) }; for (const w of node.widgets) if (w.name in settings) w.value =
                settings[w.name];
            }
            window.app.queuePrompt(0);
        }""",
        [values, time.time_ns() % 2**31],
    )


def wait_for(page, part, pattern, seconds=60):
    """Until every such text of the panels fits."""
    page.wait_for_function(
        """([part, pattern]) => {
            const found = [...document.querySelectorAll(`.cntlora-${part}`)].map((e) =>
            e.textContent); return found.length > 0 && found.every((text) => new
            RegExp(pattern).test(text));
        }""",
        arg=[part, pattern],
        timeout=seconds * 1000,
    )


PANEL_HEIGHTS = """() => [...document.querySelectorAll('.cntlora-panel')].map((e) =>
    Math.round(e.getBoundingClientRect().height))"""
SHORT = {"steps": 8, "sample_every": 4, "validate_every": 4}


def test_the_panel_lives_and_survives_a_reload(page):
    open_example(page, "train_a_subject")
    shot(page, "before")
    queue(page, steps=400, sample_every=100)
    page.wait_for_function("() => document.querySelector('.cntlora-chart canvas')", timeout=60_000)
    page.wait_for_function(
        "() => /step "
        "[1-9]\\d\\d?\\/400/.test([...document.querySelectorAll('.cntlora-numbers')].map((e) => "
        "e.textContent).join())",
        timeout=120_000,
    )
    shot(page, "during")
    assert page.locator(".cntlora-sample").count() >= 1
    page.reload()
    page.wait_for_function("() => document.querySelector('.cntlora-chart canvas')", timeout=60_000)
    page.wait_for_timeout(1000)
    assert "/400" in text(page, "numbers")
    shot(page, "reloaded")
    wait_for(page, "headline", "^Done$", 180)
    steps = page.evaluate(
        "() => [...document.querySelectorAll('.cntlora-sample')].map((e) => +e.dataset.step)"
    )
    assert steps == sorted({*steps, 0, 100, 200, 300, 400})  # and those of the best weights
    assert page.locator(".cntlora-kept").count() == 1
    assert page.locator(".cntlora-map tbody tr").count() == 7
    page.wait_for_timeout(500)
    shot(page, "after")
    page.locator(".cntlora-sample").first.evaluate("(button) => button.click()")
    assert page.locator("dialog.cntlora-dialog img").get_attribute("alt") == "Samples at step 0"
    page.keyboard.press("Escape")
    page.wait_for_function("() => !document.querySelector('dialog.cntlora-dialog')", timeout=5000)
    assert not [error for error in page.errors if "cntlora" in error]


def test_two_train_nodes_each_show_their_own_run(page):
    open_example(page, "compare_starts")
    queue(page, **SHORT)
    wait_for(page, "headline", "^Done$")
    trained = page.evaluate(
        """() => [...document.querySelectorAll('.cntlora-panel')].filter((p) =>
        p.querySelector('.cntlora-chart'))
                 .map((p) => p.querySelector('.cntlora-numbers').textContent)"""
    )
    assert len(trained) == 2
    assert all("step 8/8" in numbers for numbers in trained)
    assert (
        trained[0] != trained[1]
    )  # the ordinary start's losses are others than the calibrated start's
    shot(page, "two_runs")


def test_another_tab_with_the_same_node_ids_does_not_show_this_run(page):
    open_example(page, "train_a_subject")
    queue(page, **SHORT)
    wait_for(page, "headline", "^Done$")
    first = page.evaluate("() => window.app.graph.serialize()")
    open_example(page, "train_a_subject")
    wait_for(page, "headline", "^Press Run", 10)
    page.evaluate("async (graph) => { await window.app.loadGraphData(graph) }", first)
    wait_for(page, "headline", "^Done$", 10)


def test_the_panel_in_a_subgraph(page):
    open_example(page, "train_a_subject")
    page.evaluate(
        """() => {
            const chosen = window.app.graph.nodes.filter((n) => ['CNTLoRATrain',
            'CNTLoRACalibrate'].includes(n.comfyClass)); const { node } =
            window.app.graph.convertToSubgraph(new Set(chosen));
            setTimeout(() => window.app.canvas.openSubgraph(node.subgraph, node), 100);
        }"""
    )
    page.wait_for_timeout(1000)
    queue(page, **SHORT)
    wait_for(page, "headline", "^Done$")
    assert "step 8/8" in text(page, "numbers")
    page.wait_for_timeout(500)
    shot(page, "subgraph")


def test_what_the_cache_gives_is_shown_with_its_words(page):
    open_example(page, "train_a_subject")
    queue(page, **SHORT)
    wait_for(page, "headline", "^Done$")
    graph = page.evaluate("() => { const { id, ...g } = window.app.graph.serialize(); return g }")
    open_graph(page, graph)
    wait_for(page, "headline", "^Press Run", 10)
    page.evaluate("() => window.app.queuePrompt(0)")
    wait_for(page, "headline", "^Done$", 20)
    assert page.locator(".cntlora-sample").count() >= 3
    assert "6 pictures, shorter sides 64-64 px. Prompt: 'a sks cat face emoji'" in text(
        page, "text"
    )
    assert "Saved as my_subject" in text(page, "text")
    shot(page, "cached")


def test_samples_are_shown_in_one_place(page):
    open_example(page, "train_a_subject")
    queue(page, **SHORT)
    wait_for(page, "headline", "^Done$")
    page.wait_for_timeout(500)
    outside = page.evaluate(
        """() => {
            const train = window.app.graph.nodes.find((n) => n.comfyClass === 'CNTLoRATrain');
            const vue = document.querySelector(`[data-node-id="${train.id}"]`);
            const images = [...(vue?.querySelectorAll('img') ?? [])];
            return (train.imgs ?? []).length
                + images.filter((image) => !image.closest('.cntlora-panel')).length;
        }"""
    )
    assert outside == 0


def test_the_properties_panel_leaves_the_panel_in_its_node(page):
    open_example(page, "train_a_subject")
    before = page.evaluate(PANEL_HEIGHTS)
    toggle = page.get_by_role("button", name="Toggle properties panel")
    if not toggle.count():
        pytest.skip("this frontend has no properties panel")
    toggle.first.click()
    for kind in ("CNTLoRATrain", "CNTLoRACalibrate"):
        page.evaluate(
            """(kind) => {
                const node = window.app.graph.nodes.find((n) => n.comfyClass === kind);
                window.app.canvas.selectItems([node]);
            }""",
            kind,
        )
        page.wait_for_timeout(700)
    page.evaluate("() => window.app.canvas.deselectAll()")
    page.wait_for_timeout(700)
    assert page.evaluate(PANEL_HEIGHTS) == before


def test_the_panel_can_be_read_in_the_light_theme(page):
    page.evaluate(
        "async () => window.app.extensionManager.setting.set('Comfy.ColorPalette', 'light')"
    )
    try:
        open_example(page, "train_a_subject")
        queue(page, **SHORT)
        wait_for(page, "headline", "^Done$")
        page.wait_for_timeout(500)
        shot(page, "light")
        ratio = page.evaluate(
            """() => {
                const light = (color) => {
                    const parts = color.match(/[\\d.]+/g).slice(0, 3).map((v) => v / 255);
                    return 0.05 + parts.map((v) => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055)
                    ** 2.4)
                        .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
                };
                const behind = (e) => {
                    const color = getComputedStyle(e).backgroundColor;
                    return /, 0\\)$/.test(color) && e.parentElement ? behind(e.parentElement) :
                    color;
                };
                const text = document.querySelector('.cntlora-headline');
                const [a, b] = [light(getComputedStyle(text).color), light(behind(text))];
                return Math.max(a, b) / Math.min(a, b);
            }"""
        )
        assert ratio >= 4.5  # WCAG AA
    finally:
        page.evaluate(
            "async () => window.app.extensionManager.setting.set('Comfy.ColorPalette', 'dark')"
        )


def test_a_wrong_input_is_a_red_node_with_a_sentence(page):
    open_example(page, "train_a_subject")
    page.evaluate(
        """() => {
            const subject = window.app.graph.nodes.find((n) => n.comfyClass ===
            'CNTLoRASubjectImages'); subject.widgets.find((w) => w.name === 'folder').value =
            '../../etc'; window.app.queuePrompt(0);
        }"""
    )
    page.wait_for_function(
        "() => Object.keys(window.app.lastNodeErrors ?? {}).length > 0", timeout=20_000
    )
    errors = page.evaluate("() => JSON.stringify(window.app.lastNodeErrors)")
    assert "is not a name inside 'input'" in errors
    said = "is not a name inside 'input'"
    page.wait_for_function(
        "(said) => document.querySelector('.cntlora-text.cntlora-failed')?.innerText.match(said)",
        arg=said,
        timeout=10_000,
    )
    page.wait_for_function(  # and beside the graph
        """(said) => [...document.querySelectorAll('body *')].some((e) => !e.children.length
            && !e.closest('.cntlora-panel') && e.textContent.includes(said))""",
        arg=said,
        timeout=10_000,
    )
    shot(page, "red_node")
