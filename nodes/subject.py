"""Subject Images: a folder of pictures, or pictures from the graph, and what to call them."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from typing import Any

from torch import Tensor

from ..cntlora_core.config import DataConfig
from ..cntlora_core.data.captions import prepare_captions
from ..cntlora_core.data.checks import check_pictures
from ..cntlora_core.data.folder import PictureFile, picture_files
from ..cntlora_core.data.images import open_pictures
from ..cntlora_core.effects import without_effect_in_data
from ..cntlora_core.errors import CNTLoRAError, ImageError, SettingError
from ..cntlora_core.events import Event, Notice, Observer, ignore
from ..cntlora_core.model.loader import MINI_SD_FOLDER
from ..cntlora_core.report.charts import contact_sheet
from ..cntlora_core.settings import read_settings
from . import host
from .host import io, ui
from .paths import inside
from .types import Pictures, SubjectPictures, from_batch, to_image, with_masks
from .widgets import refusal, widgets_of

EXAMPLES = {
    "example: cat faces (embedded)": MINI_SD_FOLDER / "subject",
    "example: more cat faces, to validate (embedded)": MINI_SD_FOLDER / "heldout",
}


def files_of(name: str, observer: Observer = ignore) -> list[PictureFile]:
    """The pictures of a name in the list. Raises SettingError or ImageError; reads nothing outside
    ComfyUI's input folder."""
    if name in EXAMPLES:
        return picture_files(EXAMPLES[name], observer)
    root = host.input_folder()
    folder = inside(root, name)
    if not folder.is_dir():
        raise ImageError(
            f"The folder 'input/{name}' does not exist. Put 3-20 pictures of the subject there and "
            "refresh."
        )
    try:
        files = picture_files(folder, observer)
    except ImageError as error:
        raise ImageError(str(error).replace(str(folder), f"input/{name}")) from error
    for path in (p for file in files for p in file.sources):
        if not path.resolve().is_relative_to(root.resolve()):
            raise SettingError(
                f"'{path.name}' is a link to a place outside ComfyUI's input folder: copy the file "
                "there instead."
            )
    return files


class SubjectImages(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return host.schema(
            node_id="CNTLoRASubjectImages",
            display_name="Subject Images",
            category=host.category(),
            search_aliases=["dataset", "training images", "dreambooth", "load image folder"],
            description="The pictures to learn from: a folder under ComfyUI's input folder, or an "
            "IMAGE batch.",
            inputs=[*_sources(), *_words(), *_wires(), *widgets_of(DataConfig)],
            outputs=[
                SubjectPictures.Output(
                    display_name="subject", tooltip="For Calibrate LoRA and Train LoRA."
                ),
                io.Image.Output(
                    display_name="contact_sheet",
                    tooltip="What was found, with names, to check by eye.",
                ),
            ],
            has_intermediate_output=True,
        )

    @classmethod
    def validate_inputs(
        cls, folder: str, resolution: Any = None, images: object = "none"
    ) -> bool | str:  # only what it judges: the host repeats it for every argument
        try:
            if images is not None:  # None: connected, and the folder is not read
                files_of(folder)
        except CNTLoRAError as error:
            return str(error)
        return refusal(DataConfig, {"resolution": resolution})

    @classmethod
    def fingerprint_inputs(cls, folder: str, **others: object) -> str:
        try:
            paths = [p for file in files_of(folder) for p in file.sources]
            seen: list[object] = [(str(p), p.stat().st_size, p.stat().st_mtime_ns) for p in paths]
        except (CNTLoRAError, OSError) as error:
            seen = [str(error)]
        return hashlib.sha256(
            repr((folder, seen, sorted((k, str(v)) for k, v in others.items()))).encode()
        ).hexdigest()

    @classmethod
    def execute(
        cls,
        folder: str,
        trigger: str,
        class_name: str,
        prompt: str = "a {trigger} {class}",
        images: Tensor | None = None,
        masks: Tensor | None = None,
        and_subject: Pictures | None = None,
        **settings: Any,
    ) -> io.NodeOutput:
        if not f"{trigger}{class_name}".strip():
            raise SettingError(
                "trigger and class_name are empty: say what the pictures show, e.g. 'sks' and "
                "'dog'."
            )
        notices: list[str] = []

        def note(event: Event) -> None:
            if isinstance(event, Notice):
                notices.append(event.text)

        data = read_settings(DataConfig, settings)
        pictures = (
            open_pictures(files_of(folder, note), note) if images is None else from_batch(images)
        )
        if masks is not None:
            pictures, data = with_masks(pictures, masks, note), replace(data, masked=True)
        words = (trigger, class_name)
        pictures, prompt = prepare_captions(
            pictures, prompt, words, add_trigger=data.add_trigger, observer=note
        )
        notices += check_pictures(pictures, data.resolution, masked=data.masked)
        notices += without_effect_in_data(data)
        sizes = sorted(min(p.image.size) for p in pictures)
        text = (
            f"{len(pictures)} pictures, shorter sides {sizes[0]}-{sizes[-1]} px. "
            f"Prompt: '{prompt}'."
        )
        sheet = to_image([contact_sheet([p.image for p in pictures], [p.name for p in pictures])])
        shown = ui.PreviewImage(sheet, cls=cls).as_dict() | {"text": (" ".join([text, *notices]),)}
        others = (and_subject, *and_subject.others) if and_subject else ()
        return io.NodeOutput(
            Pictures(tuple(pictures), prompt, data, trigger.strip(), others), sheet, ui=shown
        )


def _sources() -> list[Any]:
    return [
        io.Combo.Input(
            "folder",
            options=[*host.input_subfolders(), *EXAMPLES],
            default=next(iter(EXAMPLES)),
            tooltip="A folder in ComfyUI's input folder with 3-20 pictures (PNG, JPEG, "
            "WebP, AVIF, BMP, TIFF, GIF; HEIC with pillow-heif), captions beside them "
            "(cat.txt). Fewer teach only one view; many near-duplicates teach their "
            "background.",
        ),
    ]


def _words() -> list[Any]:
    return [
        io.String.Input(
            "trigger",
            default="sks",
            tooltip="The word that will call the subject, e.g. 'sks'. A rare word learns "
            "faster; a common one brings its old meaning along.",
        ),
        io.String.Input(
            "class_name",
            default="cat face emoji",
            tooltip="What the subject is, in the model's own words, e.g. 'dog', 'woman', "
            "'toy car'. Too vague, and the whole model drifts; too narrow, and "
            "less carries over.",
        ),
        host.advanced(io.String)(
            "prompt",
            default="a {trigger} {class}",
            optional=True,
            tooltip="Of every picture without a caption of its own; {trigger} and {class} "
            "are filled in.",
        ),
    ]


def _wires() -> list[Any]:
    return [
        io.Image.Input(
            "images",
            optional=True,
            tooltip="Pictures from the graph, used instead of the folder when connected.",
        ),
        io.Mask.Input(
            "masks",
            optional=True,
            tooltip="White where the subject is: one for each picture, in the order of the "
            "sheet, or one for all. Used instead of mask files; turns masked on.",
        ),
        SubjectPictures.Input(
            "and_subject",
            optional=True,
            tooltip="Another subject, learnt in the same run, with its own trigger. Each "
            "has an equal share of every pass, however many its pictures are.",
        ),
    ]
