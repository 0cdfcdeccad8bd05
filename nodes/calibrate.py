"""Calibrate LoRA: a start that already fits, in closed form."""

from __future__ import annotations

from typing import Any

from ..cntlora_core.config import CalibrationConfig
from ..cntlora_core.data.class_images import class_noised
from ..cntlora_core.effects import class_matters, without_effect_in_calibration
from ..cntlora_core.events import Base, Event, Notice, Validation
from ..cntlora_core.lora.adapter import parameter_count
from ..cntlora_core.model.loader import StableDiffusion
from ..cntlora_core.presets import with_preset
from ..cntlora_core.report.charts import rank_map
from ..cntlora_core.run.runs import run_untrained
from ..cntlora_core.settings import read_settings
from ..cntlora_core.training.validation import validation_loss
from . import host
from .checks import check_prior, check_room, of_other_models
from .host import io
from .host_images import to_image
from .reporter import Reporter, shown
from .types import (
    CalibratedStart,
    ClassPictures,
    LoRAInit,
    Maker,
    Pictures,
    Prior,
    SDModel,
    SubjectPictures,
    lora_model,
)
from .widgets import widgets_of


class CalibrateLoRA(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return host.schema(
            node_id="CNTLoRACalibrate",
            display_name="Calibrate LoRA",
            category=host.category(),
            search_aliases=["initialise lora", "init lora", "consnotrainlora", "lora rank"],
            description="Runs the model over the pictures, reads the activations at its layers and "
            "computes a LoRA that already fits them, with a rank of its own for every layer: in "
            "closed form, then in a few steps that need no settings. The model itself is not "
            "changed.",
            inputs=[
                SDModel.Input("sd_model", tooltip="From Load SD Checkpoint or Use ComfyUI Model."),
                SubjectPictures.Input("subject", tooltip="From Subject Images."),
                Prior.Input(
                    "prior",
                    optional=True,
                    tooltip="From Prior Images: what the model should keep of the class.",
                ),
                *widgets_of(CalibrationConfig),
            ],
            outputs=[
                LoRAInit.Output(display_name="lora_init", tooltip="For Train LoRA."),
                io.LoraModel.Output(
                    display_name="lora",
                    tooltip="The step-0 LoRA, for Save, Preview or Load LoRA Model.",
                ),
                io.Image.Output(
                    display_name="rank_map",
                    tooltip="Rank and energy of every layer with an adapter.",
                ),
            ],
            hidden=host.IDENTITY,
            has_intermediate_output=True,
            not_idempotent=True,  # the cache must not answer with what another node shows
        )

    @classmethod
    def execute(
        cls,
        sd_model: StableDiffusion,
        subject: Pictures,
        prior: ClassPictures | None = None,
        **settings: Any,
    ) -> io.NodeOutput:
        config = with_preset(read_settings(CalibrationConfig, settings), subject.preset)
        check_prior(sd_model, prior)
        check_room(sd_model, config)
        with (
            Reporter(host.identity(cls), "CNTLoRACalibrate", before=subject.traces) as report,
            host.working(sd_model),
        ):
            maker = Maker.of(sd_model)
            doubts = of_other_models(maker, prior)
            for text in (*doubts, *_without_effect(config, prior is not None)):
                report(Notice(text))
            encoded, held_out = subject.encode(sd_model, report)
            kept = class_noised(sd_model, prior.encoded) if prior else None
            validate = None
            if held_out is not encoded:
                validate = validation_loss(
                    sd_model, held_out, config.batch_size, before_each=host.check_cancel
                )

            def told(event: Event) -> None:  # one validation is no chart
                if not isinstance(event, Base | Validation):
                    report(event)

            run = run_untrained(
                sd_model, encoded, config, preserve=kept, validate=validate, observer=told
            )
            start = run.start
            picture = rank_map(
                start.report.ranks,
                start.report.energy,
                title="Rank and energy of each projection",
                params=parameter_count(start.lora),
            )
        made_from = f"{encoded.digest} {encoded.captions} {_kept_as(prior, maker)}"
        lora = lora_model(run.lora, sd_model, encoded, config)
        lora.traces = (report.trace, *subject.traces)
        return io.NodeOutput(
            CalibratedStart(
                start,
                config,
                made_from=made_from,
                data=subject.all_data,
                maker=maker,
                traces=lora.traces,
            ),
            lora,
            to_image([picture]),
            ui=shown(*lora.traces),
        )


def _kept_as(prior: ClassPictures | None, maker: Maker) -> tuple[str | int, ...] | None:
    """What tells priors apart; of the model itself no more than before makers were told apart."""
    if prior is None:
        return None
    own = prior.encoded
    other = () if prior.maker.content == maker.content else (prior.maker.content,)
    return (own.digest, own.prompt, own.resolution, *other)


def _without_effect(config: CalibrationConfig, has_class: bool) -> list[str]:
    said = without_effect_in_calibration(config, continued=False, has_class=has_class)
    if has_class and not class_matters(config, continued=False):
        said.append("The prior has no effect: this start measures nothing, or preservation is 0.")
    return said
