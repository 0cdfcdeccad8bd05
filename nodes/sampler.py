"""Samples while a LoRA trains."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from PIL import Image

from ..cntlora_core.data.dataset import size_step
from ..cntlora_core.errors import CNTLoRAError, SettingError
from ..cntlora_core.events import Event, Notice, Step, Training
from ..cntlora_core.lora.adapter import attached_lora
from ..cntlora_core.model.loader import StableDiffusion
from ..cntlora_core.model.sampling import sample
from ..cntlora_core.run.outcome import RunResult
from . import host
from .host import io
from .reporter import Reporter

SAMPLES = 4  # pictures each time, of one prompt
MOST_PROMPTS = 8
MOST_PIXELS = 4 * 1024**2


@dataclass(frozen=True)
class Wanted:
    """What to draw, every so many steps: `prompt` has one a line, `size` is "auto" or "512x768"
    (width, height, px)."""

    every: int = 50
    prompt: str = ""
    negative: str = ""
    seed: int = 0
    size: str = "auto"

    def prompts(self, usual: str) -> list[str]:
        """One for each picture; `usual` where nothing is said."""
        lines = [line.strip() for line in self.prompt.splitlines() if line.strip()]
        lines = lines[:MOST_PROMPTS] or [usual]
        return [line for line in lines for _ in range(max(1, SAMPLES // len(lines)))]

    def height_width(self, model: StableDiffusion) -> tuple[int, int]:
        """In px. Raises SettingError for a size that the model cannot draw."""
        if self.size.strip().lower() in ("", "auto"):
            return model.resolution, model.resolution
        match, multiple = re.fullmatch(r"\s*(\d+)\s*[xX*]\s*(\d+)\s*", self.size), size_step(model)
        width, height = (int(match[1]), int(match[2])) if match else (0, 0)
        fits = width and height and not (width % multiple or height % multiple)
        if not fits or width * height > MOST_PIXELS:
            raise SettingError(
                f"sample_size is '{self.size}': say auto, or width x height in multiples of "
                f"{multiple} px up to 4 megapixels, e.g. '{model.resolution}x{model.resolution}'."
            )
        return height, width


def sample_widgets() -> list[Any]:
    """Of the Train node, those that came first."""
    return [
        host.advanced(io.Int)(
            "sample_every",
            default=50,
            optional=True,
            min=0,
            max=100_000,
            tooltip="Draw samples at step 0 and after every so many steps; 0: none. Often "
            "is pretty but slows training.",
        ),
        host.advanced(io.String)(
            "sample_prompt",
            default="",
            optional=True,
            multiline=True,
            tooltip="What to draw, a prompt a line (8 at most); empty: the training prompt. One "
            "prompt is drawn from four seeds.",
        ),
    ]


def more_sample_widgets() -> list[Any]:
    """Those that came later, and so stand at the end."""
    return [
        host.advanced(io.String)(
            "sample_negative",
            default="",
            optional=True,
            tooltip="What samples should not show.",
        ),
        host.advanced(io.Int)(
            "sample_seed",
            default=0,
            optional=True,
            min=0,
            max=2**32 - 1,
            control_after_generate=False,
            tooltip="Noise of the first sample of each prompt; the others count up.",
        ),
        host.advanced(io.String)(
            "sample_size",
            default="auto",
            optional=True,
            tooltip="Width x height of samples in px, e.g. 512x768; auto: the model's own.",
        ),
    ]


class Sampler:
    """An observer that draws samples between steps and passes every event on. A failed sample never
    stops training."""

    def __init__(
        self, model: StableDiffusion, wanted: Wanted, usual: str, report: Reporter
    ) -> None:
        self.model, self.wanted, self.report = model, wanted, report
        self.prompts, self.size = wanted.prompts(usual), wanted.height_width(model)
        self.pictures = [Image.new("RGB", self.size[::-1], "white")]

    def __call__(self, event: Event) -> None:
        self.report(event)
        if isinstance(event, Training):
            if event.done:
                self.report(Notice(f"Goes on after step {event.done} of the run that was stopped."))
            self.draw(event.done)
        every = self.wanted.every
        if (
            isinstance(event, Step)
            and every
            and (event.step % every == 0 or event.step == self.report.steps)
        ):
            self.draw(event.step)

    def finish(self, run: RunResult) -> None:
        """Draw with the weights that are given out, where they are not those of the last samples,
        or not at their strength."""
        if run.kept_step != run.steps or run.strength != 1:
            with attached_lora(self.model.unet, run.lora):
                self.draw(run.kept_step)
        self.report.kept(run.kept_step)

    def draw(self, step: int) -> None:
        if not self.wanted.every:
            return
        each = len(self.prompts) // len(dict.fromkeys(self.prompts))
        seeds = [self.wanted.seed + n % each for n in range(len(self.prompts))]
        try:
            self.pictures = sample(
                self.model,
                self.prompts,
                seeds,
                steps=20,
                negative=self.wanted.negative,
                size=self.size,
                observer=_cancel_only,
            )
            self.report.picture(step, self.pictures)
        except (CNTLoRAError, RuntimeError, OSError) as error:
            text = f"The samples of step {step} could not be drawn ({error}); training goes on."
            self.report(Notice(text))


def _cancel_only(event: Event) -> None:
    host.check_cancel()
