"""The package as it is installed: everything under `cntlora_core` is in the wheel, and the wheel
works where the checkout is not."""

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
# `pip` and `setuptools` are what builds; a ComfyUI's environment may lack the second.
setuptools = pytest.importorskip("setuptools")


def package_files():
    return {
        str(path.relative_to(ROOT))
        for path in (ROOT / "cntlora_core").rglob("*")
        if path.is_file() and path.suffix != ".pyc"
    }


def test_every_file_of_the_package_is_in_the_wheel(monkeypatch):
    monkeypatch.chdir(ROOT)
    distribution = setuptools.Distribution({"script_name": "setup.py"})
    distribution.parse_config_files(["pyproject.toml"])
    build = distribution.get_command_obj("build_py")
    build.ensure_finalized()
    inside = {str(Path(path)) for _, _, path in build.find_all_modules()}
    for _, source, _, names in build.data_files:
        inside |= {str(Path(source, name)) for name in names}
    assert inside == package_files()


@pytest.mark.slow
def test_the_installed_wheel_runs_the_demo(tmp_path):
    """Built from a copy, installed into a fresh environment, run from another folder. The packages
    it needs are those of the environment that tests it; the checkout is on nobody's path."""
    source = tmp_path / "source"
    source.mkdir()
    for name in ("pyproject.toml", "requirements.txt", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    shutil.copytree(
        ROOT / "cntlora_core", source / "cntlora_core", ignore=shutil.ignore_patterns("*.pyc")
    )
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}

    def run(*command):
        done = subprocess.run(
            [str(part) for part in command],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr[-2000:]
        return done.stdout

    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    run(*pip, "wheel", "--no-deps", "--no-build-isolation", "--no-index", source, "-w", "wheels")
    (wheel,) = (tmp_path / "wheels").glob("cntlora-*.whl")
    shutil.rmtree(source)

    fresh = tmp_path / "fresh"
    run(sys.executable, "-m", "venv", "--without-pip", fresh)
    scripts = fresh / ("Scripts" if os.name == "nt" else "bin")
    python = scripts / "python"
    run(*pip, "--python", python, "install", "--no-deps", "--no-index", wheel)
    packages = "import sysconfig; print(sysconfig.get_path('purelib'))"
    own = Path(run(python, "-c", packages).strip())
    # A path in a .pth is added behind the environment's own, and editable installs there stay out.
    (own / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    where = run(python, "-c", "import cntlora_core; print(cntlora_core.__file__)").strip()
    assert Path(where).is_relative_to(own)

    run(scripts / "cntlora", "demo", "--output", "demo")
    for name in ("lora.safetensors", "samples.png", "ranks.png", "loss.png", "events.jsonl"):
        assert (tmp_path / "demo" / name).stat().st_size > 0, name
