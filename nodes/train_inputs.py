"""What a training in the graph is made from, and where its work is kept when it is stopped."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from ..cntlora_core.config import TrainConfig
from ..cntlora_core.data.encoded import EncodedImages, unvalidated, unvalidated_subjects
from ..cntlora_core.defaults import resolve
from ..cntlora_core.errors import CNTLoRAError
from ..cntlora_core.events import Event, Notice, Saved
from ..cntlora_core.files import Disk, free_name, remove_written
from ..cntlora_core.model.loader import StableDiffusion
from ..cntlora_core.presets import PRESETS
from ..cntlora_core.run.outcome import RunResult
from ..cntlora_core.training.identity import run_identity
from ..cntlora_core.training.prior_loss import (
    BasePrediction,
    ClassImages,
    OutsideTheMask,
    PriorLoss,
)
from ..cntlora_core.training.resume import RunSnapshots
from ..cntlora_core.training.validation import validation_loss
from . import host
from .reporter import Reporter
from .types import CalibratedStart, ClassPictures, LoRAModel, Pictures, lora_model
from .unfinished import GO_ON

SPARE = "cntlora-unsaved"  # in the loras folder: what was trained, until it is saved
SPARES = 4


@dataclass(frozen=True)
class TrainInputs:
    """What comes along the wires, encoded; `config` as people set it, `prior_loss` by its name."""

    model: StableDiffusion
    pictures: Pictures
    subject: EncodedImages
    held_out: EncodedImages
    start: CalibratedStart
    config: TrainConfig
    prior: ClassPictures | None
    prior_loss: str

    def resolved(self, report: Reporter) -> TrainConfig:
        """The settings with numbers where they say auto."""
        config, share = self.config, PRESETS[self.pictures.preset].steps
        if self.start.source and config.optimizer == "auto":
            config = replace(config, optimizer="adamw")  # a LoRA file holds no metric
        pictures, held = self.subject.picture_count, len(self.held_out)
        init = self.start.config.init
        return resolve(config, self.model.name, init, pictures, report, share=share, held_out=held)

    def identity(self, config: TrainConfig) -> dict[str, Any]:
        """What the run is made from and with."""
        same = run_identity(
            self.model,
            self.subject,
            self.held_out if config.validate_every else None,
            self.pictures.all_data,
            self.start.config,
            config,
            precision=str(self.model.dtype),
            start=self.start.made_from,
            continued=self.start.source and self.start.source.sha256,
            prior=prior_identity(self.prior.encoded if self.prior else None, self.prior_loss),
        )
        return same | self._made_otherwise(same["checkpoint's content"])

    def _made_otherwise(self, content: str) -> dict[str, Any]:
        """Where the start or the prior was made with another model or from pictures read in
        another way: most runs have nothing of it, and keep the identity that they had before this
        was told apart."""
        found: dict[str, Any] = {}
        for name, part in (("start", self.start), ("prior", self.prior)):
            if part and part.maker and part.maker.content != content:
                found[f"{name}'s checkpoint"] = part.maker.content
        if self.start.data and self.start.data != self.pictures.all_data:
            found["start's data"] = [asdict(one) for one in self.start.data]
        return found

    def second_loss(self) -> PriorLoss | None:
        if self.prior_loss == "masked":
            return OutsideTheMask(self.subject)
        if self.prior is None or self.prior_loss == "none":
            return None
        if self.prior_loss == "base":
            return BasePrediction(self.prior.encoded.conditioning[:1])
        return ClassImages(self.prior.encoded)

    def validation(self, config: TrainConfig) -> Callable[[], float] | None:
        if not config.validate_every:
            return None
        return validation_loss(
            self.model, self.held_out, config.batch_size, before_each=host.check_cancel
        )

    def finished(self, run: RunResult) -> LoRAModel:
        story = (self.start.config, run.training, run.kept_step, self.start.source)
        return lora_model(run.lora, self.model, self.subject, *story)


def _free_path(folder: str, step: int) -> Path:
    """In the loras folder, named by the moment and the step."""
    moment = time.strftime("%Y-%m-%d_%H%M%S")
    return free_name(host.lora_path(f"{folder}/{moment}_step{step}"))


def prior_identity(prior: EncodedImages | None, prior_loss: str) -> list[str]:
    """Of what the second loss depends on."""
    if prior_loss == "masked":
        return [prior_loss]
    if not prior or prior_loss == "none":
        return []
    return [prior_loss, prior.digest, prior.prompt, str(prior.resolution)]


def encoded(
    pictures: Pictures,
    validation: Pictures | None,
    config: TrainConfig,
    model: StableDiffusion,
    report: Reporter,
) -> tuple[EncodedImages, EncodedImages]:
    """What is trained on, and what validates. A picture is held out only where it is needed for
    that."""
    if validation is None and config.validate_every:
        subject, held_out = pictures.encode(model, report)
        for text in unvalidated(subject, held_out):
            report(Notice(text))
        return subject, held_out
    subject = pictures.encode_all(model, report)
    if validation is None:
        return subject, subject
    if validation.prompt != pictures.prompt:
        said = (
            f"The pictures to validate with say '{validation.prompt}', those to train on "
            f"'{pictures.prompt}': the best weights are chosen by other words. Give both the same "
            "trigger and class_name."
        )
        report(Notice(said))
    held_out = validation.encode_all(model, report)
    for text in unvalidated_subjects(subject, held_out):
        report(Notice(text))
    return subject, held_out


def without_effect(
    config: TrainConfig, validation: Pictures | None, prior: bool, prior_loss: str
) -> list[str]:
    """Inputs that do nothing beside the others, a sentence each."""
    rules = [
        (
            validation is not None and not config.validate_every,
            "The pictures to validate with have no effect: validate_every is 0.",
        ),
        (
            not prior and prior_loss == "base",
            "prior_loss has no effect: no prior is connected.",
        ),
        (
            prior and prior_loss in ("none", "masked"),
            f"The prior has no effect on training: prior_loss is {prior_loss}.",
        ),
    ]
    return [text for holds, text in rules if holds]


@dataclass
class Keeper:
    """Saves what a run has learnt when it is stopped, and says where."""

    inputs: TrainInputs
    report: Reporter
    disk: Disk
    places: list[str] = field(default_factory=list, init=False)

    def keep(self, run: RunResult) -> None:
        if not run.steps:
            return
        path = _free_path("cntlora-interrupted", run.kept_step)
        saved = self.inputs.finished(run).write(path, observer=self._note, disk=self.disk)
        name = host.lora_name(saved)
        elsewhere = saved.is_absolute() and name == str(saved)
        self.places.append(name if elsewhere else f"loras/{name}")
        self.report.note(Saved(self.places[-1]))

    def spare(self, lora: LoRAModel, step: int) -> Path | None:
        """A finished LoRA on disk until Save LoRA has run: another node may fail before that, or
        ComfyUI. Of those that nobody saves the last few stay."""
        try:
            path = _free_path(SPARE, step)
            written = lora.write(path, disk=self.disk)
        except CNTLoRAError as error:
            self.report.note(Notice(f"Until Save LoRA has run the LoRA is on no disk: {error}"))
            return None
        for old in sorted(path.parent.glob(f"{'[0-9]' * 4}-*_step*.safetensors"))[:-SPARES]:
            remove_written(old)
        return written

    @contextmanager
    def keeping(self, run: RunResult) -> Iterator[None]:
        """Around what comes after a training: to be stopped there costs nothing of it."""
        try:
            yield
        except BaseException:
            self.keep(run)
            raise

    def _note(self, event: Event) -> None:
        if isinstance(event, Notice):
            self.report.note(event)

    @contextmanager
    def telling_where(self, checkpoints: RunSnapshots) -> Iterator[None]:
        """An error says where the work is, and how to go on."""
        try:
            yield
        except CNTLoRAError as error:
            for place in self.places:
                error.add_sentence(f"What was trained is in {place}.")
            raise
        except host.Cancelled:
            if checkpoints.failure:
                self.report.note(Notice(checkpoints.failure))
            elif checkpoints.ours:
                first = "" if checkpoints.resume else f"Set unfinished to '{GO_ON}': "
                said = f"{first}queue the same graph again and the run goes on where it stopped."
                said = said[0].upper() + said[1:]
                self.report.note(Notice(said))
            raise
