"""Train LoRA (DreamBooth)."""

from __future__ import annotations

import time

from PIL import Image

from ..cntlora_core.calibration.calibrate import continued
from ..cntlora_core.config import CalibrationConfig, TrainConfig
from ..cntlora_core.data.dataset import EncodedImages
from ..cntlora_core.defaults import default_lr
from ..cntlora_core.errors import CNTLoRAError
from ..cntlora_core.events import Event, Notice, Saved, Step, Training
from ..cntlora_core.lora.adapter import attached_lora
from ..cntlora_core.model.loader import StableDiffusion
from ..cntlora_core.model.sampling import sample
from ..cntlora_core.run import RunResult, run_training
from ..cntlora_core.training.prior_loss import BasePrediction, ClassImages, PriorLoss
from ..cntlora_core.training.validation import validation_loss
from . import host
from .host import io
from .paths import free_name
from .reporter import Reporter
from .types import (
    CalibratedStart,
    ExtraSettings,
    LoRAInit,
    LoRAModel,
    Pictures,
    Prior,
    SDModel,
    Settings,
    SubjectPictures,
    lora_model,
    to_image,
)

SAMPLES = 4
SAMPLE_SEED = 0
ORDINARY = CalibrationConfig(init="gaussian")  # the start when none is connected


class TrainLoRA(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        default = TrainConfig()
        return host.schema(
            node_id="CNTLoRATrain",
            display_name="Train LoRA (CNTLoRA)",
            category="training/CNTLoRA",
            search_aliases=["dreambooth", "fine-tune", "finetune", "train lora", "personalise"],
            description="Trains the LoRA on the pictures (DreamBooth). Cancel stops within one "
            "step and keeps the work.",
            inputs=[
                SDModel.Input("sd_model", tooltip="From Load SD Checkpoint."),
                SubjectPictures.Input("subject", tooltip="From Subject Images."),
                LoRAInit.Input(
                    "lora_init",
                    optional=True,
                    tooltip="From Calibrate LoRA. Without it an ordinary LoRA of rank 4 is "
                    "trained.",
                ),
                SubjectPictures.Input(
                    "validation",
                    optional=True,
                    tooltip="Other pictures of the same subject, never trained on: their loss "
                    "shows when training overfits. Without it, what Subject Images holds out.",
                ),
                Prior.Input(
                    "prior",
                    optional=True,
                    tooltip="From Prior Images: trains a second loss that keeps the class as it "
                    "is. Twice the time a step.",
                ),
                Settings.Input(
                    "settings",
                    optional=True,
                    tooltip="From Training Settings; its defaults without it.",
                ),
                io.Int.Input(
                    "steps",
                    default=default.steps,
                    min=0,
                    max=100_000,
                    tooltip="Training steps. About 100 after a calibration on the small model; "
                    "200-1000 for real subjects. Too many, and pictures copy the training "
                    "set; too few, and likeness is missing.",
                ),
                io.Float.Input(
                    "learning_rate",
                    default=0.0,
                    min=0.0,
                    max=1.0,
                    step=1e-5,
                    round=False,
                    tooltip="AdamW's step; 0: by model and start (0.0005 after a calibration, "
                    "0.0001 for an ordinary start; 0.003 and 0.01 on the miniature). Too "
                    "high: loss jumps, pictures burn. Too low: nothing happens.",
                ),
                host.seed("Order of pictures, timesteps and noise."),
                host.advanced(io.Int)(
                    "sample_every",
                    default=50,
                    min=0,
                    max=100_000,
                    tooltip="Draw samples at step 0 and after every so many steps; 0: none. Often "
                    "is pretty but slows training.",
                ),
                host.advanced(io.Int)(
                    "batch_size",
                    default=default.batch_size,
                    min=1,
                    max=64,
                    tooltip="Pictures per step. Lower it when memory runs out; higher is steadier "
                    "and slower.",
                ),
                host.advanced(io.Int)(
                    "validate_every",
                    default=default.validate_every,
                    min=0,
                    max=100_000,
                    tooltip="Steps between validations; 0: never.",
                ),
                host.advanced(io.Float)(
                    "weight_decay",
                    default=default.weight_decay,
                    min=0.0,
                    max=1.0,
                    step=0.001,
                    tooltip="Pulls the LoRA towards zero.",
                ),
                host.advanced(io.Boolean)(
                    "gradient_checkpointing",
                    default=False,
                    tooltip="Less memory, about a third slower. For large models on small cards.",
                ),
                host.advanced(io.String)(
                    "sample_prompt", default="", tooltip="What to draw; empty: the training prompt."
                ),
            ],
            outputs=[
                io.LoraModel.Output(
                    display_name="lora",
                    tooltip="For Save LoRA, Preview LoRA or ComfyUI's Load LoRA Model.",
                ),
                io.LossMap.Output(display_name="loss", tooltip="For ComfyUI's Plot Loss Graph."),
                io.Image.Output(display_name="samples", tooltip="The last samples drawn."),
            ],
            hidden=host.IDENTITY,
            is_output_node=True,
        )

    @classmethod
    def execute(
        cls,
        sd_model: StableDiffusion,
        subject: Pictures,
        steps: int,
        learning_rate: float,
        seed: int,
        sample_every: int,
        batch_size: int,
        validate_every: int,
        weight_decay: float,
        gradient_checkpointing: bool,
        sample_prompt: str,
        lora_init: CalibratedStart | None = None,
        validation: Pictures | None = None,
        prior: EncodedImages | None = None,
        settings: ExtraSettings | None = None,
    ) -> io.NodeOutput:
        start = lora_init.config if lora_init else ORDINARY
        made = lora_init.calibration if lora_init else None
        config = TrainConfig(
            steps=steps,
            lr=learning_rate or default_lr(sd_model.name, start.init),
            batch_size=batch_size,
            weight_decay=weight_decay,
            validate_every=validate_every,
            seed=seed,
            gradient_checkpointing=gradient_checkpointing,
            **(settings.fields if settings else {}),
        )
        with (
            Reporter(host.identity(cls), "CNTLoRATrain", "Train LoRA", steps) as report,
            host.working(sd_model),
        ):
            encoded, held_out = subject.encode(sd_model, report)
            if validation:
                if validation.prompt != subject.prompt:
                    report(Notice(_other_words(validation.prompt, subject.prompt)))
                held_out = validation.encode_all(sd_model, report)
            sampler = Sampler(sd_model, sample_prompt or encoded.prompt, sample_every, report)
            kept: list[str] = []

            def finished(run: RunResult) -> LoRAModel:
                return lora_model(run.lora, sd_model, encoded, start, config, run.kept_step)

            try:
                run = run_training(
                    sd_model,
                    encoded,
                    start,
                    config,
                    prior=_prior_loss(prior, settings),
                    start=continued(made.lora, made.preservation) if made else None,
                    validate=validation_loss(sd_model, held_out, batch_size)
                    if validate_every
                    else None,
                    on_stop=lambda run: kept.extend(_keep(finished(run), run.kept_step, report)),
                    observer=sampler,
                )
            except CNTLoRAError as error:
                raise CNTLoRAError(
                    " ".join([str(error), *(f"What was trained is in loras/{k}." for k in kept)])
                ) from error
            if (
                run.kept_step != run.steps
            ):  # the weights given out are not those of the last samples
                with attached_lora(sd_model.unet, run.lora):
                    sampler.draw(run.kept_step)
            report.kept(run.kept_step)
        images = to_image(sampler.pictures)
        losses = {"loss": sampler.losses or [loss for _, loss in run.validations]}
        return io.NodeOutput(finished(run), losses, images, ui=report.shown())


def _other_words(validation: str, subject: str) -> str:
    return (
        f"The pictures to validate with say '{validation}', those to train on '{subject}': the "
        "best weights are chosen by other words. Give both the same trigger and class_name."
    )


def _prior_loss(prior: EncodedImages | None, settings: ExtraSettings | None) -> PriorLoss | None:
    if prior is None:
        return None
    if settings and settings.prior_loss == "base prediction":
        return BasePrediction(prior.conditioning[:1])
    return ClassImages(prior)


def _keep(lora: LoRAModel, step: int, report: Reporter) -> list[str]:
    """Save what an interrupted run has learnt. Its name; none when no step was finished."""
    if step == 0:
        return []
    path = free_name(
        host.lora_path(f"cntlora-interrupted/{time.strftime('%Y-%m-%d_%H%M%S')}_step{step}")
    )
    name = host.lora_name(lora.write(path))
    report.note(Saved(name))
    return [name]


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
            self.report(
                Notice(
                    f"The samples of step {step} could not be drawn ({error}); training goes on."
                )
            )


def _cancel_only(event: Event) -> None:
    host.check_cancel()
