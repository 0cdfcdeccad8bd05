"""The README's pictures of the graph: a run of the first template as a moving picture, and the
graph after it, from screenshots of the page.

    COMFYUI_PATH=... python tests/e2e/film.py    writes docs/images/run.webp and graph.png
"""

import io
import sys
import time
from pathlib import Path

from PIL import Image

sys.path.insert(0, str(Path(__file__).parent))
from graph_page import GraphPage, open_browser
from server import running

IMAGES = Path(__file__).resolve().parents[2] / "docs/images"
SETTINGS = {"steps": "40", "sample_every": 10}
FRAMES, FRAME_MS, LAST_MS = 40, 300, 3000
WIDTH, QUALITY = 900, 55  # px; of WebP
LARGEST = 1_500_000  # bytes
# Zoom and offset at which both panels fill the screen, and at which the whole graph does.
PANELS, WHOLE = (0.95, [-541, 3]), (0.88, [75, 63])
LOOK_AT = """([scale, offset]) => {
    const { ds } = window.app.canvas;
    Object.assign(ds, { scale, offset });
    window.app.canvas.setDirty(true, true);
}"""
SET = """(settings) => {
    const train = window.app.graph.nodes.find((n) => n.comfyClass === 'CNTLoRATrain');
    for (const widget of train.widgets) {
        if (widget.name in settings) widget.value = settings[widget.name];
    }
}"""
DONE = """() => [...document.querySelectorAll('.cntlora-headline')].every((e) =>
    e.textContent === 'Done')"""


def screenshot(page) -> Image.Image:
    return Image.open(io.BytesIO(page.page.screenshot())).convert("RGB")


def look_at(page, view, size) -> None:
    page.page.set_viewport_size({"width": size[0], "height": size[1]})
    page.evaluate(LOOK_AT, list(view))
    page.page.wait_for_timeout(1500)


def film(page) -> list[Image.Image]:
    """A screenshot whenever the panels say something new, until both are done."""
    frames, said = [screenshot(page)], None
    page.evaluate(SET, SETTINGS)
    page.run_again()
    until = time.monotonic() + 900
    while time.monotonic() < until:
        now = (page.texts("headline"), page.texts("numbers"), page.texts("step"))
        if now != said:
            frames.append(screenshot(page))
            said = now
        if len(frames) > 5 and page.evaluate(DONE):
            page.page.wait_for_timeout(1000)
            return [*frames, screenshot(page)]
        page.page.wait_for_timeout(200)
    raise TimeoutError(said)


def write(frames: list[Image.Image], path: Path) -> None:
    """Evenly chosen frames, the first and the last among them."""
    count = min(FRAMES, len(frames))
    chosen = [frames[round(i * (len(frames) - 1) / (count - 1))] for i in range(count)]
    height = round(chosen[0].height * WIDTH / chosen[0].width)
    first, *rest = [frame.resize((WIDTH, height), Image.Resampling.LANCZOS) for frame in chosen]
    durations = [FRAME_MS] * (count - 1) + [LAST_MS]
    first.save(
        path,
        save_all=True,
        append_images=rest,
        duration=durations,
        loop=0,
        quality=QUALITY,
        method=6,
        minimize_size=True,
    )
    if path.stat().st_size > LARGEST:
        raise ValueError(f"{path.name} has {path.stat().st_size} bytes, more than {LARGEST}")


def main() -> None:
    with running() as server, open_browser() as browser:
        page = GraphPage(browser, server, "canvas")
        page.set("Comfy.Minimap.Visible", False)
        page.open_example("train_a_subject")
        look_at(page, PANELS, (980, 860))
        write(film(page), IMAGES / "run.webp")
        page.wait_for("text", "Saved as|6 pictures", 300)
        page.wait_until_idle()
        look_at(page, WHOLE, (1760, 900))
        screenshot(page).save(IMAGES / "graph.png", optimize=True)


if __name__ == "__main__":
    main()
