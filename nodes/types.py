"""What runs along the wires between CNTLoRA's nodes, and pictures in ComfyUI's form."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..cntlora_core.calibration.calibrate import Calibration
from ..cntlora_core.config import CalibrationConfig, DataConfig, RunConfig, TrainConfig
from ..cntlora_core.data.concepts import join_concepts
from ..cntlora_core.data.dataset import encode_subject
from ..cntlora_core.data.decoding import fitted_mask
from ..cntlora_core.data.encoded import EncodedImages, with_validation
from ..cntlora_core.data.images import Picture
from ..cntlora_core.errors import ImageError, SettingError
from ..cntlora_core.events import Notice, Observer, ignore
from ..cntlora_core.files import DISK, Disk, check_space
from ..cntlora_core.lora.adapter import LoRA
from ..cntlora_core.lora.file import to_state_dict
from ..cntlora_core.lora.metadata import Source
from ..cntlora_core.lora.targets import ALL, find_projections
from ..cntlora_core.model.loader import StableDiffusion
from ..cntlora_core.presets import NONE
from ..cntlora_core.run.saving import save_run
from ..cntlora_core.training.state_size import parameters_of
from . import host
from .host import io

Traces = tuple[dict[str, str], ...]  # what nodes before show of themselves: a run, or words
SHOWN_PX = 256  # the miniature's pictures have 64

SDModel = io.Custom("CNTLORA_SD_MODEL")
SubjectPictures = io.Custom("CNTLORA_SUBJECT")
Prior = io.Custom("CNTLORA_PRIOR")
LoRAInit = io.Custom("CNTLORA_INIT")
Settings = io.Custom("CNTLORA_SETTINGS")


@dataclass(frozen=True)
class Pictures:
    """Pictures of a subject and what to call it; no model has seen them yet. `others` are learnt in
    the same run."""

    pictures: tuple[Picture, ...]
    prompt: str
    data: DataConfig
    trigger: str = ""
    others: tuple[Pictures, ...] = ()
    preset: str = NONE
    traces: Traces = ()

    def encode(
        self, model: StableDiffusion, observer: Observer
    ) -> tuple[EncodedImages, EncodedImages]:
        """What to fit, and what to validate with when nobody connects pictures for it."""
        everything = self.encode_all(model, observer)
        return with_validation(everything) if self.data.hold_out else (everything, everything)

    def encode_all(self, model: StableDiffusion, observer: Observer) -> EncodedImages:
        """All of them, those of the others too."""
        parts = [part._encode_own(model, observer) for part in (self, *self.others)]
        return join_concepts(parts, observer=observer)

    def _encode_own(self, model: StableDiffusion, observer: Observer) -> EncodedImages:
        """What the same model has encoded before is found beside it."""
        seen = tuple((p.name, p.digest, p.caption, p.repeats, p.group) for p in self.pictures)
        key = (seen, self.prompt, self.trigger, self.data)
        held: EncodedImages | None = model.encoded.get(key)
        if held is None:
            held = encode_subject(
                model,
                self.pictures,
                self.prompt,
                self.data,
                trigger=self.trigger,
                observer=observer,
            ).to("cpu")
            model.encoded.put(key, held, held.nbytes)
        return held.to(model.device)


@dataclass(frozen=True)
class ExtraSettings:
    """Settings of a training beside those on the Train node: TrainConfig's fields, and the kind of
    prior loss."""

    fields: dict[str, Any] = field(default_factory=dict)
    prior_loss: str = RunConfig.prior_loss


@dataclass(frozen=True)
class CalibratedStart:
    """A LoRA to train from, and how it was made; no calibration: an ordinary start, made then.
    `made_from` tells the pictures apart that it was calibrated on."""

    calibration: Calibration | None
    config: CalibrationConfig
    source: Source | None = None  # the file that it was read from
    made_from: str = ""
    traces: Traces = ()


class LoRAModel(dict[str, Tensor]):
    """ComfyUI's LORA_MODEL, a state dict in kohya's names, that can also write itself with its
    whole story, and knows the prompt it was trained with and what the nodes before show."""

    write: Callable[..., Path]
    prompt: str
    traces: Traces = ()


def lora_model(
    lora: LoRA,
    model: StableDiffusion,
    subject: EncodedImages,
    config: CalibrationConfig,
    training: TrainConfig | None = None,
    steps: int = 0,
    source: Source | None = None,
) -> LoRAModel:
    state = LoRAModel(to_state_dict(lora, model.family))

    def save(
        path: Path,
        dtype: torch.dtype = torch.float32,
        observer: Observer = ignore,
        disk: Disk = DISK,
    ) -> Path:
        with suppress(OSError):
            path.parent.mkdir(parents=True, exist_ok=True)
        return save_run(
            path,
            lora,
            model,
            subject,
            steps=steps,
            calibration=config,
            training=training,
            source=source,
            dtype=dtype,
            elsewhere=host.other_folders(),
            disk=disk,
            observer=observer,
        )

    state.write, state.prompt = save, subject.prompt
    return state


def check_model(model: StableDiffusion, lora: LoRA) -> None:
    """Raises SettingError for a start that another kind of model was calibrated for."""
    layers = {p.name: (p.out_features, p.in_features) for p in find_projections(model.unet, ALL)}
    made_for = {name: (len(f.up), f.down.shape[1]) for name, f in lora.items()}
    if not made_for.items() <= layers.items():
        raise _of_another_kind("lora_init was made for", model)


def check_prior(model: StableDiffusion, prior: EncodedImages | None) -> None:
    """Raises SettingError for one whose words another kind of model read."""
    width = model.unet.config.cross_attention_dim
    if prior is not None and prior.conditioning.tokens.shape[-1] != width:
        raise _of_another_kind("prior was made with", model)


def _of_another_kind(made: str, model: StableDiffusion) -> SettingError:
    return SettingError(
        f"{made} another kind of model than '{model.name}': connect the same sd_model to both "
        "nodes."
    )


def check_room(model: StableDiffusion, config: CalibrationConfig, lora: LoRA | None = None) -> None:
    """Refuse to start what the loras folder has no space for. Raises OutputError."""
    check_space(host.lora_path("lora"), 4 * parameters_of(model, config, lora), "the LoRA")


def to_image(pictures: Sequence[Image.Image]) -> Tensor:
    """Pictures of one size as ComfyUI's IMAGE: `[n, h, w, 3]` fp32, 0 to 1."""
    return torch.from_numpy(
        np.stack([np.asarray(p.convert("RGB"), dtype=np.float32) / 255 for p in pictures])
    )


