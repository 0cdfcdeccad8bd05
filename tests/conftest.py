"""Make the repository's packages importable without letting `nodes/` and `tests/` shadow ComfyUI's
modules of those names."""

import errno
import importlib.util
import os
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

if importlib.util.find_spec("hypothesis"):  # a ComfyUI's environment may lack it
    from hypothesis import settings

    # The same examples in every run: a suite that fails by chance blames the wrong change.
    settings.register_profile("same", derandomize=True, deadline=None)
    settings.load_profile("same")

# `python -m pytest` puts the root on sys.path; `import nodes` would then find ours instead of
# ComfyUI's.
sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != ROOT]


def _load(name: str, folder: Path) -> None:
    """This checkout's package, whatever else is installed under its name."""
    spec = importlib.util.spec_from_file_location(
        name, folder / "__init__.py", submodule_search_locations=[str(folder)]
    )
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)


_load("cntlora_core", ROOT / "cntlora_core")


@pytest.fixture(scope="session")
def mini_sd():
    """The embedded model, fp32 on the CPU. Shared: a test that changes it must put it back."""
    from cntlora_core.model.loader import load_checkpoint

    return load_checkpoint("mini-sd")


@pytest.fixture(scope="session")
def subject(mini_sd):
    """The sample subject's latents and conditioning."""
    from cntlora_core.data.dataset import read_subject
    from cntlora_core.model.loader import MINI_SD_FOLDER

    return read_subject(mini_sd, MINI_SD_FOLDER / "subject", "a sks cat face emoji")


@pytest.fixture(scope="session")
def held_out(mini_sd):
    """Pictures of the sample subject that nothing trains on."""
    from cntlora_core.data.dataset import read_subject
    from cntlora_core.model.loader import MINI_SD_FOLDER

    return read_subject(mini_sd, MINI_SD_FOLDER / "heldout", "a sks cat face emoji")


class FailingDisk:
    """A file system whose n-th call fails, and with `stays` all after it too: as a full disk
    does."""

    def __init__(self, fails_at=0, stays=False):
        self.fails_at, self.stays, self.calls = fails_at, stays, 0

    def _count(self):
        self.calls += 1
        if self.fails_at and (
            self.calls == self.fails_at or (self.stays and self.calls > self.fails_at)
        ):
            raise OSError(errno.ENOSPC, "No space left on device")

    def open(self, path, mode):
        self._count()
        return path.open(mode)

    def write(self, file, data):
        try:
            self._count()
        except OSError:
            file.write(data[: len(data) // 2])  # as much as there is room for
            raise
        file.write(data)
        file.flush()

    def sync(self, file):
        self._count()
        os.fsync(file.fileno())

    def replace(self, source, target):
        self._count()
        os.replace(source, target)


@pytest.fixture(scope="session")
def failing_disk():
    return FailingDisk
