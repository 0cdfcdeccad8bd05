"""The pages that people read as text: their lines, their links, and the names they give."""

import importlib
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
# Left out: help pages (the panel shows them, their tables are generated) and others' licences.
PAGES = sorted(
    page
    for pattern in ("*.md", "docs/*.md", "benchmarks/**/*.md", "cntlora_core/**/README.md")
    for page in ROOT.glob(pattern)
)
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
pages = pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))


def anchors(page):
    """What GitHub calls a page's headings."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pages
def test_lines_are_at_most_100_columns(page):
    lines = page.read_text(encoding="utf-8").splitlines()
    assert not [line for line in lines if len(line) > 100 and not line.startswith("|")]


@pages
def test_links_within_the_repository_lead_somewhere(page):
    for link in LINK.findall(page.read_text(encoding="utf-8")):
        if "://" in link:
            continue
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


def test_the_functions_of_the_method_exist():
    """The table from equation to function names `module.function` of the calibration."""
    text = (ROOT / "docs/method.md").read_text(encoding="utf-8")
    table = text.split("## From equation to function")[1].split("\n## ")[0]
    names = re.findall(r"`([a-z_]+(?:\.\w+)+)`", table)
    assert len(names) >= 10
    for name in names:
        module, *attributes = name.split(".")
        found = importlib.import_module(f"cntlora_core.calibration.{module}")
        for attribute in attributes:
            found = getattr(found, attribute)
