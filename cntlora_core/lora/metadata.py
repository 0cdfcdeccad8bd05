"""What a LoRA file says of itself, in the words that ComfyUI managers, A1111 and Forge read. All
values are strings."""

from __future__ import annotations

import datetime
import hashlib
import json
import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

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


OPTIMIZERS = {
    "auto": "torch.optim.adamw.AdamW",  # of a run whose settings were never resolved
    "natural": "cntlora.NaturalGradient",
    "adamw": "torch.optim.adamw.AdamW",
    "adamw8bit": "bitsandbytes.optim.adamw.AdamW8bit",
    "prodigy": "prodigyopt.prodigy.Prodigy",
    "schedulefree": "schedulefree.AdamWScheduleFree",
}


@dataclass(frozen=True)
class Source:
    """The LoRA file that a training went on from."""

    file: str
    sha256: str

    @classmethod
    def of(cls, path: str | os.PathLike[str]) -> Source:
        return cls(Path(path).name, hashlib.sha256(Path(path).read_bytes()).hexdigest())


@dataclass(frozen=True)
class Taught:
    """The pictures that a LoRA was made from: `captions` is a (text, repeats) for each of them;
    `trigger` calls the subject: where nobody named a word it is the prompt, and nothing where every
    picture has a caption of its own."""

    trigger: str
    captions: tuple[tuple[str, int], ...]
    resolution: int
    digest: str


def _today() -> str:
    """The date alone: equal runs of one day give equal files. SOURCE_DATE_EPOCH (seconds)
    overrides it."""
    try:
        seconds = int(os.environ.get("SOURCE_DATE_EPOCH", ""))
        moment = datetime.datetime.fromtimestamp(seconds, datetime.timezone.utc)
    except (ValueError, OverflowError, OSError):  # not set, or no moment in time
        moment = datetime.datetime.now()
    return moment.date().isoformat()


def describe(
    lora: Mapping[str, Factors],
    *,
    family: str,
    prediction: str,
    title: str,
    model_name: str,
    taught: Taught,
    steps: int,
    calibration: CalibrationConfig,
    training: TrainConfig | None = None,
    source: Source | None = None,
    clip_skip: int | None = None,
    max_tokens: int | None = None,
) -> dict[str, str]:
    """kohya's `ss_*` keys, modelspec's, and ours under `cntlora.*`: what was done, and nothing
    that was not.

    `prediction` is the noise schedule's, `clip_skip` and `max_tokens` the prompt encoder's. The
    trigger goes where each reader looks: the outer keys of `ss_tag_frequency`, the class tokens of
    the datasets, and `modelspec.trigger_phrase`. Ranks that differ are `Dynamic`, kohya's word.
    """
    metadata = _of_model(family, prediction, model_name) | _of_weights(lora) | _of_pictures(taught)
    metadata |= {
        "ss_output_name": title,
        "ss_steps": str(steps),
        "ss_seed": str(training.seed if training else calibration.seed),
        "ss_clip_skip": str(clip_skip),
        # kohya's trainers leave it unsaid for what CLIP reads at once
        "ss_max_token_length": str(max_tokens if max_tokens != 75 else None),
        "modelspec.title": title,
        "modelspec.date": _today(),
        "cntlora.version": __version__,
        "cntlora.init": "continued" if source else calibration.init,
        "cntlora.origin": calibration.init,
    }
    if source:
        metadata["cntlora.continued_from"] = json.dumps(asdict(source), ensure_ascii=False)
    else:
        metadata["cntlora.calibration"] = json.dumps(to_dict(calibration))
    return metadata | (_of_training(training) if training else {})


