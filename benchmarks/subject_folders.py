"""Subjects as mini_sd/prepare_data.py leaves them: `train/`, `heldout/` and their prompts."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

from cntlora_core.config import DataConfig
from cntlora_core.data.dataset import read_subject
from cntlora_core.data.encoded import EncodedImages
from cntlora_core.model.loader import StableDiffusion

PROMPT_ALONE = DataConfig(use_captions=False)  # the folders hold captions for pre-training


def prompts_of(subject: Path) -> tuple[str, str]:
    """The subject's prompt and its class's, as subjects.py wrote them."""
    try:
        about = json.loads(
            (subject / "train" / "metadata.jsonl").read_text(encoding="utf-8").splitlines()[0]
        )
        return about["prompt"], about["class_prompt"]
    except (OSError, LookupError, ValueError) as error:
        raise SystemExit(
            f"'{subject}' has no train/metadata.jsonl with prompt and class_prompt ({error!r}). "
            "Make it with subjects.py."
        ) from error


def read_halves(
    model: StableDiffusion, folder: Path, *, random_crop: bool = False
) -> tuple[EncodedImages, EncodedImages]:
    """What is trained on, in several crops or one, and what judges, under the subject's own
    prompt."""
    prompt, _ = prompts_of(folder)
    data = replace(PROMPT_ALONE, random_crop=random_crop)
    train = read_subject(model, folder / "train", prompt, data)
    return train, read_subject(model, folder / "heldout", prompt, PROMPT_ALONE)
