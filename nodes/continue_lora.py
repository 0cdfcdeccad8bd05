"""Continue LoRA: a LoRA file as the start of a training."""

from __future__ import annotations

from ..cntlora_core.calibration.calibrate import continued
from ..cntlora_core.config import CalibrationConfig, RunConfig
from ..cntlora_core.errors import SettingError
from ..cntlora_core.lora.continuing import continued_lora
from ..cntlora_core.model.loader import StableDiffusion
from . import host
from .host import io
from .paths import stamps
from .types import CalibratedStart, LoRAInit, SDModel
from .widgets import widgets_of


class ContinueLoRA(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return host.schema(
            node_id="CNTLoRAContinueLoRA",
            display_name="Continue LoRA",
            category=host.category(),
            search_aliases=["resume lora", "train on", "continue training"],
            description="A LoRA file to train on from, in place of a calibration: of CNTLoRA, of "
            "kohya's scripts, or in the names of PEFT and diffusers. It keeps its ranks.",
            inputs=[
                SDModel.Input("sd_model", tooltip="The model the LoRA was made for."),
                io.Combo.Input(
                    "lora_file",
                    options=host.lora_names(),
                    tooltip="A file in models/loras. What is trained is saved as a new one.",
                ),
                *widgets_of(RunConfig, "continue_shared"),
            ],
            outputs=[LoRAInit.Output(display_name="lora_init", tooltip="For Train LoRA.")],
            hidden=host.IDENTITY,
        )

    @classmethod
    def fingerprint_inputs(cls, lora_file: str | None, **_others: object) -> str:
        """What the file is; of a name that is connected (None) it is not known which, so all
        count."""
        try:
            names = host.lora_names() if lora_file is None else [lora_file]
            return stamps(map(host.lora_file, names))
        except SettingError as error:
            return str(error)

    @classmethod
    def execute(
        cls, sd_model: StableDiffusion, lora_file: str, continue_shared: bool = False
    ) -> io.NodeOutput:
        found = continued_lora(
            host.lora_file(lora_file),
            sd_model,
            shared=continue_shared,
            observer=host.notices(cls),
        )
        config = CalibrationConfig(init=found.init)
        return io.NodeOutput(CalibratedStart(continued(found.lora), config, found.source))
