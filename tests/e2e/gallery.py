"""Every template before, during and after a run, in both renderers, dark and light, to be looked
at.

    COMFYUI_PATH=... python tests/e2e/gallery.py FOLDER [TEMPLATE ...]    writes FOLDER/*.png, and
what the console says
"""

import os
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from graph_page import EXAMPLES, GraphPage, open_browser
from server import Server, running

SIZE = {"width": 1800, "height": 1000}  # px
PALETTES = ("light", "dark")
FIRST = "train_a_subject"  # makes the LoRA that others read
DURING = """() => [...document.querySelectorAll('.cntlora-numbers')].some((e) =>
    /steps\\/s|s\\/step/.test(e.textContent))"""
RENDERERS = os.environ.get("E2E_RENDERER", "canvas vue").split()


def shots(page: GraphPage, template: str, server: Server) -> None:
    page.open_example(template)
    page.fit()
    page.shot(f"{template}_1_before")
    known = set(server.get("/history"))
    page.run_again()
    working = wait(page, server, known, DURING)
    if working:
        page.shot(f"{template}_2_during")
        wait(page, server, known, "() => false")
    page.page.wait_for_timeout(2500)
    for palette in PALETTES:
        page.set("Comfy.ColorPalette", palette)
        page.page.wait_for_timeout(1000)
        page.shot(f"{template}_3_after_{palette}")


def wait(page: GraphPage, server: Server, known: set, condition: str, seconds: float = 500) -> bool:
    """Until the condition holds, True, or until the prompt is done."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        if page.evaluate(condition):
            return True
        if set(server.get("/history")) - known:
            return False
        page.page.wait_for_timeout(500)
    raise TimeoutError(page.texts("headline"))


def all_templates() -> list[str]:
    return sorted((p.stem for p in EXAMPLES.glob("*.json")), key=lambda name: (name != FIRST, name))


def main(folder: str, *templates: str) -> None:
    os.environ["E2E_OUTPUT"] = folder
    Path(folder).mkdir(parents=True, exist_ok=True)
    with running() as server, open_browser() as browser:
        for renderer in RENDERERS:
            page = GraphPage(browser, server, renderer)
            page.page.set_viewport_size(SIZE)
            page.set("Comfy.Minimap.Visible", False)
            for template in templates or all_templates():
                shots(page, template, server)
            said = Path(folder, f"{renderer}_console.txt")
            said.write_text("\n".join(page.said), encoding="utf-8")
            page.page.close()


if __name__ == "__main__":
    main(*sys.argv[1:])
