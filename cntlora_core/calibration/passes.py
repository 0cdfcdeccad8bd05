"""The passes of a calibration: what it measures, looks at and refines with."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from ..config import CalibrationConfig
from ..data.batches import Batch, NoisedSet, batch_order, draw_batch, mean_loss
from ..data.importance import Importance
from ..distributed import Group
from ..events import Observer
from ..lora.adapter import LoRA, attached_lora
from ..lora.targets import Projection
from .constraints import Metric
from .measure import Sweep, measure
from .natural import NaturalStart
from .refine import refine
from .sketch import sketch_width

if TYPE_CHECKING:
    from ..data.encoded import EncodedImages
    from ..model.loader import StableDiffusion


@dataclass
class Passes:
    """The passes of a calibration, `at_once` pictures each, and their number in single pictures."""

    model: StableDiffusion
    config: CalibrationConfig
    at_once: int
    observer: Observer
    group: Group
    forward: int = 0
    backward: int = 0

    def add(self, pictures: int, *, backward: bool) -> None:
        self.forward += pictures
        self.backward += pictures if backward else 0

    def measure(
        self, projections: Sequence[Projection], triples: NoisedSet, backward: bool, phase: str
    ) -> Sweep:
        self.add(len(triples), backward=backward)
        return measure(
            self.model, projections, triples,
            batch_size=self.at_once, backward=backward, phase=phase,
            width=sketch_width(self.config.rank),
            gradient_checkpointing=self.config.gradient_checkpointing,
            observer=self.observer, group=self.group,
        )  # fmt: skip

    def metric(self, projections: Sequence[Projection], prior: NoisedSet | None) -> Metric:
        """That of the config, with C_p where there is a prior; it waits on the host until the
        sweep, which takes most of the device, is over."""
        if prior is None or not self.config.preservation:
            return Metric(self.config.rho)
        kept = self.measure(projections, prior, backward=False, phase="measuring the prior").moments
        metric = Metric(self.config.rho, kept, self.config.preservation)
        return metric.on(torch.device("cpu"))

    def refined(
        self,
        subject: EncodedImages,
        lora: LoRA,
        start: NaturalStart,
        importance: Importance,
        generator: torch.Generator,
    ) -> tuple[LoRA, NaturalStart]:
        """After the config's number of small steps."""
        config, group = self.config, self.group
        self.add(config.refinements * config.batch_size * group.size, backward=True)
        timesteps = len(self.model.schedule)
        batches = _batches(subject, config, timesteps, generator, group, importance)
        return refine(
            self.model, lora, start, batches, config.refinements,
            at_once=self.at_once, gradient_checkpointing=config.gradient_checkpointing,
            observer=self.observer, group=group,
        )  # fmt: skip

    def loss(self, triples: NoisedSet, lora: LoRA) -> float:
        self.add(len(triples), backward=False)
        with attached_lora(self.model.unet, lora):
            return mean_loss(self.model, triples, self.at_once, self.group)


def _batches(
    subject: EncodedImages,
    config: CalibrationConfig,
    timesteps: int,
    generator: torch.Generator,
    group: Group,
    importance: Importance | None,
) -> Iterator[Batch]:
    """This process's part of fresh batches for the refinement, drawn as they are asked for: more of
    them leave the first as they are."""
    order = batch_order(
        subject,
        config.batch_size * group.size,
        config.refinements,
        torch.Generator().manual_seed(config.seed),
        importance,
    )
    for turn, index in enumerate(order):
        batch = draw_batch(subject, index, timesteps, generator, importance, turn)
        yield batch[group.rank :: group.size]
