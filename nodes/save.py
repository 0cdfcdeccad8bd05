"""Save LoRA, where ComfyUI's Load LoRA finds it."""

from __future__ import annotations

from torch import Tensor

from ..cntlora_core.config import RunConfig
from ..cntlora_core.devices import DTYPES
from ..cntlora_core.errors import CNTLoRAError, LoRAFileError, OutputError
from ..cntlora_core.events import Event, Notice, Status
from ..cntlora_core.files import DISK, free_name, remove_written
from . import host
from .host import io
from .reporter import Reporter, shown
from .types import LoRAModel
from .widgets import widgets_of


class SaveLoRA(io.ComfyNode):
    disk = DISK

    @classmethod
    def define_schema(cls) -> io.Schema:
        return host.schema(
            node_id="CNTLoRASaveLoRA",
            display_name="Save LoRA",
            category=host.category(),
            search_aliases=["export lora", "safetensors"],
            description="Writes the LoRA with its metadata (trigger, base model, settings) into "
            "the first loras folder.",
            inputs=[
                io.LoraModel.Input(
                    "lora", tooltip="From Train LoRA, or from Calibrate LoRA for the step-0 LoRA."
                ),
                io.String.Input(
                    "name",
                    default="my_subject",
                    tooltip="File name in models/loras, with a folder if you like: 'people/anna'. "
                    "Nothing is overwritten: a taken name gets _2, _3, ...",
                ),
                *widgets_of(RunConfig, "save_precision"),
            ],
            outputs=[
                io.String.Output(
                    display_name="file_name",
                    tooltip="The name in Load LoRA's list, after a refresh (R).",
                )
            ],
            hidden=host.IDENTITY,
            is_output_node=True,
        )

    @classmethod
    def validate_inputs(cls, name: str | None = None) -> bool | str:
        if name is None:
            return True
        try:
            host.lora_path(name)
        except CNTLoRAError as error:
            return str(error)
        return True

    @classmethod
    def execute(
        cls, lora: dict[str, Tensor], name: str, save_precision: str = "fp16"
    ) -> io.NodeOutput:
        if not isinstance(lora, LoRAModel):
            raise LoRAFileError(
                "This LoRA does not come from CNTLoRA: save it with ComfyUI's Save LoRA Weights."
            )
        said: list[str] = []

        def note(event: Event) -> None:
            if isinstance(event, Notice):
                said.append(event.text)

        path = free_name(host.lora_path(name))
        try:
            written = lora.write(path, DTYPES[save_precision], note, cls.disk)
        except OutputError as error:
            if lora.spare and lora.spare.is_file():
                error.add_sentence(f"It is still in loras/{host.lora_name(lora.spare)}.")
            raise
        if lora.spare and not host.is_temporary(written):
            remove_written(lora.spare)
        saved = host.lora_name(written)
        text = " ".join([f"Saved as {saved}", *said])
        with Reporter(host.identity(cls), "CNTLoRASaveLoRA", disk=cls.disk) as report:
            report.note(Status(text))  # for a page that is opened later
        return io.NodeOutput(saved, ui={"text": (text,), **shown(*lora.traces)})
