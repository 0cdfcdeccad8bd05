"""A LoRA goes to a file with its whole story, or to another place than the one that fails."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from ..config import CalibrationConfig, TrainConfig
from ..data.encoded import EncodedImages
from ..errors import OutputError
from ..events import Notice, Observer, Saved, ignore
from ..files import DISK, Disk, other_places
from ..lora.adapter import LoRA
from ..lora.file import overflows, save_lora
from ..lora.metadata import Source, Taught, describe

if TYPE_CHECKING:
    from ..model.loader import StableDiffusion


def save_run(
    path: str | os.PathLike[str],
    lora: LoRA,
    model: StableDiffusion,
    subject: EncodedImages,
    *,
    steps: int,
    calibration: CalibrationConfig,
    training: TrainConfig | None = None,
    source: Source | None = None,
    dtype: torch.dtype = torch.float32,
    overwrite: bool = False,
    elsewhere: Sequence[Path] = (),
    disk: Disk = DISK,
    observer: Observer = ignore,
) -> Path:
    """Save a LoRA with its whole story in the metadata, and tell where it is.

    What cannot be written at `path` is written under a free name beside it, or in one of the
    folders `elsewhere`; weights too large for `dtype` are written in fp32. Raises OutputError when
    no place takes it.
    """
    if dtype != torch.float32 and overflows(lora, dtype):
        observer(Notice("Weights of the LoRA are too large for its precision: it is in fp32."))
        dtype = torch.float32

    def save(place: Path) -> Path:
        metadata = describe(
            lora,
            family=model.family,
            prediction=model.schedule.prediction,
            title=place.stem,
            model_name=model.name,
            taught=_taught(subject),
            steps=steps,
            calibration=calibration,
            training=training,
            source=source,
            clip_skip=model.prompts.clip_skip,
            max_tokens=model.prompts.max_tokens,
        )
        return save_lora(
            place, lora, model.family, metadata, dtype=dtype, overwrite=overwrite, disk=disk
        )

    try:
        saved = save(Path(path))
    except OutputError as error:
        saved = _save_elsewhere(save, other_places(Path(path), elsewhere), error)
        again = saved == Path(path)
        where = "A second try succeeded." if again else f"The LoRA is in '{saved}' instead."
        observer(Notice(f"{error} {where}"))
    observer(Saved(str(saved)))
    return saved


def _save_elsewhere(
    save: Callable[[Path], Path], places: Iterable[Path], first: OutputError
) -> Path:
    tried = []
    for place in places:
        with suppress(OutputError):
            return save(place)
        tried.append(f"'{place}'")
    first.add_sentence(f"Tried in vain: {', '.join(tried)}.")
    raise first


def _taught(subject: EncodedImages) -> Taught:
    """The pictures as the metadata tell of them; several views of a picture are one. A prompt
    that none of them was shown with calls nothing."""
    captions = subject.captions or (subject.prompt,) * len(subject)
    views = zip(captions, subject.repeats, strict=True)
    return Taught(
        subject.trigger or (subject.prompt if subject.prompt in captions else ""),
        tuple(dict(zip(subject.pictures, views, strict=True)).values()),
        subject.resolution,
        subject.digest,
    )
