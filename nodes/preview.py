"""Preview LoRA: pictures with the LoRA, by the model it was made for."""

from __future__ import annotations

from typing import Any

from PIL import Image
from torch import Tensor

from ..cntlora_core.config import STRENGTHS, SampleConfig
from ..cntlora_core.effects import without_effect_in_sampling
from ..cntlora_core.errors import SettingError
from ..cntlora_core.events import Event, Notice, Progress
from ..cntlora_core.lora.adapter import attached_lora, scaled
from ..cntlora_core.lora.file import from_state_dict
from ..cntlora_core.lora.targets import ALL, find_projections
from ..cntlora_core.model.loader import StableDiffusion
from ..cntlora_core.model.sampling import sample
from ..cntlora_core.report.charts import sample_sheet
from ..cntlora_core.settings import read_settings
from . import host
from .host import io, ui
from .host_images import large_enough, to_image
from .types import SDModel
from .widgets import widgets_of

GRID_CELL = 256  # px of a picture in the grid of strengths


class PreviewLoRA(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return host.schema(
            node_id="CNTLoRAPreviewLoRA",
            display_name="Preview LoRA",
            category=host.category(),
            search_aliases=["test lora", "sample lora"],
            description="Draws with the LoRA; strength 0 draws with the model alone. Same seed, "
            "same noise: compare freely.",
            inputs=[
                SDModel.Input("sd_model", tooltip="The model the LoRA was made for."),
                io.LoraModel.Input("lora", tooltip="From Train LoRA or Calibrate LoRA."),
                io.String.Input(
                    "prompt",
                    default="",
                    tooltip="What to draw; empty: the training prompt. Use the trigger and the "
                    "class of the training; add anything else to see how well it mixes.",
                ),
                *widgets_of(SampleConfig),
            ],
            outputs=[io.Image.Output(display_name="pictures", tooltip="The pictures.")],
            hidden=host.IDENTITY,
            is_output_node=True,
        )

    @classmethod
    def execute(
        cls,
        sd_model: StableDiffusion,
        lora: dict[str, Tensor],
        prompt: str,
        **settings: Any,
    ) -> io.NodeOutput:
        how = read_settings(SampleConfig, settings)
        grid = STRENGTHS if how.strength_grid else (how.strength,)
        prompt = prompt.strip() or getattr(lora, "prompt", "")
        if not prompt:
            raise SettingError(
                "prompt is empty, and this LoRA does not come from CNTLoRA's Train or Calibrate: "
                "say what to draw, with the LoRA's trigger."
            )
        notice, show = host.notices(cls), host.progress_bar(host.identity(cls).node)
        for text in without_effect_in_sampling(how, has_lora=True):
            notice(Notice(text))

        def observer(event: Event) -> None:
            if isinstance(event, Progress):
                show(event.done, event.total)
            host.check_cancel()

        projections = find_projections(sd_model.unet, ALL)
        factors = from_state_dict(lora, projections, sd_model.family, shared=True, observer=notice)
        rows: dict[str, list[Image.Image]] = {}
        with host.working(sd_model):
            for strength in grid:
                with attached_lora(sd_model.unet, scaled(factors, strength)):
                    rows[f"strength {strength:g}"] = sample(
                        sd_model,
                        [prompt] * how.count,
                        range(how.seed, how.seed + how.count),
                        steps=how.steps,
                        guidance=how.guidance,
                        observer=observer,
                    )
        pictures = [picture for row in rows.values() for picture in row]
        images = to_image(pictures)
        shown = to_image([large_enough(picture) for picture in pictures])
        if how.strength_grid:
            cell = min(sd_model.resolution, GRID_CELL)
            shown = to_image([sample_sheet(list(rows.items()), title=prompt, cell=cell)])
        return io.NodeOutput(images, ui=ui.PreviewImage(shown, cls=cls))
