"""What `cntlora train` and `cntlora calibrate` read: a LoRA to go on from, pictures, the class."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from ..config import DataConfig, RunConfig
from ..data.captions import fill_words
from ..data.concepts import join_concepts
from ..data.dataset import read_subject
from ..data.encoded import (
    EncodedImages,
    unvalidated,
    unvalidated_subjects,
    with_validation,
)
from ..distributed import Group
from ..events import Notice, Observer
from ..lora.adapter import LoRA
from ..lora.continuing import ContinuedLoRA, continued_lora
from .checks import class_preserved, uncalled
from .options import settings_from

if TYPE_CHECKING:
    from ..data.batches import NoisedSet
    from ..model.loader import StableDiffusion
    from ..training.prior_loss import PriorLoss


@dataclass(frozen=True)
class Inputs:
    """`continued`: a LoRA to go on from. `held_out`: to validate with."""

    continued: ContinuedLoRA | None
    subject: EncodedImages
    held_out: EncodedImages

    @property
    def lora(self) -> LoRA | None:
        return self.continued.lora if self.continued else None


def read_inputs(
    args: argparse.Namespace, model: StableDiffusion, data: DataConfig, observer: Observer
) -> Inputs:
    continued = None
    if args.continue_from:
        shared = args.continue_shared
        continued = continued_lora(args.continue_from, model, shared=shared, observer=observer)
    return Inputs(continued, *_pictures(args, model, data, observer))


def _pictures(
    args: argparse.Namespace, model: StableDiffusion, data: DataConfig, observer: Observer
) -> tuple[EncodedImages, EncodedImages]:
    """What to train on, of --images and every --and-subject, and what to validate with."""
    from ..data.latent_cache import LatentCache

    cache = LatentCache(args.cache, *model.pictures.modules) if args.cache else None

    def read(folder: str, trigger: str, class_name: str, masks: str | None = None) -> EncodedImages:
        subject = read_subject(
            model,
            folder,
            args.prompt,
            data,
            words=(trigger, class_name),
            masks=masks,
            cache=cache,
            observer=observer,
        )
        of_pictures = dict(zip(subject.pictures, subject.captions, strict=True))
        for text in uncalled([*of_pictures.values()], subject.prompt, trigger):
            observer(Notice(text))
        return subject

    parts = [read(args.images, args.trigger, args.class_name, args.masks)]
    parts += [read(*other) for other in args.and_subject]
    subject = join_concepts(parts, observer=observer)
    if args.validation_images:
        held_out = read(args.validation_images, args.trigger, args.class_name)
        for text in unvalidated_subjects(subject, held_out):
            observer(Notice(text))
        return subject, held_out
    if args.validate_every and data.hold_out:
        training, held_out = with_validation(subject)
        for text in unvalidated(training, held_out):
            observer(Notice(text))
        return training, held_out
    return subject, subject


def validation(
    args: argparse.Namespace, model: StableDiffusion, held_out: EncodedImages, group: Group
) -> Callable[[], float] | None:
    from ..training.validation import validation_loss

    if not args.validate_every:
        return None
    return validation_loss(model, held_out, args.batch_size, group)


def read_priors(
    args: argparse.Namespace,
    model: StableDiffusion,
    subject: EncodedImages,
    data: DataConfig,
    observer: Observer,
) -> tuple[NoisedSet | None, PriorLoss | None]:
    """What calibration preserves, and the second loss of training; pictures of the class only where
    one of them wants some."""
    from ..data.class_images import class_noised
    from ..model.conditioning import encode_prompts
    from ..training.prior_loss import BasePrediction, ClassImages, OutsideTheMask

    preserves = class_preserved(args)
    pictures, class_prompt = None, fill_words(args.class_prompt or "", "", args.class_name)
    if preserves or args.prior_loss == "images":
        pictures = _class_pictures(args, class_prompt, model, subject.resolution, data, observer)
    prior: PriorLoss | None = None
    if args.prior_loss == "images":
        assert pictures is not None
        prior = ClassImages(pictures)
    elif args.prior_loss == "base":
        side = (subject.resolution, subject.resolution)
        prior = BasePrediction(encode_prompts(model, [class_prompt], size=side))
    elif args.prior_loss == "masked":
        prior = OutsideTheMask(subject)
    return class_noised(model, pictures) if pictures and preserves else None, prior


def _class_pictures(
    args: argparse.Namespace,
    class_prompt: str,
    model: StableDiffusion,
    resolution: int,
    data: DataConfig,
    observer: Observer,
) -> EncodedImages:
    from ..data.class_images import MEASURED, TRAINED, class_images

    if args.class_images:
        words = ("", args.class_name)
        return read_subject(
            model,
            args.class_images,
            class_prompt,
            replace(data, masked=False),
            words=words,
            observer=observer,
        )
    usual, usual_steps = TRAINED if args.prior_loss == "images" else MEASURED
    how = settings_from(RunConfig, args)
    return class_images(
        model,
        class_prompt,
        resolution,
        count=how.class_count or usual,
        steps=how.class_steps or usual_steps,
        folder=Path(args.cache) if args.cache else None,
        observer=observer,
    )
