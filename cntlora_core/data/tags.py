"""Tags: a caption's parts in other orders, written ahead so that training pays nothing for them."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch

from ..config import DataConfig
from .captions import has_words
from .images import Picture

TAG_SEED = 11  # the same variants in every run
MOST_VARIANTS = 8192  # of a subject: 1 GB at SD 1.5's size in 16 bits
SEPARATOR = "|||"  # what stands before it stays in its place


def in_order(caption: str) -> str:
    """The caption without the separator."""
    parts = [part.strip(" ,") for part in caption.split(SEPARATOR)]
    return ", ".join(part for part in parts if part) if SEPARATOR in caption else caption


def tag_variants(captions: Sequence[str], data: DataConfig, trigger: str = "") -> list[list[str]]:
    """What training shows of each caption: tags (between commas) shuffled, some left out. The first
    `keep_tags`, or what stands before `|||`, stay, and so does a tag with the `trigger`, after
    them. Equal captions have the same variants."""
    count = variant_count(captions, data)
    if not count:
        return [[in_order(caption)] for caption in captions]
    generator = torch.Generator().manual_seed(TAG_SEED)
    distinct = dict.fromkeys(captions)
    drawn = {caption: _variants(caption, count, data, generator, trigger) for caption in distinct}
    return [drawn[caption] for caption in captions]


def variant_count(captions: Sequence[str], data: DataConfig) -> int:
    """How many of each caption: as many as are wished, unless that makes too many; 0: its tags
    stay as they are."""
    if not (data.shuffle_tags or data.tag_dropout):
        return 0
    return max(1, min(data.caption_variants, MOST_VARIANTS // max(1, len(set(captions)))))


def what_is_read(
    pictures: Sequence[Picture], prompt: str, data: DataConfig, trigger: str = ""
) -> list[list[str]]:
    """Of each picture, every text that the model will read: its caption or the prompt, in each
    order."""
    texts = tag_variants([p.caption or prompt for p in pictures], data, trigger)
    return [list(dict.fromkeys(variants)) for variants in texts]


def _variants(
    caption: str, count: int, data: DataConfig, generator: torch.Generator, trigger: str
) -> list[str]:
    fixed, separator, rest = caption.partition(SEPARATOR)
    tags = _tags(rest if separator else caption)
    first = _tags(fixed) if separator else tags[: data.keep_tags]
    others = tags if separator else tags[data.keep_tags :]
    calling = [tag for tag in others if any(has_words(tag, part) for part in _tags(trigger))]
    first, others = first + calling, [tag for tag in others if tag not in calling]
    return [", ".join(first + _drawn(others, data, generator)) for _ in range(count)]


def _tags(text: str) -> list[str]:
    return [tag for part in _parts(text.replace(SEPARATOR, ",")) if (tag := part.strip())]


def _parts(text: str) -> list[str]:
    """Between commas outside brackets, `(red hair, blue eyes:1.2)`; between all where brackets do
    not pair, `:)`."""
    depth, cuts = 0, [-1]
    for at, letter in enumerate(text):
        if letter in "()" and text[at - 1 : at] != "\\":
            depth += 1 if letter == "(" else -1
        if depth < 0:
            return text.split(",")
        if letter == "," and not depth:
            cuts.append(at)
    cuts.append(len(text))
    between = [text[start + 1 : end] for start, end in pairwise(cuts)]
    return text.split(",") if depth else between


def _drawn(tags: list[str], data: DataConfig, generator: torch.Generator) -> list[str]:
    order = list(range(len(tags)))
    if data.shuffle_tags:
        order = torch.randperm(len(tags), generator=generator).tolist()
    stays = torch.rand(len(tags), generator=generator) >= data.tag_dropout
    return [tags[i] for i in order if stays[i]]
