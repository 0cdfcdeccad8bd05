"""What a LoRA file says of itself, in the words that ComfyUI managers, A1111 and Forge read. All
values are strings."""

from __future__ import annotations

import datetime
import json
import os
from collections.abc import Mapping

from .. import __version__
from ..config import CalibrationConfig, TrainConfig, to_dict
from .adapter import Factors, parameter_count
from .file import common_alpha

BASE_VERSION = {"sd1": "sd_1.5", "sd2": "sd-v2-1", "sd2-v": "sd-v2-1", "sdxl": "sdxl_base_v1-0"}
ARCHITECTURE = {
    "sd1": "stable-diffusion-v1/lora",
    "sd2": "stable-diffusion-v2-512/lora",
    "sd2-v": "stable-diffusion-v2-768-v/lora",
    "sdxl": "stable-diffusion-xl-v1-base/lora",
}


def _today() -> str:
    """The date alone: equal runs of one day give equal files. SOURCE_DATE_EPOCH overrides it."""
    epoch = os.environ.get("SOURCE_DATE_EPOCH")
    moment = (
        datetime.datetime.now()
        if epoch is None
        else datetime.datetime.fromtimestamp(int(epoch), datetime.timezone.utc)
    )
    return moment.date().isoformat()


def describe(
    lora: Mapping[str, Factors],
    *,
    family: str,
    title: str,
    model_name: str,
    trigger: str,
    resolution: int,
    pictures: int,
    data_digest: str,
    steps: int,
    calibration: CalibrationConfig,
    training: TrainConfig | None = None,
    prediction: str = "epsilon",
) -> dict[str, str]:
    """kohya's `ss_*` keys, modelspec's, and ours under `cntlora.*`.

    `prediction` is the noise schedule's. `trigger` goes where each reader looks: one outer key of
    `ss_tag_frequency`, the class tokens of the first dataset, and `modelspec.trigger_phrase`. Ranks
    that differ are `Dynamic`, kohya's word for it.
    """
    ranks = {name: factors.rank for name, factors in lora.items()}
    distinct = set(ranks.values())
    dim = str(distinct.pop()) if len(distinct) == 1 else "Dynamic"
    size = f"{resolution}x{resolution}"
    metadata = {
        "ss_base_model_version": BASE_VERSION[family],
        "ss_network_module": "networks.lora",
        "ss_network_dim": dim,
        "ss_network_alpha": str(common_alpha(lora)),
        "ss_output_name": title,
        "ss_sd_model_name": model_name,
        "ss_steps": str(steps),
        "ss_max_train_steps": str(training.steps if training else 0),
        "ss_learning_rate": str(training.lr) if training else "0.0",
        "ss_unet_lr": str(training.lr) if training else "0.0",
        "ss_optimizer": "AdamW",
        "ss_lr_scheduler": "constant",
        "ss_seed": str(training.seed if training else calibration.seed),
        "ss_resolution": f"({resolution}, {resolution})",
        "ss_num_train_images": str(pictures),
        "ss_tag_frequency": json.dumps({f"1_{trigger}": {trigger: pictures}}),
        "ss_datasets": json.dumps(
            [
                {
                    "subsets": [
                        {
                            "class_tokens": trigger,
                            "img_count": pictures,
                            "num_repeats": 1,
                            "is_reg": False,
                        }
                    ]
                }
            ]
        ),
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": ARCHITECTURE[family],
        "modelspec.implementation": "https://github.com/Stability-AI/generative-models"
        if family == "sdxl"
        else "diffusers",
        "modelspec.title": title,
        "modelspec.resolution": size,
        "modelspec.date": _today(),
        "modelspec.trigger_phrase": trigger,
        "modelspec.prediction_type": prediction.partition(" ")[0],
        "ss_v_parameterization": str(prediction.startswith("v")),
        "ss_zero_terminal_snr": str(prediction.endswith("zero terminal SNR")),
        "cntlora.version": __version__,
        "cntlora.init": calibration.init,
        "cntlora.ranks": json.dumps(ranks),
        "cntlora.parameters": str(parameter_count(lora)),
        "cntlora.data_hash": data_digest,
        "cntlora.calibration": json.dumps(to_dict(calibration)),
    }
    if family in ("sd2", "sd2-v"):
        metadata["ss_v2"] = "True"
    if training:
        metadata["cntlora.training"] = json.dumps(to_dict(training))
    return metadata
