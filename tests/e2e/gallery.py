"""Every template before, during and after a run, in both renderers, dark and light, to be looked
at.

    COMFYUI_PATH=... python tests/e2e/gallery.py FOLDER [TEMPLATE ...]    writes FOLDER/*.png, and
what the console says
"""

import os
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory

sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))
from graph_page import EXAMPLES, GraphPage, open_browser
from make_checkpoint import write as write_checkpoint
from server import Server, running

SIZE = {"width": 1920, "height": 1080}  # px; at less the canvas leaves out words of wide graphs
PALETTES = ("light", "dark")
FIRST = "train_a_subject"  # makes the LoRA that others read
# These want ComfyUI's own loader and a file: one of full size with random weights draws noise, and
# a processor does as few passes of it as show every node at work.
CHECKPOINT = "v1-5-pruned-emaonly-fp16.safetensors"
OF_FULL_SIZE = {
    "with_comfyui_model": {
        "CNTLoRACalibrate": {"init": "gaussian"},
        "CNTLoRATrain": {"steps": "6", "sample_every": 0, "validate_every": 3, "batch_size": 1},
        "CNTLoRAPreviewLoRA": {"count": 1, "steps": 1, "guidance": 1.0},
    },
    "use_the_lora": {"KSampler": {"steps": 2}, "EmptyLatentImage": {"width": 128, "height": 128}},
}
# A step's time is known, or layers are measured where nothing is trained.
DURING = """() => {
    const texts = (part) => [...document.querySelectorAll(`.cntlora-${part}`)]
        .map((e) => e.textContent);
    return texts('numbers').some((text) => /steps\\/s|s\\/step/.test(text))
        || (!document.querySelector('.cntlora-strip')
            && texts('headline').some((text) => /: [1-9]\\d* of /.test(text)));
}"""
RENDERERS = os.environ.get("E2E_RENDERER", "canvas vue").split()


def shots(page: GraphPage, template: str, server: Server) -> None:
    refresh = "() => window.app.extensionManager.command.execute('Comfy.RefreshNodeDefinitions')"
    page.evaluate(refresh)  # R: the files that runs before have made
    page.open_example(template)
    page.fit()
    in_both(page, f"{template}_1_before")
    page.set_widgets(OF_FULL_SIZE.get(template, {}))
    known = set(server.get("/history"))
    page.run_again()
    working = wait(page, server, known, DURING)
    if working:
        in_both(page, f"{template}_2_during")
        wait(page, server, known, "() => false")
    page.page.wait_for_timeout(2500)
    in_both(page, f"{template}_3_after")


def in_both(page: GraphPage, name: str) -> None:
    for palette in PALETTES:
        page.set("Comfy.ColorPalette", palette)
        page.page.wait_for_timeout(500)
        page.shot(f"{name}_{palette}")


def wait(page: GraphPage, server: Server, known: set, condition: str, seconds: float = 900) -> bool:
    """Until the condition holds, True, or until the prompt is done."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        if page.evaluate(condition):
            return True
        if set(server.get("/history")) - known:
            return False
        page.page.wait_for_timeout(250)
    raise TimeoutError(page.texts("headline"))


def all_templates() -> list[str]:
    return sorted((p.stem for p in EXAMPLES.glob("*.json")), key=lambda name: (name != FIRST, name))


def main(folder: str, *templates: str) -> None:
    os.environ["E2E_OUTPUT"] = folder
    Path(folder).mkdir(parents=True, exist_ok=True)
    templates = templates or all_templates()
    with (
        TemporaryDirectory() as base,
        running(Path(base, "comfyui")) as server,
        open_browser() as browser,
    ):
        if set(templates) & set(OF_FULL_SIZE):
            write_checkpoint(server.base / "models/checkpoints" / CHECKPOINT, "sd1")
        for renderer in RENDERERS:
            page = GraphPage(browser, server, renderer)
            page.page.set_viewport_size(SIZE)
            page.set("Comfy.Minimap.Visible", False)
            for template in templates:
                shots(page, template, server)
            said = Path(folder, f"{renderer}_console.txt")
            said.write_text("\n".join(page.said), encoding="utf-8")
            page.page.close()


if __name__ == "__main__":
    main(*sys.argv[1:])
