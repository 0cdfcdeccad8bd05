"""Prior Images: what the model already knows of the class, for the calibration to preserve."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from ..cntlora_core.config import DataConfig, RunConfig
from ..cntlora_core.data.class_images import MEASURED, class_images
from ..cntlora_core.model.loader import StableDiffusion
from ..cntlora_core.model.sampling import decode
from ..cntlora_core.settings import read_settings
from . import host
from .host import io, ui
from .host_images import from_batches, large_enough, to_image
from .reporter import Reporter
from .types import ClassPictures, Maker, Pictures, Prior, SDModel
from .widgets import one, refusal, single, widgets_of


class PriorImages(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return host.schema(
            node_id="CNTLoRAPriorImages",
            display_name="Prior Images",
            category=host.category(),
            search_aliases=["class images", "regularization images", "prior preservation"],
            description="Lets the model draw its own idea of the class, so that calibration "
            "disturbs it as little as it can.",
            inputs=[
                SDModel.Input("sd_model", tooltip="The model that will be calibrated."),
                io.Image.Input(
                    "images",
                    optional=True,
                    tooltip="Pictures of the class, of other subjects than yours, a batch or a "
                    "list. Without them the model draws its own.",
                ),
                io.String.Input(
                    "class_prompt",
                    default="a cat face emoji",
                    tooltip="The class without the trigger, e.g. 'a dog'. It should match the "
                    "class of the subject.",
                ),
                *widgets_of(RunConfig, "class_count"),
                *widgets_of(DataConfig, "resolution"),
                *widgets_of(RunConfig, "class_steps"),
            ],
            outputs=[
                Prior.Output(
                    display_name="prior",
                    tooltip="For Calibrate LoRA: it and the training after it then change the "
                    "class as little as they can. For Train LoRA: a prior loss too.",
                ),
                io.Image.Output(
                    display_name="pictures",
                    tooltip="What is preserved: your pictures, or what the model drew: with few "
                    "steps rough, but its own.",
                ),
            ],
            hidden=host.IDENTITY,
            is_input_list=True,
            has_intermediate_output=True,
        )

    @classmethod
    def validate_inputs(
        cls,
        class_prompt: Any = None,
        resolution: Any = None,
        class_count: Any = None,
        class_steps: Any = None,
    ) -> bool | str:
        class_prompt = one(class_prompt)
        if class_prompt is not None and not class_prompt.strip():
            return "class_prompt is empty: name the class without the trigger, e.g. 'a dog'."
        wrong = refusal(
            RunConfig, {"class_count": one(class_count), "class_steps": one(class_steps)}
        )
        return refusal(DataConfig, {"resolution": one(resolution)}) if wrong is True else wrong

    @classmethod
    def execute(cls, images: Sequence[Tensor] | None = None, **more: Any) -> io.NodeOutput:
        """Of every input a list comes, as long as what is connected."""
        settings = single(more)
        sd_model: StableDiffusion = settings.pop("sd_model")
        class_prompt = settings.pop("class_prompt")
        drawn = {name: settings.pop(name, 0) for name in ("class_count", "class_steps")}
        with (
            Reporter(host.identity(cls), "CNTLoRAPriorImages") as report,
            host.working(sd_model),
        ):
            data = read_settings(DataConfig, settings)
            how = read_settings(RunConfig, drawn)
            if images is None:
                prior = class_images(
                    sd_model,
                    class_prompt,
                    data.resolution,
                    count=how.class_count or MEASURED[0],
                    steps=how.class_steps or MEASURED[1],
                    observer=report,
                )
            else:
                given = Pictures(tuple(from_batches(images)), class_prompt, data)
                prior = given.encode_all(sd_model, report)
            pictures = decode(sd_model, prior.mean)
            made = ClassPictures(prior, Maker.of(sd_model))
        pictures = [p.resize(pictures[0].size) for p in pictures]  # they come out as one batch
        shown = to_image([large_enough(picture) for picture in pictures])
        return io.NodeOutput(made, to_image(pictures), ui=ui.PreviewImage(shown, cls=cls))
