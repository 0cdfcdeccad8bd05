"""The panel's colours against WCAG AA, 4.5:1, in each of ComfyUI's palettes."""

import re
from pathlib import Path

import pytest

CSS = (Path(__file__).resolve().parents[2] / "web/cntlora.css").read_text(encoding="utf-8")
# --input-text and --comfy-input-bg
PALETTES = {
    "dark": ("#dddddd", "#222222"),
    "light": ("#222222", "#c9c9c9"),
    "arc": ("#dddddd", "#2b2f38"),
    "github": ("#bcc2c8", "#161b22"),
    "nord": ("#bcc2c8", "#2e3440"),
    "solarized": ("#93a1a1", "#002b36"),
}


def rgb(color):
    digits = color.lstrip("#")
    digits = digits if len(digits) == 6 else "".join(2 * d for d in digits[:3])
    return [int(digits[i : i + 2], 16) for i in (0, 2, 4)]


def mix(a, b, share):
    return [x * share + y * (1 - share) for x, y in zip(a, b, strict=True)]


def contrast(a, b):
    def luminance(color):
        parts = [v / 255 for v in color]
        linear = [v / 12.92 if v <= 0.04045 else ((v + 0.055) / 1.055) ** 2.4 for v in parts]
        return 0.05 + sum(w * v for w, v in zip((0.2126, 0.7152, 0.0722), linear, strict=True))

    low, high = sorted((luminance(a), luminance(b)))
    return high / low


def rule(selector):
    """The declarations of one rule."""
    return re.search(rf"^{re.escape(selector)} {{(.*?)}}", CSS, re.M | re.S).group(1)


def mixed(name, text):
    """A colour of the style sheet's own, mixed with the palette's text."""
    color, share = re.search(
        rf"--cntlora-{name}: color-mix\(in srgb, (#\w+) (\d+)%, var\(--input-text", CSS
    ).groups()
    return mix(rgb(color), text, int(share) / 100)


@pytest.mark.parametrize("palette", PALETTES)
def test_words_can_be_read(palette):
    text, ground = map(rgb, PALETTES[palette])
    words = re.sub(r"^.*::before.*$", "", CSS, flags=re.M)  # those are marks
    faint = [float(value) for value in re.findall(r"opacity: ([\d.]+)", words)]
    assert len(faint) >= 4
    assert contrast(mix(text, ground, min(faint)), ground) >= 4.5
    assert contrast(mixed("error", text), ground) >= 4.5


@pytest.mark.parametrize("palette", PALETTES)
def test_lines_of_the_chart_can_be_seen(palette):
    text, ground = map(rgb, PALETTES[palette])
    assert contrast(mixed("validation", text), ground) >= 3
    (smoothed,) = re.findall(
        r"border-top: 2px solid currentColor; .*opacity: ([\d.]+)", rule(".cntlora-key::before")
    )
    assert contrast(mix(text, ground, float(smoothed)), ground) >= 3


def test_ranks_can_be_read_on_every_shade():
    cell = rule(".cntlora-map td")
    text = rgb(re.search(r"[^-]color: (#\w+)", cell).group(1))
    deep, faint = re.search(
        r"color-mix\(in srgb, (#\w+) var\(--share, 0%\), (#\w+)\)", cell
    ).groups()
    for share in (0, 0.25, 0.5, 0.75, 1):
        assert contrast(text, mix(rgb(deep), rgb(faint), share)) >= 4.5
    size = int(re.search(r"font-size: (\d+)px", rule(".cntlora-map table")).group(1))
    assert 0.7 * size >= 9  # px on the screen with the graph at 70 %


def test_a_samples_step_can_be_read_on_white():
    label = rule(".cntlora-step")
    veil = re.search(r"background: (#\w+)", label).group(1)
    text = rgb(re.search(r"[^-]color: (#\w+)", label).group(1))
    assert contrast(text, mix(rgb(veil), rgb("#fff"), int(2 * veil[4], 16) / 255)) >= 4.5
