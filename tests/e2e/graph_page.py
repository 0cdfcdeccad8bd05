"""ComfyUI's page in a browser, with the few things that the tests do there."""

from __future__ import annotations

import json
import os
import shutil
import time
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType

EXAMPLES = Path(__file__).resolve().parents[2] / "example_workflows"
READY = "() => window.app?.graph && window.app.extensionManager"
# Widgets of nodes set by class and name; from a `seed` on, those nodes get seeds of their own.
SET = """([settings, seed]) => {
    const graphs = [window.app.graph, ...(window.app.graph.subgraphs?.values() ?? [])];
    for (const node of graphs.flatMap((graph) => graph.nodes)) {
        const own = seed === null ? {} : { seed: seed++ };
        const set = { ...own, ...settings[node.comfyClass] };
        for (const widget of settings[node.comfyClass] ? node.widgets : []) {
            if (widget.name in set) widget.value = set[widget.name];
        }
    }
}"""
TEXTS = "(part) => [...document.querySelectorAll(`.cntlora-${part}`)].map((e) => e.textContent)"


def chromium_path() -> str | None:
    return os.environ.get("CHROMIUM_PATH") or shutil.which("chromium")


@contextmanager
def open_browser():
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium_path(), args=["--no-sandbox"])
        yield browser
        browser.close()


class GraphPage:
    """`said`: what the page wrote into its console since the test began."""

    TEXTS = TEXTS

    def __init__(self, browser, comfyui, renderer: str) -> None:
        self.comfyui, self.renderer, self.said = comfyui, renderer, []
        comfyui.post("/settings/Comfy.TutorialCompleted", True)  # or templates lie over the graph
        comfyui.post("/settings/Comfy.VueNodes.Enabled", renderer == "vue")
        self.page = browser.new_page(viewport={"width": 1440, "height": 900}, locale="en-US")
        self.page.set_default_timeout(120_000)  # a busy machine draws slowly
        self.page.on("console", lambda m: self.said.append(f"{m.type}: {m.text} {m.location}"))
        self.page.on("pageerror", lambda error: self.said.append(f"error: {error.stack}"))
        self.page.goto(comfyui.url)
        self._ready()

    def _ready(self) -> None:
        self.page.wait_for_function(READY, timeout=120_000)
        self.page.wait_for_timeout(3000)

    @property
    def has_renderer(self) -> bool:
        return self.evaluate("() => !!window.LiteGraph.vueNodesMode") == (self.renderer == "vue")

    @property
    def draws_panels(self) -> bool:
        """The first Vue nodes, a hidden experiment, drew no element of any node: core's own notes
        are empty there."""
        return self.renderer == "canvas" or self.frontend >= (1, 29, 1)

    @property
    def frontend(self) -> tuple[int, ...]:
        version = self.evaluate("() => window.__COMFYUI_FRONTEND_VERSION__")
        return tuple(int(part) for part in version.split("."))

    def reload(self) -> None:
        self.page.reload()
        self._ready()

    def evaluate(self, script: str, value=None):
        return self.page.evaluate(script, value)

    def open_example(self, name: str) -> None:
        self.open_graph(json.loads((EXAMPLES / f"{name}.json").read_text(encoding="utf-8")))

    def open_graph(self, graph: dict) -> None:
        self.evaluate("async (graph) => { await window.app.loadGraphData(graph) }", graph)
        self.page.wait_for_timeout(1500)

    def graph(self) -> dict:
        # As text: the page's undefined would come as null, which it takes for a broken graph.
        return json.loads(self.evaluate("() => JSON.stringify(window.app.graph.serialize())"))

    def folded(self) -> list[str]:
        """Widgets of the graph that are folded away under Advanced."""
        return self.evaluate(
            """() => window.app.graph.nodes.flatMap((node) => node.widgets ?? [])
                .filter((widget) => widget.advanced).map((widget) => widget.name)"""
        )

    def run(self, **values) -> None:
        """Press Run with Calibrate and Train set to `values`."""
        self.shorten(**values)
        self.run_again()

    def shorten(self, preview=MappingProxyType({"count": 2, "steps": 6}), **values) -> None:
        """Calibrate and Train set to `values`, a short preview, nothing that a cache knows."""
        ours = dict.fromkeys(("CNTLoRACalibrate", "CNTLoRATrain"), values)
        settings = {**ours, "CNTLoRAPreviewLoRA": dict(preview)}
        self.set_widgets(settings, time.time_ns() % 2**31)

    def set_widgets(self, settings: dict[str, dict], seed: int | None = None) -> None:
        """Those of the nodes of each class."""
        self.evaluate(SET, [settings, seed])

    def run_again(self) -> None:
        self.evaluate("() => { window.app.queuePrompt(0) }")

    def wait_until_idle(self) -> None:
        """Until the host has run all that it was asked for: previews are drawn last."""
        while self.comfyui.get("/queue")["queue_running"]:
            self.page.wait_for_timeout(500)

    def texts(self, part: str) -> list[str]:
        return self.evaluate(TEXTS, part)

    def wait_for(self, part: str, pattern: str, seconds: float = 90) -> None:
        """Until every such text of the panels fits, one at least."""
        self.page.wait_for_function(
            f"""([part, pattern]) => {{
                const found = ({TEXTS})(part);
                return found.length > 0 && found.every((text) => new RegExp(pattern).test(text));
            }}""",
            arg=[part, pattern],
            timeout=seconds * 1000,
        )

    def set(self, setting: str, value) -> None:
        """One of ComfyUI's settings, as its dialog does."""
        self.evaluate(
            "async ([id, value]) => { await window.app.extensionManager.setting.set(id, value) }",
            [setting, value],
        )
        self.page.wait_for_timeout(500)

    def fit(self) -> None:
        """The whole graph in sight."""
        self.evaluate("() => window.app.extensionManager.command.execute('Comfy.Canvas.FitView')")
        self.page.wait_for_timeout(1000)

    def shot(self, name: str) -> None:
        """A screenshot, where E2E_OUTPUT names a folder."""
        if os.environ.get("E2E_OUTPUT"):
            folder = Path(os.environ["E2E_OUTPUT"])
            self.page.screenshot(path=str(folder / f"{self.renderer}_{name}.png"))
