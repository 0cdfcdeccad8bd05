"""Subject Images: a folder of pictures, or pictures from the graph, and what to call them."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

from ..cntlora_core.config import DataConfig
from ..cntlora_core.data.captions import prepare_captions, without_captions
from ..cntlora_core.data.checks import check_pictures
from ..cntlora_core.data.images import Picture, open_pictures
from ..cntlora_core.data.lengths import too_long
from ..cntlora_core.data.tags import what_is_read
from ..cntlora_core.effects import without_effect_in_data
from ..cntlora_core.errors import CNTLoRAError, SettingError
from ..cntlora_core.events import Event, Notice
from ..cntlora_core.presets import NONE, PRESETS, help_text, told, with_preset
from ..cntlora_core.report.charts import contact_sheet
from ..cntlora_core.settings import read_settings
from . import host
from .host import io, ui
from .host_images import from_batches, to_image, with_captions, with_masks
from .paths import stamps
from .picture_folders import EXAMPLES, files_of, folders
from .reporter import shown
from .types import Pictures, SubjectPictures
from .widgets import one, refusal, single, widgets_of

SHOWN_CAPTIONS = 12


class SubjectImages(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return host.schema(
            node_id="CNTLoRASubjectImages",
            display_name="Subject Images",
            category=host.category(),
            search_aliases=["dataset", "training images", "dreambooth", "load image folder"],
            description="The pictures to learn from: a folder under ComfyUI's input folder, or "
            "IMAGEs, a batch or a list of any sizes, with a list of captions.",
            inputs=[*_sources(), *_words(), *_wires(), *widgets_of(DataConfig), *_more()],
            outputs=[
                SubjectPictures.Output(
                    display_name="subject", tooltip="For Calibrate LoRA and Train LoRA."
                ),
                io.Image.Output(
                    display_name="contact_sheet",
                    tooltip="What was found, with names, to check by eye.",
                ),
            ],
            hidden=host.IDENTITY,
            is_input_list=True,
            has_intermediate_output=True,
            not_idempotent=True,  # the cache must not answer with what another node shows
        )

    @classmethod
    def validate_inputs(
        cls, folder: Any, resolution: Any = None, images: Any = "none"
    ) -> bool | str:  # only what it judges: the host repeats it for every argument
        try:
            # None: connected. With pictures no folder is read, and of a folder nothing is known.
            if one(images) is not None and one(folder) is not None:
                files_of(one(folder))
        except CNTLoRAError as error:
            return str(error)
        return refusal(DataConfig, {"resolution": one(resolution)})

    @classmethod
    def fingerprint_inputs(cls, folder: Any, **others: object) -> str:
        """With `images` connected no folder is read; of a name that is connected (None) it is not
        known which, so all count."""
        folder, others = one(folder), {name: one(value) for name, value in others.items()}
        read = [] if "images" in others else [folder] if folder is not None else folders()
        said = sorted((k, str(v)) for k, v in others.items())
        seen = [(name, _stamps(name)) for name in read]
        return hashlib.sha256(repr((folder, seen, said)).encode()).hexdigest()

    @classmethod
    def execute(
        cls,
        images: Sequence[Tensor] | None = None,
        masks: Sequence[Tensor] | None = None,
        captions: Sequence[str] | None = None,
        **more: Any,
    ) -> io.NodeOutput:
        """Of every input a list comes, as long as what is connected."""
        said = single(more)
        folder, trigger, class_name = (said.pop(k) for k in ("folder", "trigger", "class_name"))
        prompt = said.pop("prompt", "a {trigger} {class}")
        and_subject: Pictures | None = said.pop("and_subject", None)
        preset = said.pop("preset", NONE)
        if not f"{trigger}{class_name}".strip():
            raise SettingError(
                "trigger and class_name are empty: say what the pictures show, e.g. 'sks' and "
                "'dog'."
            )
        notices = [] if preset == NONE else [told(preset)]

        def note(event: Event) -> None:
            if isinstance(event, Notice):
                notices.append(event.text)

        data = with_preset(read_settings(DataConfig, said), preset)
        if images is None:
            found = open_pictures(files_of(folder, note), note)
        else:
            found = from_batches(images)
        if not data.use_captions:
            found = without_captions(found)
            if captions:
                notices.append("The captions have no effect: use_captions is off.")
        elif captions:
            found = with_captions(found, captions)
        if masks:
            found, data = with_masks(found, masks, note), replace(data, masked=True)
        pictures, prompt = prepare_captions(
            found, prompt, (trigger, class_name), add_trigger=data.add_trigger, observer=note
        )
        notices += check_pictures(pictures, data.resolution, masked=data.masked)
        notices += without_effect_in_data(data)
        readings = what_is_read(pictures, prompt, data, trigger.strip())
        every = [text for texts in readings for text in texts]
        notices += too_long(every, folders=[host.tokenizer_folder()])
        sheet = to_image([contact_sheet((p.image for p in pictures), [p.name for p in pictures])])
        text = " ".join([_sizes(pictures), f"Prompt: '{prompt}'.", *notices])
        text = "\n".join([text, *_table(pictures, readings)])
        others = (and_subject, *and_subject.others) if and_subject else ()
        trace = host.identity(cls).source("CNTLoRASubjectImages")
        trace |= {"run": f"{time.time_ns():x}", "text": text}
        traces = (trace, *(and_subject.traces if and_subject else ()))
        subject = Pictures(tuple(pictures), prompt, data, trigger.strip(), others, preset, traces)
        preview = ui.PreviewImage(sheet, cls=cls).as_dict()
        return io.NodeOutput(subject, sheet, ui=preview | {"text": (text,)} | shown(trace))


def _stamps(folder: str) -> str:
    """What changes when something in the folder does."""
    try:
        return stamps(p for file in files_of(folder) for p in file.sources)
    except (CNTLoRAError, OSError) as error:
        return str(error)


def _sizes(pictures: Sequence[Picture]) -> str:
    sides = sorted(min(p.size) for p in pictures)
    return f"{len(pictures)} pictures, shorter sides {sides[0]}-{sides[-1]} px."


def _table(pictures: Sequence[Picture], readings: Sequence[Sequence[str]]) -> list[str]:
    """What the model will read of each picture with a caption of its own."""
    captioned = [(p, texts) for p, texts in zip(pictures, readings, strict=True) if p.caption]
    rows = [
        f"{p.name}: {texts[0]}" + (f" ({len(texts)} orders)" if len(texts) > 1 else "")
        for p, texts in captioned[:SHOWN_CAPTIONS]
    ]
    more = len(captioned) - len(rows)
    return rows + ([f"and {more} more captions"] if more else [])


def _sources() -> list[Any]:
    return [
        io.Combo.Input(
            "folder",
            options=folders(),
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
            tooltip="Of every picture without a caption of its own; trigger and class in "
            "braces are filled in.",
        ),
    ]


def _wires() -> list[Any]:
    return [
        io.Image.Input(
            "images",
            optional=True,
            tooltip="Pictures from the graph, a batch or a list, used instead of the folder when "
            "connected.",
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


def _more() -> list[Any]:
    """Inputs that came later, and so stand at the end."""
    return [
        io.String.Input(
            "captions",
            optional=True,
            force_input=True,
            tooltip="A list of captions, one for each picture, or one for all: from a node that "
            "writes them. Used instead of caption files.",
        ),
        host.advanced(io.Combo)(
            "preset", options=list(PRESETS), default=NONE, optional=True, tooltip=help_text()
        ),
    ]
