"""The templates' thumbnails: what their runs give, in rows of equal seeds.

COMFYUI_PATH=... python tests/e2e/thumbnails.py    writes example_workflows/*.jpg
"""

import io
import json
import sys
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

sys.path.insert(0, str(Path(__file__).parent))
from graph_page import EXAMPLES
from server import Server, running

WORKFLOWS = Path(__file__).with_name("workflows")
PREVIEW = "CNTLoRAPreviewLoRA"
# For each template, rows: what they show, which of its previews, and what is other than there.
SUBJECT = (
    ("before", 0, {"strength": 0.0}),
    ("calibrated", 0, {"lora": ["3", 1]}),
    ("trained", 0, {}),
)
ROWS = {
    "train_a_subject": SUBJECT,
    "style": (("calibrated", 0, {"lora": ["3", 1]}), ("trained", 0, {})),
    "two_concepts": (
        ("the first,\nsks", 0, {}),
        ("the second,\nzwx", 1, {}),
    ),
    "prior_preservation": (
        ("the subject", 0, {}),
        ("the class,\nbefore", 1, {"strength": 0.0}),
        ("the class,\nwith the LoRA", 1, {}),
    ),
    "compare_starts": (("calibrated", 0, {}), ("ordinary", 1, {})),
    "step_0": (("before", 0, {"strength": 0.0}), ("calibrated,\nno training", 0, {})),
    "continue": (("before", 0, {"strength": 0.0}), ("trained on", 0, {})),
}
# Whose pictures are those of another template.
SAME = {
    "with_comfyui_model": ("train_a_subject", SUBJECT),
    "use_the_lora": (
        "train_a_subject",
        (("without", 0, {"strength": 0.0}), ("with the LoRA", 0, {})),
    ),
}
CELL, GAP, LEFT = 120, 8, 144  # px
GROUND, INK = "#1d1f26", "#d8dae0"
FONT_PX, QUALITY = 15, 84


def with_rows(name: str, rows) -> tuple[dict, list[str]]:
    """The template's graph with a preview for every row, and their nodes."""
    graph = json.loads((WORKFLOWS / f"{name}.json").read_text(encoding="utf-8"))
    previews = [key for key, node in graph.items() if node["class_type"] == PREVIEW]
    added = {}
    for n, (_, which, other) in enumerate(rows):
        inputs = graph[previews[which]]["inputs"]
        added[f"row{n}"] = {"class_type": PREVIEW, "inputs": inputs | other}
    return graph | added, list(added)


def pictures(server: Server, output: dict) -> list[Image.Image]:
    address = "/view?filename={filename}&subfolder={subfolder}&type={type}"
    raw = [server.raw(address.format(**image)) for image in output["images"]]
    return [Image.open(io.BytesIO(data)).convert("RGB") for data in raw]


def sheet(rows: list[tuple[str, list[Image.Image]]]) -> Image.Image:
    columns = max(len(images) for _, images in rows)
    size = (LEFT + columns * CELL + GAP, GAP + len(rows) * (CELL + GAP))
    image = Image.new("RGB", size, GROUND)
    draw, font = ImageDraw.Draw(image), ImageFont.load_default(FONT_PX)
    for n, (text, images) in enumerate(rows):
        top = GAP + n * (CELL + GAP)
        draw.multiline_text((12, top + CELL / 2), text, INK, font, anchor="lm", spacing=4)
        for k, picture in enumerate(images):
            cell = picture.resize((CELL, CELL), Image.Resampling.LANCZOS)
            image.paste(cell, (LEFT + k * CELL, top))
    return image


def main() -> None:
    wanted = {name: (name, rows) for name, rows in ROWS.items()} | SAME
    with running() as server:
        for name, (source, rows) in wanted.items():  # the first makes what `continue` reads
            graph, nodes = with_rows(source, rows)
            result = server.run(graph, 600)
            assert result["status"]["status_str"] == "success", result["status"]
            shown = [pictures(server, result["outputs"][node]) for node in nodes]
            rows = [(text, images) for (text, *_), images in zip(rows, shown, strict=True)]
            sheet(rows).save(EXAMPLES / f"{name}.jpg", quality=QUALITY, optimize=True)


if __name__ == "__main__":
    main()
