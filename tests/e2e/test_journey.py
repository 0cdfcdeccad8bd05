"""From an empty graph to a LoRA of one's own pictures, by mouse and keyboard alone."""

import importlib.util
import re

import pytest
from PIL import Image, ImageDraw

pytestmark = [pytest.mark.comfyui, pytest.mark.usefixtures("panels")]
# Where a widget lies on the screen, in the canvas renderer.
WIDGET_AT = """([kind, name]) => {
    const node = window.app.graph.nodes.find((n) => n.comfyClass === kind);
    const widget = node.widgets.find((w) => w.name === name);
    const { ds, canvas } = window.app.canvas;
    const frame = canvas.getBoundingClientRect();
    const x = node.pos[0] + node.size[0] / 2;
    const y = node.pos[1] + (widget.last_y ?? widget.y) + 10;
    return [frame.left + (x + ds.offset[0]) * ds.scale, frame.top + (y + ds.offset[1]) * ds.scale];
}"""
NODE_ID = "(kind) => window.app.graph.nodes.find((n) => n.comfyClass === kind).id"
VALUE = """([kind, name]) => window.app.graph.nodes.find((n) => n.comfyClass === kind)
    .widgets.find((w) => w.name === name).value"""
SUBJECT = "CNTLoRASubjectImages"


def drawing(size, color):
    """An apple: a disk and a stalk at the top."""
    image = Image.new("RGB", size, "white")
    w, h = size
    ImageDraw.Draw(image).ellipse((w * 0.2, h * 0.3, w * 0.8, h * 0.9), fill=color)
    ImageDraw.Draw(image).line((w / 2, h * 0.05, w / 2, h * 0.35), fill="brown", width=w // 16)
    return image


def own_pictures(folder):
    """As they come from a phone and from a drawing program; how many."""
    folder.mkdir()
    exif = Image.Exif()
    exif[0x0112] = 6  # taken upright, stored lying
    lying = drawing((240, 320), "red").rotate(90, expand=True)
    lying.save(folder / "IMG_0001.jpg", exif=exif, quality=90)
    cut_out = drawing((200, 200), "green").convert("RGBA")
    cut_out.putdata([(*p[:3], 0 if min(p[:3]) > 250 else 255) for p in cut_out.getdata()])
    cut_out.save(folder / "cut out.png")
    drawing((256, 256), "darkred").save(folder / "third.png")
    (folder / "third.txt").write_text("a {trigger} {class} on a table", encoding="utf-8")
    if importlib.util.find_spec("pillow_heif") is None:
        return 3
    import pillow_heif

    pillow_heif.register_heif_opener()
    drawing((320, 240), "orangered").save(folder / "IMG_0002.HEIC")
    return 4


def choose(page, name, value):
    """One of a list."""
    mouse = page.page
    if page.renderer == "canvas":
        mouse.mouse.click(*page.evaluate(WIDGET_AT, [SUBJECT, name]))
        mouse.locator(".litecontextmenu .litemenu-entry", has_text=re.compile(f"^{value}$")).click()
    else:
        node = mouse.locator(f'[data-node-id="{page.evaluate(NODE_ID, SUBJECT)}"]')
        node.get_by_role("combobox").first.click()
        mouse.get_by_role("option", name=value, exact=True).click()
    assert page.evaluate(VALUE, [SUBJECT, name]) == value


def write(page, name, value):
    mouse = page.page
    if page.renderer == "canvas":
        mouse.mouse.click(*page.evaluate(WIDGET_AT, [SUBJECT, name]))
        field = mouse.locator(".graphdialog .value")
    else:
        node = mouse.locator(f'[data-node-id="{page.evaluate(NODE_ID, SUBJECT)}"]')
        field = node.locator(f'input[aria-label="{name}"]')
    field.fill(value)
    field.press("Enter")
    mouse.wait_for_timeout(300)
    assert page.evaluate(VALUE, [SUBJECT, name]) == value


def test_own_pictures_from_an_empty_graph(page, comfyui):
    mouse = page.page
    page.evaluate("() => window.app.extensionManager.command.execute('Comfy.NewBlankWorkflow')")
    mouse.wait_for_timeout(1000)
    count = own_pictures(comfyui.base / f"input/apples {page.renderer}")
    mouse.mouse.click(700, 600)
    mouse.keyboard.press("r")  # as the note of the template says
    mouse.wait_for_timeout(1500)

    mouse.get_by_role("button", name="Templates").first.click()
    mouse.get_by_text("CNTLoRA", exact=True).first.click()
    mouse.get_by_text("train_a_subject").first.click()
    mouse.wait_for_function("() => window.app.graph.nodes.length > 5")
    mouse.wait_for_timeout(2000)
    choose(page, "folder", f"apples {page.renderer}")
    write(page, "trigger", "zwx")
    write(page, "class_name", "apple")
    page.shot("journey_before")
    page.shorten(steps=8, sample_every=8, effort="quick")
    mouse.get_by_role("button", name="Run", exact=True).first.click()

    page.wait_for("headline", "^Done$", 180)
    page.wait_for("text", f"^{count} pictures.*zwx apple|^Saved as my_subject", 120)
    page.wait_until_idle()
    mouse.wait_for_timeout(1500)
    page.shot("journey_after")
    (saved,) = {w for w in page.texts("text") if w.startswith("Saved as")}
    assert (comfyui.base / "models/loras" / saved.removeprefix("Saved as ")).is_file()
