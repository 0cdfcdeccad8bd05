"""The page itself, in a real browser: the template opens, the panel shows the run live, and again after a reload.

Needs playwright and a Chromium (CHROMIUM_PATH, or Debian's). Screenshots land in E2E_OUTPUT, when it is set.
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
        page.on("console", lambda m: page.errors.append(f"{m.text} {m.location}") if m.type == "error" else None)
        page.goto(comfyui.url)
        page.wait_for_function("() => window.app?.graph && window.app.extensionManager", timeout=90_000)
        page.wait_for_timeout(3000)
        yield page
        browser.close()


def open_example(page, name):
    graph = json.loads((EXAMPLES / f"{name}.json").read_text(encoding="utf-8"))
    page.evaluate("async (graph) => { await window.app.loadGraphData(graph) }", graph)
    page.wait_for_timeout(1500)


def shot(page, name):
    if os.environ.get("E2E_OUTPUT"):
        page.screenshot(path=str(Path(os.environ["E2E_OUTPUT"]) / f"{name}.png"))


@pytest.mark.parametrize("name", sorted(p.stem for p in EXAMPLES.glob("*.json")))
def test_every_template_opens_without_missing_nodes(page, name):
    open_example(page, name)
    assert page.evaluate("() => window.app.graph.nodes.filter((n) => n.has_errors).length") == 0
    assert page.get_by_text("Validation error").count() == 0
    shot(page, f"template_{name}")


def text(page, part):
    return page.evaluate(
        f"() => [...document.querySelectorAll('.cntlora-{part}')].map((e) => e.textContent).join(' | ')"
    )


def test_the_panel_lives_and_survives_a_reload(page, comfyui):
    open_example(page, "train_a_subject")
    page.evaluate(
        """(seed) => {
            const train = window.app.graph.nodes.find((n) => n.comfyClass === 'CNTLoRATrain');
            const set = (name, value) => { train.widgets.find((w) => w.name === name).value = value; };
            set('steps', 400); set('seed', seed); set('sample_every', 100);
            window.app.queuePrompt(0);
        }""",
        time.time_ns() % 2**31,
    )
    page.wait_for_function("() => document.querySelector('.cntlora-chart canvas')", timeout=60_000)
    page.wait_for_function(
        "() => /step [1-9]\\d\\d?\\/400/.test([...document.querySelectorAll('.cntlora-numbers')].map((e) => e.textContent).join())",
        timeout=120_000,
    )
    shot(page, "during")
    assert page.locator(".cntlora-sample").count() >= 1
    page.reload()
    page.wait_for_function("() => document.querySelector('.cntlora-chart canvas')", timeout=60_000)
    page.wait_for_timeout(1000)
    assert "/400" in text(page, "numbers")
    shot(page, "reloaded")
    page.wait_for_function(
        "() => [...document.querySelectorAll('.cntlora-headline')].every((e) => e.textContent === 'Done')",
        timeout=180_000,
    )
    assert page.locator(".cntlora-sample").count() == 6  # the rank map, and steps 0 to 400
    shot(page, "after")
    assert not [error for error in page.errors if "cntlora" in error]


def test_a_wrong_input_is_a_red_node_with_a_sentence(page):
    open_example(page, "train_a_subject")
    page.evaluate(
        """() => {
            const subject = window.app.graph.nodes.find((n) => n.comfyClass === 'CNTLoRASubjectImages');
            subject.widgets.find((w) => w.name === 'folder').value = '../../etc';
            window.app.queuePrompt(0);
        }"""
    )
    page.wait_for_function("() => Object.keys(window.app.lastNodeErrors ?? {}).length > 0", timeout=20_000)
    errors = page.evaluate("() => JSON.stringify(window.app.lastNodeErrors)")
    assert "is not a name inside 'input'" in errors
    shot(page, "red_node")
