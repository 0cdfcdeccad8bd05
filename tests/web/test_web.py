"""The page's own tests, run by Node (18 or later) where there is one."""

import shutil
import subprocess
from pathlib import Path

import pytest


@pytest.mark.skipif(shutil.which("node") is None, reason="no Node")
def test_the_panels_state():
    tests = [str(p) for p in Path(__file__).parent.glob("*.test.mjs")]
    result = subprocess.run(["node", "--test", *tests], capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stdout
