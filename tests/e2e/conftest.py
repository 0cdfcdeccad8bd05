"""One running ComfyUI for all end-to-end tests."""

import importlib.util
import os
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def comfyui(tmp_path_factory):
    path = os.environ.get("COMFYUI_PATH")
    if not path:
        pytest.skip("COMFYUI_PATH is not set")
    spec = importlib.util.spec_from_file_location(
        "e2e_server", Path(__file__).with_name("server.py")
    )
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    server = module.Server(Path(path), tmp_path_factory.mktemp("comfyui") / "base")
    try:
        server.wait()
        yield server
    finally:
        server.stop()
