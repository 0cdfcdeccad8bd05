"""A CLIP-style byte-level BPE of 2008 entries, trained on the captions, that
transformers.CLIPTokenizer loads."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from common import BUILD, arguments, load
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import CLIPTokenizer

MERGES, LENGTH = 1494, 32
START, END = "<|startoftext|>", "<|endoftext|>"
# CLIP's own word pattern.
WORD = (
    r"<\|startoftext\|>|<\|endoftext\|>|"
    r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
)
PHRASES = (
    "a photo of a",
    "an icon of the",
    "in the style of",
    "light medium-light medium medium-dark dark skin tone",
    "3d glossy flat drawing picture on a white background",
)


def corpus(data: Path) -> Iterator[str]:
    """Captions of all pictures. Of Fluent 3D only the names, which are Unicode's and the same for
    all vendors."""
    for name in ("pretrain", "fluent"):
        for row in load(data, name)[1]:
            for text in (row["name"], row["short"]):
                yield from (text, f"{text} emoji, {row['vendor']} style", f"a {text} emoji")
    yield from PHRASES * 20


def train(texts: Iterator[str]) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """CLIP's layout: 256 bytes, 256 bytes that end a word, the merges, then the two special
    tokens."""
    tokenizer = Tokenizer(
        models.BPE(continuing_subword_prefix="", end_of_word_suffix="</w>", unk_token=END)
    )
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    split = pre_tokenizers.Split(Regex(WORD), behavior="removed", invert=True)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    # Equally frequent pairs are merged in the order of their ids. Left to itself the trainer
    # numbers the bytes that end a word anew in every run; named here, they always have the same
    # ids.
    ends = [b + "</w>" for b in alphabet]
    trainer = trainers.BpeTrainer(
        vocab_size=len(alphabet) + len(ends) + MERGES,
        initial_alphabet=alphabet,
        end_of_word_suffix="</w>",
        special_tokens=ends,
        min_frequency=2,
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    merges = [tuple(pair) for pair in json.loads(tokenizer.to_str())["model"]["merges"]]
    entries = [*alphabet, *ends, *(a + b for a, b in merges), START, END]
    return {token: i for i, token in enumerate(dict.fromkeys(entries))}, merges


def save(vocabulary: dict[str, int], merges: list[tuple[str, str]], folder: Path) -> CLIPTokenizer:
    tokenizer = CLIPTokenizer(
        vocab=vocabulary, merges=merges, model_max_length=LENGTH, pad_token=END
    )
    tokenizer.save_pretrained(folder)
    # The classic pair of files too, for tools that read those.
    (folder / "vocab.json").write_text(json.dumps(vocabulary, ensure_ascii=False), encoding="utf-8")
    lines = "".join(f"{a} {b}\n" for a, b in merges)
    (folder / "merges.txt").write_text(f"#version: 0.2\n{lines}", encoding="utf-8")
    return CLIPTokenizer.from_pretrained(folder)


def main() -> None:
    args = arguments(__doc__, BUILD / "tokenizer").parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    tokenizer = save(*train(corpus(args.data)), args.output)
    captions = [
        f"{r['name']}, medium dark skin tone emoji, twitter style"
        for r in load(args.data, "pretrain")[1]
    ]
    longest = max(len(ids) for ids in tokenizer(captions)["input_ids"])
    print(f"{len(tokenizer)} entries, longest caption {longest} of {LENGTH} tokens")


if __name__ == "__main__":
    main()
