"""What runs along the wires between CNTLoRA's nodes."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..cntlora_core.calibration.calibrate import Calibration
from ..cntlora_core.config import CalibrationConfig, DataConfig, RunConfig, TrainConfig
from ..cntlora_core.data.concepts import join_concepts
from ..cntlora_core.data.dataset import encode_subject
from ..cntlora_core.data.encoded import EncodedImages, with_validation
from ..cntlora_core.data.images import Picture
from ..cntlora_core.events import Notice, Observer, ignore
from ..cntlora_core.files import DISK, Disk
from ..cntlora_core.lora.adapter import LoRA
from ..cntlora_core.lora.file import to_state_dict
from ..cntlora_core.lora.metadata import Source
from ..cntlora_core.model.fingerprint import fingerprint
from ..cntlora_core.model.loader import StableDiffusion
from ..cntlora_core.presets import NONE
from ..cntlora_core.run.saving import save_run
from . import host
from .host import io

Traces = tuple[dict[str, str], ...]  # what nodes before show of themselves: a run, or words

SDModel = io.Custom("CNTLORA_SD_MODEL")
SubjectPictures = io.Custom("CNTLORA_SUBJECT")
Prior = io.Custom("CNTLORA_PRIOR")
LoRAInit = io.Custom("CNTLORA_INIT")
Settings = io.Custom("CNTLORA_SETTINGS")


@dataclass(frozen=True, repr=False)
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

    def __repr__(self) -> str:
        return f"<{len(self.pictures)} pictures of '{self.prompt}'>"

    @property
    def all_data(self) -> tuple[DataConfig, ...]:
        """How the pictures are read, those of the others too."""
        return tuple(part.data for part in (self, *self.others))

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
class Maker:
    """The model that something was made with: its name, and what tells it from others, which is
    read while the model works: lent weights are with it only then."""

    name: str
    content: str

    @classmethod
    def of(cls, model: StableDiffusion) -> Maker:
        return cls(model.name, fingerprint(model)[:16])


# ComfyUI writes every input of a node that failed into its answer: a tensor's numbers would be
# megabytes there. Hence the short words for what runs along the wires.


@dataclass(frozen=True, repr=False)
class ClassPictures:
    """Pictures of the class as a model encodes them."""

    encoded: EncodedImages
    maker: Maker

    def __repr__(self) -> str:
        return f"<{len(self.encoded)} pictures of '{self.encoded.prompt}'>"


@dataclass(frozen=True, repr=False)
class CalibratedStart:
    """A LoRA to train from, and how it was made; no calibration: an ordinary start, made then.
    `made_from` tells the pictures apart that it was calibrated on, `data` is how they were read,
    `maker` what it was calibrated for (a file's LoRA is for any of its kind)."""

    calibration: Calibration | None
    config: CalibrationConfig
    source: Source | None = None  # the file that it was read from
    made_from: str = ""
    data: tuple[DataConfig, ...] = ()
    maker: Maker | None = None
    traces: Traces = ()

    def __repr__(self) -> str:
        return f"<a start with {self.config.init}>"


class LoRAModel(dict[str, Tensor]):
    """ComfyUI's LORA_MODEL, a state dict in kohya's names, that can also write itself with its
    whole story, and knows the prompt it was trained with and what the nodes before show."""

    write: Callable[..., Path]
    prompt: str
    traces: Traces = ()
    spare: Path | None = None  # where it lies until it is saved

    def __repr__(self) -> str:
        return f"<a LoRA of '{self.prompt}', {len(self)} tensors>"


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
        saved = save_run(
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
        if host.is_temporary(saved):
            observer(Notice("ComfyUI empties that folder when it starts or ends: move the file."))
        return saved

    state.write, state.prompt = save, subject.prompt
    return state
