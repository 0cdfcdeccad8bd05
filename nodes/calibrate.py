"""Calibrate LoRA: a start that already fits, in closed form."""

from __future__ import annotations

from ..cntlora_core.config import EFFORTS, INITS, RANK_RULES, TARGETS, CalibrationConfig
from ..cntlora_core.data.class_images import class_noised
from ..cntlora_core.data.dataset import EncodedImages
from ..cntlora_core.lora.adapter import parameter_count
from ..cntlora_core.model.loader import StableDiffusion
from ..cntlora_core.report.charts import rank_map
from ..cntlora_core.run import run_calibration
from . import host
from .host import io
from .reporter import Reporter
from .types import (
    CalibratedStart,
    LoRAInit,
    Pictures,
    Prior,
    SDModel,
    SubjectPictures,
    lora_model,
    to_image,
)


class CalibrateLoRA(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        default = CalibrationConfig()
        return host.schema(
            node_id="CNTLoRACalibrate",
            display_name="Calibrate LoRA (CNTLoRA)",
            category="training/CNTLoRA",
            search_aliases=["initialise lora", "init lora", "consnotrainlora", "lora rank"],
            description="Runs the model over the pictures, reads the activations at the attention "
            "and feed-forward layers and computes a LoRA that already fits them, with "
            "a rank of its own for every layer. Nothing is trained.",
            inputs=[
                SDModel.Input("sd_model", tooltip="From Load SD Checkpoint."),
                SubjectPictures.Input("subject", tooltip="From Subject Images."),
                Prior.Input(
                    "prior",
                    optional=True,
                    tooltip="From Prior Images: what the model should keep of the class.",
                ),
                io.Combo.Input(
                    "mode",
                    options=list(INITS),
                    default=default.init,
                    tooltip="target: fits what the denoising loss asks for, usable before "
                    "training. domain: forward passes only, less memory, a weaker start. "
                    "gaussian and default: ordinary LoRA starts, to compare with.",
                ),
                io.Int.Input(
                    "rank",
                    default=default.rank,
                    min=1,
                    max=128,
                    tooltip="Mean rank, so the file's size. 4-8 for an object, 8-16 for a face or "
                    "a style. Too high learns the background too; too low misses detail.",
                ),
                io.Combo.Input(
                    "ranks",
                    options=list(RANK_RULES),
                    default=default.rank_rule,
                    tooltip="data: layers that matter for this subject get more rank, others less, "
                    "the file stays the same size. uniform: the same rank everywhere.",
                ),
                host.seed("Same seed, same pictures: the same LoRA."),
                io.Combo.Input(
                    "effort",
                    options=list(EFFORTS),
                    default=default.effort,
                    tooltip="How long mode target calibrates. quick: one sweep. balanced: refined "
                    "over 20 batches, the time of about 30 training steps. thorough: over "
                    "64, about 75 training steps.",
                ),
                host.advanced(io.Int)(
                    "batch_size",
                    default=default.batch_size,
                    min=1,
                    max=64,
                    tooltip="Pictures per batch. Lower it when memory runs out.",
                ),
                host.advanced(io.Combo)(
                    "targets",
                    options=list(TARGETS),
                    default=default.targets,
                    tooltip="Layers that get an adapter. auto: attention and feed-forward, in SDXL "
                    "attention alone, which takes less memory. The file's size is the "
                    "same.",
                ),
                host.advanced(io.Float)(
                    "preservation",
                    default=default.preservation,
                    min=0.0,
                    max=64.0,
                    step=0.1,
                    tooltip="Weight of the prior, when one is connected. Higher forgets less and "
                    "fits a little less.",
                ),
                host.advanced(io.Boolean)(
                    "gradient_checkpointing",
                    default=False,
                    tooltip="Less memory, about a third slower. For mode target.",
                ),
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
        )

    @classmethod
    def execute(
        cls,
        sd_model: StableDiffusion,
        subject: Pictures,
        mode: str,
        rank: int,
        ranks: str,
        seed: int,
        effort: str,
        batch_size: int,
        targets: str,
        preservation: float,
        gradient_checkpointing: bool,
        prior: EncodedImages | None = None,
    ) -> io.NodeOutput:
        config = CalibrationConfig(
            init=mode,
            rank=rank,
            rank_rule=ranks,
            seed=seed,
            effort=effort,
            batch_size=batch_size,
            targets=targets,
            preservation=preservation,
            gradient_checkpointing=gradient_checkpointing,
        )
        with (
            Reporter(host.identity(cls), "CNTLoRACalibrate", "Calibrate LoRA") as report,
            host.working(sd_model),
        ):
            encoded, _ = subject.encode(sd_model, report)
            kept = class_noised(sd_model, prior) if prior else None
            start = run_calibration(sd_model, encoded, config, preserve=kept, observer=report)
            picture = rank_map(
                start.report.ranks,
                start.report.energy,
                title="Rank and energy of each projection",
                params=parameter_count(start.lora),
            )
        lora = lora_model(start.lora, sd_model, encoded, config)
        return io.NodeOutput(
            CalibratedStart(start, config), lora, to_image([picture]), ui=report.shown()
        )
