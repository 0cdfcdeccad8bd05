"""Preview LoRA: pictures with the LoRA, by the model it was made for."""

from __future__ import annotations

from torch import Tensor

from ..cntlora_core.errors import SettingError
from ..cntlora_core.events import Event, Progress
from ..cntlora_core.lora.adapter import attached_lora
from ..cntlora_core.lora.file import from_state_dict
from ..cntlora_core.lora.targets import ALL, find_projections
from ..cntlora_core.model.loader import StableDiffusion
from ..cntlora_core.model.sampling import sample
from . import host
from .host import io, ui
from .types import SDModel, to_image


class PreviewLoRA(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return host.schema(
            node_id="CNTLoRAPreviewLoRA",
            display_name="Preview LoRA (CNTLoRA)",
            category="training/CNTLoRA",
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
                io.Float.Input(
                    "strength",
                    default=1.0,
                    min=-4.0,
                    max=4.0,
                    step=0.05,
                    tooltip="1 as trained, 0 not at all. Below 1 is softer and more flexible; "
                    "above 1 soon burns.",
                ),
                io.Int.Input("count", default=4, min=1, max=16, tooltip="Number of pictures."),
                host.seed("Noise of the first picture; the others count up."),
                host.advanced(io.Int)(
                    "steps",
                    default=25,
                    min=1,
                    max=200,
                    tooltip="DDIM steps; below 15 is rough, above 50 no better.",
                ),
                host.advanced(io.Float)(
                    "guidance",
                    default=4.0,
                    min=1.0,
                    max=20.0,
                    step=0.5,
                    tooltip="How closely to follow the prompt. 4-8; higher is harsher, 1 ignores "
                    "guidance.",
                ),
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
        strength: float,
        count: int,
        seed: int,
        steps: int,
        guidance: float,
    ) -> io.NodeOutput:
        prompt = prompt.strip() or getattr(lora, "prompt", "")
        if not prompt:
            raise SettingError(
                "prompt is empty, and this LoRA does not come from CNTLoRA's Train or Calibrate: "
                "say what to draw, with the LoRA's trigger."
            )
        show = host.progress_bar(host.identity(cls).node)

        def observer(event: Event) -> None:
            if isinstance(event, Progress):
                show(event.done, event.total)
            host.check_cancel()

        factors = from_state_dict(lora, find_projections(sd_model.unet, ALL), sd_model.family)
        scaled = {name: f.scaled(strength) for name, f in factors.items()}
        with host.working(sd_model), attached_lora(sd_model.unet, scaled):
            pictures = sample(
                sd_model,
                [prompt] * count,
                range(seed, seed + count),
                steps=steps,
                guidance=guidance,
                observer=observer,
            )
        images = to_image(pictures)
        return io.NodeOutput(images, ui=ui.PreviewImage(images, cls=cls))