def _of_model(family: str, prediction: str, name: str) -> dict[str, str]:
    metadata = {
        "ss_base_model_version": BASE_VERSION[family],
        "ss_sd_model_name": name,
        "ss_v_parameterization": str(prediction.startswith("v")),
        "ss_zero_terminal_snr": str(prediction.endswith("zero terminal SNR")),
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": ARCHITECTURE[family],
        "modelspec.implementation": "https://github.com/Stability-AI/generative-models"
        if family == "sdxl"
        else "diffusers",
        "modelspec.prediction_type": prediction.partition(" ")[0],
    }
    return metadata | ({"ss_v2": "True"} if family in ("sd2", "sd2-v") else {})


def _of_weights(lora: Mapping[str, Factors]) -> dict[str, str]:
    ranks = {name: factors.rank for name, factors in lora.items()}
    distinct = set(ranks.values())
    return {
        "ss_network_module": "networks.lora",
        "ss_network_dim": str(distinct.pop()) if len(distinct) == 1 else "Dynamic",
        "ss_network_alpha": str(common_alpha(lora)),
        "cntlora.ranks": json.dumps(ranks),
        "cntlora.parameters": str(parameter_count(lora)),
    }


def _of_pictures(taught: Taught) -> dict[str, str]:
    size = taught.resolution
    called = {"modelspec.trigger_phrase": taught.trigger} if taught.trigger else {}
    return called | {
        "ss_resolution": f"({size}, {size})",
        "ss_num_train_images": str(sum(repeats for _, repeats in taught.captions)),
        "ss_tag_frequency": json.dumps(_tag_frequency(taught), ensure_ascii=False),
        "ss_datasets": json.dumps([{"subsets": _subsets(taught)}], ensure_ascii=False),
        "modelspec.resolution": f"{size}x{size}",
        "cntlora.data_hash": taught.digest,
    }


def _of_training(config: TrainConfig) -> dict[str, str]:
    metadata = {
        "ss_max_train_steps": str(config.steps),
        "ss_optimizer": OPTIMIZERS[config.optimizer],
        "ss_batch_size_per_device": str(config.batch_size),
        "ss_gradient_accumulation_steps": str(config.accumulation),
        "ss_gradient_checkpointing": str(config.gradient_checkpointing),
        "ss_min_snr_gamma": str(config.min_snr_gamma or None),
        "ss_noise_offset": str(config.noise_offset or None),
        "ss_caption_dropout_rate": str(config.caption_dropout),
        "cntlora.training": json.dumps(to_dict(config)),
    }
    return metadata | ({} if config.optimizer == "natural" else _of_rate(config))


def _of_rate(config: TrainConfig) -> dict[str, str]:
    """What natural-gradient steps have no use for."""
    schedule: str = config.schedule
    if schedule == "restarts":
        schedule = "cosine_with_restarts"
    if schedule == "constant" and config.warmup:
        schedule = "constant_with_warmup"  # kohya's word for it
    return {
        "ss_optimizer": f"{OPTIMIZERS[config.optimizer]}(weight_decay={config.weight_decay})",
        "ss_learning_rate": str(config.learning_rate),
        "ss_unet_lr": str(config.learning_rate),
        "ss_lr_scheduler": schedule,
        "ss_lr_warmup_steps": str(config.warmup_steps),
        "ss_max_grad_norm": str(config.max_grad_norm),
    }


def _tag_frequency(taught: Taught) -> dict[str, dict[str, int]]:
    """How many pictures carry each tag (captions are split at commas, as kohya does it), by
    repeats."""
    counts: dict[str, Counter[str]] = {}
    for caption, repeats in taught.captions:
        tags = {tag.strip() for tag in caption.split(",")} - {""}
        counts.setdefault(f"{repeats}_{taught.trigger}", Counter()).update(sorted(tags))
    return {name: dict(counter.most_common()) for name, counter in counts.items()}


def _subsets(taught: Taught) -> list[dict[str, object]]:
    pictures = Counter(repeats for _, repeats in taught.captions)
    return [
        {
            "class_tokens": taught.trigger,
            "img_count": count,
            "num_repeats": repeats,
            "is_reg": False,
        }
        for repeats, count in sorted(pictures.items())
    ]
