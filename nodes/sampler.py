"""Samples while a LoRA trains."""

from __future__ import annotations

from PIL import Image

from ..cntlora_core.events import Event, Notice, Step, Training
from ..cntlora_core.lora.adapter import attached_lora
from ..cntlora_core.model.loader import StableDiffusion
from ..cntlora_core.model.sampling import sample
from ..cntlora_core.run.outcome import RunResult
from . import host
from .reporter import Reporter

SAMPLES = 4
SAMPLE_SEED = 0


class Sampler:
    """An observer that draws samples between steps and passes every event on. A failed sample never
    stops training."""

    def __init__(self, model: StableDiffusion, prompt: str, every: int, report: Reporter) -> None:
        self.model, self.prompt, self.every, self.report = model, prompt, every, report
        self.pictures = [Image.new("RGB", (model.resolution, model.resolution), "white")]
        self.losses: list[float] = []

    def __call__(self, event: Event) -> None:
        if isinstance(event, Step):
            self.losses.append(event.loss)
        self.report(event)
        if isinstance(event, Training):
            self.draw(event.done)
        if (
            isinstance(event, Step)
            and self.every
            and (event.step % self.every == 0 or event.step == self.report.steps)
        ):
            self.draw(event.step)

    def finish(self, run: RunResult) -> None:
        """Draw with the weights that are given out, where they are not those of the last
        samples."""
        if run.kept_step != run.steps:
            with attached_lora(self.model.unet, run.lora):
                self.draw(run.kept_step)
        self.report.kept(run.kept_step)

    def draw(self, step: int) -> None:
        if not self.every:
            return
        seeds = range(SAMPLE_SEED, SAMPLE_SEED + SAMPLES)
        try:
            self.pictures = sample(
                self.model, [self.prompt] * SAMPLES, seeds, steps=20, observer=_cancel_only
            )
            self.report.picture(step, self.pictures)
        except (RuntimeError, OSError) as error:
            text = f"The samples of step {step} could not be drawn ({error}); training goes on."
            self.report(Notice(text))


def _cancel_only(event: Event) -> None:
    host.check_cancel()
