"""One running ComfyUI and one page of it for all end-to-end tests.

The page needs playwright and a Chromium (CHROMIUM_PATH, or Debian's). E2E_RENDERER names one
renderer, canvas or vue; otherwise every test of the page runs in both.
"""

import importlib.util
import os
import sys
from pathlib import Path

import pytest
from comfyui_models import comfy, models  # noqa: F401, fixtures of two files here

RENDERERS = os.environ.get("E2E_RENDERER", "canvas vue").split()


def load(name):
    """A module beside this file."""
    path = Path(__file__).with_name(f"{name}.py")
    spec = importlib.util.spec_from_file_location(f"e2e_{name}", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def comfyui(tmp_path_factory):
    if not os.environ.get("COMFYUI_PATH"):
        pytest.skip("COMFYUI_PATH is not set")
    with load("server").running(tmp_path_factory.mktemp("comfyui") / "base") as server:
        yield server


@pytest.fixture(scope="session")
def browser():
    pytest.importorskip("playwright.sync_api")
    graph_page = load("graph_page")
    if not graph_page.chromium_path():
        pytest.skip("no Chromium: set CHROMIUM_PATH")
    with graph_page.open_browser() as browser:
        yield browser


@pytest.fixture(scope="session", params=RENDERERS)
def opened(request, comfyui, browser):
    """The page in one renderer; opening it takes seconds, so the tests share it."""
    page = load("graph_page").GraphPage(browser, comfyui, request.param)
    if not page.has_renderer:
        page.page.close()
        pytest.skip("this frontend has no Vue nodes")
    yield page
    page.page.close()


@pytest.fixture
def page(opened):
    """The page, whose console must stay without a message of ours."""
    opened.said.clear()
    yield opened
    assert [line for line in opened.said if "cntlora" in line.lower()] == []


@pytest.fixture
def panels(page):
    if not page.draws_panels:
        pytest.skip("Vue nodes draw no panels before frontend 1.29.1, not even the text of notes")
