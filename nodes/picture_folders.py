"""Names of folders in a workflow -> the pictures in them."""

from __future__ import annotations

from pathlib import Path

from ..cntlora_core.data.folder import PictureFile, picture_files
from ..cntlora_core.errors import ImageError, SettingError
from ..cntlora_core.events import Observer, ignore
from ..cntlora_core.model.loader import MINI_SD_FOLDER
from . import host
from .paths import inside

EXAMPLES = {
    "example: cat faces (embedded)": MINI_SD_FOLDER / "subject",
    "example: more cat faces, to validate (embedded)": MINI_SD_FOLDER / "heldout",
}
DATASETS = "datasets/"  # before the names of folders in ComfyUI's own folder for them


def files_of(name: str, observer: Observer = ignore) -> list[PictureFile]:
    """The pictures of a name in the list. Raises SettingError or ImageError; reads nothing outside
    ComfyUI's input and datasets folders."""
    if name in EXAMPLES:
        return picture_files(EXAMPLES[name], observer)
    root, folder, shown = _place(name)
    if not folder.is_dir():
        raise ImageError(
            f"The folder '{shown}' does not exist. Put 3-20 pictures of the subject there and "
            "refresh."
        )
    try:
        files = picture_files(folder, observer)
    except ImageError as error:
        raise ImageError(str(error).replace(str(folder), shown)) from error
    for path in (p for file in files for p in file.sources):
        if not path.resolve().is_relative_to(root.resolve()):
            raise SettingError(
                f"'{path.name}' is a link to a place outside '{root.name}': copy the file there "
                "instead."
            )
    return files


def _place(name: str) -> tuple[Path, Path, str]:
    """ComfyUI's folder that holds it, the folder itself, and how people call it."""
    if name.startswith(DATASETS):
        for root in host.dataset_roots():
            folder = inside(root, name.removeprefix(DATASETS), host.subfolders(root))
            if folder.is_dir():
                return root, folder, name
    folder = inside(host.input_folder(), name, host.input_subfolders())
    return host.input_folder(), folder, f"input/{name}"


def folders() -> list[str]:
    """For the widget: under input, under datasets, and the embedded ones."""
    datasets = [f"{DATASETS}{n}" for root in host.dataset_roots() for n in host.subfolders(root)]
    return [*host.input_subfolders(), *dict.fromkeys(datasets), *EXAMPLES]
