"""CNTLoRA's nodes: a schema and a few lines each, over `cntlora_core`."""

from .calibrate import CalibrateLoRA
from .continue_lora import ContinueLoRA
from .host import ComfyExtension, add_routes, io
from .load_checkpoint import LoadCheckpoint
from .preview import PreviewLoRA
from .prior import PriorImages
from .save import SaveLoRA
from .subject import SubjectImages
from .train import TrainLoRA
from .training_settings import TrainingSettings
from .use_comfyui_model import UseComfyUIModel

NODES: list[type[io.ComfyNode]] = [
    LoadCheckpoint,
    UseComfyUIModel,
    SubjectImages,
    PriorImages,
    CalibrateLoRA,
    ContinueLoRA,
    TrainLoRA,
    TrainingSettings,
    SaveLoRA,
    PreviewLoRA,
]


class CNTLoRAExtension(ComfyExtension):
    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        add_routes()  # not in on_load, which older hosts never call
        return NODES
