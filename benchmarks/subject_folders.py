"""Subjects as mini_sd/prepare_data.py leaves them: `train/`, `heldout/` and their prompt."""

from __future__ import annotations

import json
from pathlib import Path

from cntlora_core.config import DataConfig
from cntlora_core.data.dataset import read_subject
from cntlora_core.data.encoded import EncodedImages
from cntlora_core.model.loader import StableDiffusion

PROMPT_ALONE = DataConfig(use_captions=False)  # the folders hold captions for pre-training


def read_halves(model: StableDiffusion, folder: Path) -> tuple[EncodedImages, EncodedImages]:
    """What is trained on, and what judges, under the subject's own prompt."""
    facts = (folder / "train" / "metadata.jsonl").read_text(encoding="utf-8")
    prompt = json.loads(facts.splitlines()[0])["prompt"]
    train, held_out = (
        read_subject(model, folder / part, prompt, PROMPT_ALONE) for part in ("train", "heldout")
    )
    return train, held_out
