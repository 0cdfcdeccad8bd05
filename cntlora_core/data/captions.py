"""What the model reads of a picture: its caption or the prompt, filled in, with the trigger."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import replace

from ..events import Notice, Observer, ignore
from ..model.tokenizers import as_read, without_halves
from .folder import counted, some
from .images import Picture

PLACEHOLDER = re.compile(r"\{\s*(\w+)\s*\}")


def fill_words(text: str, trigger: str, class_name: str) -> str:
    """`{trigger}` and `{class}` filled in, spaces tidied."""
    words = {"trigger": trigger, "class": class_name}
    filled = PLACEHOLDER.sub(lambda m: words.get(m[1].lower(), m[0]), text)
    return tidy(filled)


def tidy(text: str) -> str:
    """On one line."""
    return " ".join(without_halves(text).split())


def has_words(text: str, words: str) -> bool:
    """Whether the words stand in the text as they are, in any case, whatever spaces are around them
    and whether or not their brackets are escaped, as booru tags have them."""
    own = re.escape(as_read(" ".join(words.split())))
    return bool(own and re.search(rf"(?<!\w){own}(?!\w)", as_read(text), re.IGNORECASE))


def with_trigger(text: str, trigger: str) -> str:
    """The text with the trigger in front, unless it is there."""
    if not trigger or has_words(text, trigger):
        return text
    return f"{trigger}, {text}" if text else trigger


def without_captions(pictures: Iterable[Picture]) -> list[Picture]:
    return [replace(p, caption=None, caption_file="") for p in pictures]


def prepare_captions(
    pictures: Iterable[Picture],
    prompt: str,
    words: tuple[str, str] = ("", ""),
    *,
    add_trigger: bool = True,
    observer: Observer = ignore,
) -> tuple[list[Picture], str]:
    """The pictures' captions and the prompt of the others as the model reads them: `words` (trigger
    and class) filled in, the trigger in front of those that lack it. What was done is told."""
    trigger, pictures = tidy(words[0]), list(pictures)
    _tell_unfilled([prompt, *(p.caption for p in pictures if p.caption)], words, observer)
    filled = [(p.name, fill_words(p.caption, trigger, words[1])) for p in pictures if p.caption]
    prompt = fill_words(prompt, trigger, words[1])
    done = "it was put in front" if add_trigger else "what they show will not answer to it"
    if trigger and not has_words(prompt, trigger) and any(not p.caption for p in pictures):
        observer(Notice(f"The prompt lacks '{trigger}', {done}."))
    lacking = [name for name, text in filled if trigger and not has_words(text, trigger)]
    if add_trigger and trigger:
        prompt = with_trigger(prompt, trigger)
    if lacking:
        lack = counted(len(lacking), "caption lacks", "captions lack")
        observer(Notice(f"{lack} '{trigger}', {done}: {some(lacking)}."))

    def words_of(picture: Picture) -> Picture:
        if not picture.caption:
            return picture
        text = fill_words(picture.caption, trigger, words[1])
        return replace(picture, caption=with_trigger(text, trigger) if add_trigger else text)

    return [words_of(p) for p in pictures], prompt


def _tell_unfilled(texts: Sequence[str], words: tuple[str, str], observer: Observer) -> None:
    found = {m.lower() for text in texts for m in PLACEHOLDER.findall(text)}
    for name, value in zip(("trigger", "class"), words, strict=True):
        if name in found and not value.strip():
            observer(Notice(f"{{{name}}} stands for nothing: no {name} was given, it is left out."))
    if others := sorted(found - {"trigger", "class"}):
        observer(
            Notice(f"{{{others[0]}}} stays as it is: only {{trigger}} and {{class}} are filled in.")
        )
