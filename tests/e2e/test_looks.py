"""The panels for everybody: in every theme, by keyboard, by ear, in other languages."""

import re

import pytest

pytestmark = [pytest.mark.comfyui, pytest.mark.usefixtures("panels")]
SHORT = {"steps": 8, "sample_every": 8, "validate_every": 4, "effort": "quick"}
# The lowest contrast of any words in the panels, and the words. Colours go through a canvas, which
# knows every notation; a colour is laid over those behind it.
LOWEST_CONTRAST = """() => {
    const context = new OffscreenCanvas(1, 1).getContext('2d', { willReadFrequently: true });
    const layers = (e) =>
        e ? [...layers(e.parentElement), getComputedStyle(e).backgroundColor] : [];
    const painted = (colors) => {
        for (const color of ['#fff', ...colors]) {
            context.fillStyle = color;
            context.fillRect(0, 0, 1, 1);
        }
        return [...context.getImageData(0, 0, 1, 1).data].slice(0, 3);
    };
    const light = (rgb) => 0.05 + rgb.map((v) => v / 255)
        .map((v) => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
        .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
    const contrast = (e) => {
        const { color, opacity } = getComputedStyle(e);
        const behind = layers(e);
        const ground = painted(e.matches('.cntlora-step') ? [behind.at(-1)] : behind);
        const ink = painted([`rgb(${ground})`, color]).map((v, i) =>
            v * opacity + ground[i] * (1 - opacity));
        const [low, high] = [light(ink), light(ground)].sort((a, b) => a - b);
        return high / low;
    };
    const words = [...document.querySelectorAll('.cntlora-panel *')].filter((e) =>
        !e.children.length && e.textContent.trim() && e.getClientRects().length);
    const all = words.map((e) => [contrast(e), `${e.className}: ${e.textContent}`]);
    return [all.length, ...all.sort(([a], [b]) => a - b)[0]];
}"""
FAIL_EVERYTHING = """(failed) => document.querySelectorAll('.cntlora-headline, .cntlora-text')
    .forEach((e) => e.classList.toggle('cntlora-failed', failed))"""


@pytest.fixture
def trained(page):
    """The page after a run, the same one for every test."""
    if set(page.texts("headline")) != {"Done"}:
        page.open_example("train_a_subject")
        page.run(**SHORT)
        page.wait_for("headline", "^Done$")
        page.page.wait_for_timeout(500)
    return page


def test_words_can_be_read_in_every_theme(trained):
    try:
        for theme in ("light", "nord", "solarized", "dark"):
            trained.set("Comfy.ColorPalette", theme)
            count, ratio, words = trained.evaluate(LOWEST_CONTRAST)
            assert count > 90, theme  # the map alone has 70 ranks
            assert ratio >= 4.5, (theme, words)
            trained.shot(f"theme_{theme}")
            trained.evaluate(FAIL_EVERYTHING, True)
            count, ratio, words = trained.evaluate(LOWEST_CONTRAST)
            assert ratio >= 4.5, (theme, words)
            trained.evaluate(FAIL_EVERYTHING, False)
    finally:
        trained.set("Comfy.ColorPalette", "dark")


def test_everything_has_a_name_and_answers_to_keys(trained):
    page = trained.page
    assert page.get_by_role("img", name=re.compile(r"^Loss over \d+ steps, best")).count() == 1
    assert page.get_by_role("region", name="Rank of every layer").count() == 1
    assert page.get_by_role("group", name="Samples").count() == 1
    assert page.locator(".cntlora-panel [role=status]").count() >= 4
    map_rows = page.locator(".cntlora-map th[scope=row]")
    assert map_rows.first.text_content() == "down 1.0"
    unnamed = page.evaluate(
        """() => [...document.querySelectorAll('.cntlora-panel button, .cntlora-panel img')]
            .filter((e) => !(e.ariaLabel || e.alt)).length"""
    )
    assert unnamed == 0

    first = page.locator(".cntlora-sample").first
    first.focus()
    page.keyboard.press("Enter")
    dialog = page.locator("dialog.cntlora-dialog")
    assert dialog.locator("img").get_attribute("alt") == "Samples at step 0"
    assert page.evaluate("() => document.activeElement.className") == "cntlora-close"
    page.keyboard.press("Escape")
    page.wait_for_function("() => !document.querySelector('dialog.cntlora-dialog')", timeout=5000)
    assert first.evaluate("(e) => e === document.activeElement")  # back where it was


def test_the_panel_speaks_the_pages_language(trained):
    graph = trained.graph()
    trained.set("Comfy.Locale", "zh")
    try:
        trained.reload()
        trained.open_example("train_a_subject")
        trained.wait_for("headline", "^点击运行", 10)
        title = "() => window.app.graph.nodes.find((n) => n.comfyClass === 'CNTLoRATrain').title"
        assert trained.evaluate(title) == "训练 LoRA"
        trained.open_graph(graph)
        trained.wait_for("headline", "^完成$", 10)
        assert re.search(r"第 (\d+)/\1 步", " ".join(trained.texts("numbers")))
        trained.shot("chinese")
    finally:
        trained.set("Comfy.Locale", "en")
        trained.reload()