def large_enough(picture: Image.Image) -> Image.Image:
    """The picture, in a whole multiple of its size where that is too small to be looked at: a page
    shows none larger than it is."""
    times = max(1, SHOWN_PX // max(picture.size))
    return picture.resize((picture.width * times, picture.height * times), Image.Resampling.BICUBIC)


def from_image(batch: Tensor) -> list[Image.Image]:
    """The other way, what is transparent on white."""
    if batch.shape[-1] == 4:
        batch = 1 - (1 - batch[..., :3]) * batch[..., 3:]
    elif batch.shape[-1] < 3:
        batch = batch[..., :1].expand(*batch.shape[:-1], 3)
    array = (batch[..., :3].detach().cpu().float().clamp(0, 1) * 255).round().byte().numpy()
    return [Image.fromarray(np.ascontiguousarray(a)) for a in array]


def from_batches(batches: Sequence[Tensor]) -> list[Picture]:
    """A list of ComfyUI's IMAGEs, of any sizes, as pictures named by their number. Raises
    ImageError for none."""
    images = [image for batch in batches for image in from_image(batch)]
    if not images:
        raise ImageError("No pictures came in: the node that gives them let none through.")
    return [
        Picture(f"image {n}", image, hashlib.sha256(image.tobytes()).hexdigest())
        for n, image in enumerate(images, 1)
    ]


def with_captions(pictures: Sequence[Picture], texts: Sequence[str]) -> list[Picture]:
    """The pictures with a caption each, or one for all; an empty one stays the prompt's. Raises
    ImageError for another number."""
    if len(texts) not in (1, len(pictures)):
        raise ImageError(
            f"{len(texts)} captions for {len(pictures)} pictures: connect one for each picture, or "
            "one for all."
        )
    lines = [" ".join(str(text).split()) for text in texts]
    return [
        replace(p, caption=lines[n % len(lines)] or None, caption_file="captions")
        for n, p in enumerate(pictures)
    ]


def with_masks(
    pictures: Sequence[Picture], masks: Sequence[Tensor], observer: Observer
) -> list[Picture]:
    """The pictures with ComfyUI's MASKs `[n, h, w]` (or `[h, w]`), 1 where the subject is: one
    each, or one for all. Raises ImageError for another number."""
    plain = [m for mask in masks for m in mask.detach().cpu().float().reshape(-1, *mask.shape[-2:])]
    if len(plain) not in (1, len(pictures)):
        raise ImageError(
            f"{len(plain)} masks for {len(pictures)} pictures: connect one mask for each picture, "
            "or one for all."
        )
    shapes = [Image.fromarray((m.clamp(0, 1) * 255).round().byte().numpy()) for m in plain]
    masked = []
    for n, picture in enumerate(pictures):
        said: list[str] = []
        shape = fitted_mask(shapes[n % len(shapes)], picture.size, said)
        for text in said:
            observer(Notice(f"'{picture.name}': {text}."))
        if shape is None:
            masked.append(picture)
            continue
        digest = hashlib.sha256(picture.digest.encode() + shape.tobytes()).hexdigest()
        masked.append(replace(picture, held_mask=shape, digest=digest, mask_file="MASK"))
    return masked
