"""Where a CLIP tokenizer can be had without a network. All Stable Diffusions use one vocabulary of
49408 entries."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import CheckpointError

LENGTH = 77  # tokens of a prompt, start and end included
ESCAPED = re.compile(r"\\([()])")


def without_halves(text: str) -> str:
    """Without halves of letters (surrogates), which JSON may hold: no file or tokenizer takes
    them."""
    return text.encode("utf-8", "replace").decode()


def as_read(text: str) -> str:
    """What is given to a tokenizer: escaped parentheses are parentheses, as ComfyUI reads them."""
    return ESCAPED.sub(r"\1", without_halves(text))


def _hugging_face_cache() -> Path:
    home = os.environ.get("HF_HOME")
    return Path(
        os.environ.get("HF_HUB_CACHE", Path(home or Path.home() / ".cache" / "huggingface") / "hub")
    )


def _places(folders: Sequence[str | os.PathLike[str]]) -> Iterator[Path]:
    """Those of the cache only where they are CLIP's: others' are there too."""
    yield from (Path(folder) for folder in folders)
    comfyui = os.environ.get("COMFYUI_PATH")
    if comfyui:
        yield Path(comfyui) / "comfy" / "sd1_tokenizer"
    cache = _hugging_face_cache()
    yield from sorted(cache.glob("models--openai--clip-vit-large-patch14/snapshots/*"))
    yield from filter(_is_clips, sorted(cache.glob("models--*/snapshots/*/tokenizer")))


def _is_clips(folder: Path) -> bool:
    try:
        return _are_clips(json.loads((folder / "vocab.json").read_text(encoding="utf-8")))
    except (OSError, ValueError, AttributeError, RecursionError):
        return False


def _are_clips(words: Mapping[str, int]) -> bool:
    return len(words) == CLIP_SIZE and CLIP_IDS.items() <= words.items()


def find_tokenizer(folders: Sequence[str | os.PathLike[str]] = ()) -> Path | None:
    """The first folder with CLIP's vocab.json and merges.txt: those given, ComfyUI's own
    (COMFYUI_PATH), the Hugging Face cache."""
    return next(
        (
            p
            for p in _places(folders)
            if (p / "vocab.json").is_file() and (p / "merges.txt").is_file()
        ),
        None,
    )


# A few entries of CLIP's vocabulary: another one of its size gives every word another meaning.
CLIP_SIZE = 49408
CLIP_IDS = {"<|startoftext|>": 49406, "<|endoftext|>": 49407, "a</w>": 320, "photo</w>": 1125}


def check_tokenizer(tokenizer: Any, size: int, folder: Path) -> None:
    """Raises CheckpointError when a tokenizer does not fit an encoder of `size` tokens: prompts
    would be other words, or all alike."""
    vocabulary = tokenizer.get_vocab()
    fits = len(tokenizer) == len(vocabulary) == size
    if not fits or (size == CLIP_SIZE and not _are_clips(vocabulary)):
        raise CheckpointError(
            f"The tokenizer in '{folder}' does not belong to the text encoder: it has "
            f"{len(tokenizer):,} entries of {size:,}, or other words. Use CLIP's vocab.json and "
            "merges.txt, which came with the model."
        )


def load_tokenizers(family: str, folders: Sequence[str | os.PathLike[str]] = ()) -> tuple[Any, ...]:
    """One CLIP tokenizer, or SDXL's two. OpenCLIP encoders (SD 2, SDXL's second) were trained with
    prompts padded by id 0, "!".

    Raises CheckpointError when none is found on this machine.
    """
    from transformers import CLIPTokenizer

    folder = find_tokenizer(folders)
    if folder is None:
        raise CheckpointError(
            "No CLIP tokenizer was found on this machine. Set COMFYUI_PATH to a ComfyUI folder (it "
            "has one in comfy/sd1_tokenizer), or put vocab.json and merges.txt of "
            "openai/clip-vit-large-patch14 into a folder 'tokenizer' beside the checkpoint."
        )

    def load(pad: str) -> Any:
        try:
            tokenizer = CLIPTokenizer.from_pretrained(
                folder, model_max_length=LENGTH, pad_token=pad, local_files_only=True
            )
        except Exception as error:  # the library raises no other for a damaged file
            raise CheckpointError(
                f"The tokenizer in '{folder}' cannot be read ({error}): use CLIP's vocab.json and "
                "merges.txt, which came with the model."
            ) from error
        check_tokenizer(tokenizer, CLIP_SIZE, folder)
        return tokenizer

    if family == "sdxl":
        return load("<|endoftext|>"), load("!")
    return (load("<|endoftext|>" if family == "sd1" else "!"),)


def describe_tokenizer() -> str:
    """For `info`: the folder of the tokenizer that single-file checkpoints would use."""
    found = find_tokenizer()
    return (
        str(found)
        if found
        else "none (diffusers folders bring their own; for single files set COMFYUI_PATH)"
    )
