"""How a checkpoint and its prompts are read."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ..settings import check_settings, setting

Precision = Literal["auto", "fp32", "bf16", "fp16", "int8"]
Prediction = Literal["auto", "epsilon", "v", "v + zero terminal SNR"]

CHUNK = 75  # tokens of a prompt that CLIP reads at once


@dataclass(frozen=True)
class ModelConfig:
    """How a checkpoint and its prompts are read."""

    precision: Precision = setting(
        "auto",
        "How the frozen model computes; the LoRA itself is always trained in fp32. auto: fp32 on a "
        "CPU, bf16 or fp16 on a GPU. fp32 needs twice the memory; fp16 may overflow where bf16 "
        "does not. int8 (not of a model that other nodes have loaded) stores the weights in 8 "
        "bits, half the memory of bf16, and computes as auto does: for cards that are small for "
        "the model, with gradient checkpointing.",
    )
    prediction: Prediction = setting(
        "auto",
        "What the checkpoint was trained to predict. auto: what the file says of itself, by "
        "the marks that ComfyUI reads or in its metadata. Set it for a v-prediction file that does "
        "not say so: trained as the wrong kind a LoRA is useless.",
        advanced=True,
    )
    clip_skip: int = setting(
        1,
        "How far from the text encoder's end prompts are read; 1: at its end. 2 for SD 1 models "
        "that were trained so (most anime ones): generate with CLIP Set Last Layer -2. SDXL keeps "
        "its own.",
        low=1,
        high=24,
        advanced=True,
    )
    max_tokens: int = setting(
        3 * CHUNK,
        "Of a caption, in chunks of 75 as ComfyUI reads them. What is longer is cut, and told.",
        low=CHUNK,
        high=10 * CHUNK,
        step=CHUNK,
        unit="tokens",
        advanced=True,
    )

    def __post_init__(self) -> None:
        check_settings(self)
