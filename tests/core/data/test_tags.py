"""Tags in other orders: what stays, what is drawn, and that nothing else changes."""

import pytest
import torch
from PIL import Image

from cntlora_core.config import CalibrationConfig, DataConfig, TrainConfig
from cntlora_core.data.batches import draw_batch
from cntlora_core.data.captions import has_words
from cntlora_core.data.dataset import encode_subject
from cntlora_core.data.images import Picture
from cntlora_core.data.tags import in_order, tag_variants
from cntlora_core.events import Notice
from cntlora_core.run.runs import run_training

TAGS = "sks, red, blue, green, round"
SHUFFLED = DataConfig(shuffle_tags=True)


def test_shuffled_tags_keep_the_first_and_lose_none():
    (variants,) = tag_variants([TAGS], SHUFFLED)
    assert len(variants) == 8
    assert len(set(variants)) > 4
    for text in variants:
        assert text.startswith("sks, ")
        assert sorted(text.split(", ")) == sorted(TAGS.split(", "))
    assert tag_variants([TAGS], SHUFFLED) == [variants]  # in every run


def test_the_trigger_is_never_shuffled_away_or_left_out():
    """Wherever it stands: booru captions begin with something else."""
    data = DataConfig(shuffle_tags=True, tag_dropout=0.9)
    for trigger in ("sks", " sks "):
        (variants,) = tag_variants(["1girl, red hair, Sks, park, tree"], data, trigger)
        assert all(text.startswith("1girl, Sks") for text in variants)
    (variants,) = tag_variants(["1girl, red hair, park, tree"], data, " ")
    assert any(text == "1girl" for text in variants), "no trigger keeps nothing"
    (variants,) = tag_variants(["1girl, red hair, my sks dog"], data, "sks")
    assert all("my sks dog" in text for text in variants)


@pytest.mark.parametrize(
    ("trigger", "caption", "stays"),
    [
        ("anna, red jacket", "anna, red jacket, 1girl, park, tree", ["anna", "red jacket"]),
        ("anna (cosplay)", r"1girl, anna \(cosplay\), park, tree", [r"anna \(cosplay\)"]),
        (r"anna \(cosplay\)", "1girl, anna (cosplay), park, tree", ["anna (cosplay)"]),
    ],
)
def test_a_trigger_of_several_tags_or_in_brackets_stays(trigger, caption, stays):
    assert has_words(caption, trigger)
    (variants,) = tag_variants(
        [caption], DataConfig(shuffle_tags=True, tag_dropout=0.9), f"{trigger} "
    )
    assert all(tag in text.split(", ") for text in variants for tag in stays)
    assert any("park" not in text for text in variants)


@pytest.mark.parametrize("tag", ["(red hair, blue eyes:1.2)", "((a, b), c)", r"(a \(b\), c)"])
def test_a_comma_inside_brackets_parts_no_tag(tag):
    (variants,) = tag_variants([f"sks, {tag}, park, tree"], SHUFFLED)
    assert len(set(variants)) > 2
    assert all(tag in text for text in variants)


@pytest.mark.parametrize("caption", ["sks, :), a, b", "sks, >:(, a, b", "sks, ), (, a, b"])
def test_brackets_that_do_not_pair_are_letters(caption):
    (variants,) = tag_variants([caption], SHUFFLED)
    for text in variants:
        assert sorted(text.split(", ")) == sorted(caption.split(", "))


def test_of_many_captions_fewer_variants_are_made(mini_sd, monkeypatch):
    """As many as fit in memory; never none."""
    monkeypatch.setattr("cntlora_core.data.tags.MOST_VARIANTS", 6)
    captions = [f"sks, {n}, a, b, c" for n in range(3)]
    assert [len(v) for v in tag_variants(captions, SHUFFLED)] == [2] * 3
    assert [len(v) for v in tag_variants(captions * 9, SHUFFLED)] == [2] * 27  # the distinct ones
    assert len(tag_variants([f"{n}" for n in range(20)], SHUFFLED)[0]) == 1
    said = []
    pictures = [Picture(c, Image.new("RGB", (16, 16)), c, caption=c) for c in captions]
    subject = encode_subject(mini_sd, pictures, "", SHUFFLED, observer=said.append)
    assert len(subject.variants) == 6
    told = [event.text for event in said if isinstance(event, Notice)]
    assert any("caption_variants is 8, but so many captions get 2 each" in text for text in told)


def test_a_separator_says_what_stays():
    data = DataConfig(shuffle_tags=True, keep_tags=0, caption_variants=16)
    (variants,) = tag_variants(["sks, red ||| blue, green,, round"], data)
    assert all(text.startswith("sks, red, ") for text in variants)
    assert len({text[10:] for text in variants}) > 3
    assert in_order("sks, red ||| blue") == "sks, red, blue"
    assert tag_variants(["sks ||| red", "a, cat"], DataConfig()) == [["sks, red"], ["a, cat"]]


def test_dropped_tags_are_the_share_asked_for_and_never_the_first():
    data = DataConfig(tag_dropout=0.25, caption_variants=64, keep_tags=2)
    many = "sks, 1girl, " + ", ".join(f"tag {n}" for n in range(40))
    (variants,) = tag_variants([many], data)
    left = [text.split(", ") for text in variants]
    assert all(tags[:2] == ["sks", "1girl"] for tags in left)
    assert sum(len(tags) - 2 for tags in left) / (64 * 40) == pytest.approx(0.75, abs=0.03)
    assert all(tags == sorted(tags, key=many.split(", ").index) for tags in left)  # order stays
    (none,) = tag_variants([many], DataConfig(tag_dropout=1.0))
    assert set(none) == {"sks"}


@pytest.fixture
def tagged(mini_sd):
    noise = torch.Generator().manual_seed(0)
    pixels = [(torch.rand(64, 64, 3, generator=noise) * 255).byte().numpy() for _ in range(2)]
    return [
        Picture(f"{n}", Image.fromarray(p), f"{n}", caption=TAGS if n else None)
        for n, p in enumerate(pixels)
    ]


def test_variants_are_encoded_once_and_drawn_evenly(mini_sd, tagged):
    subject = encode_subject(mini_sd, tagged, "one", SHUFFLED)
    distinct = 1 + len(set(tag_variants([TAGS], SHUFFLED)[0]))
    assert len(subject.variants) == distinct
    generator = torch.Generator().manual_seed(0)
    index = torch.tensor([0, 1] * 100)
    words = subject.draw_words(index, generator).tokens
    assert len(torch.unique(words[::2], dim=0)) == 1
    assert len(torch.unique(words[1::2], dim=0)) == distinct - 1
    assert torch.equal(
        subject.only([0]).draw_words(torch.tensor([0]), generator).tokens[0], words[0]
    )


def test_without_shuffling_no_draw_is_made(mini_sd, tagged):
    """The noise of a run does not depend on whether captions could have been shuffled."""
    subject = encode_subject(mini_sd, tagged, "one")
    assert subject.variants is None
    first, second = (torch.Generator().manual_seed(3) for _ in range(2))
    subject.draw_words(torch.tensor([0, 1]), first)
    assert torch.equal(first.get_state(), second.get_state())


def test_shuffled_training_is_the_same_from_the_same_seed(mini_sd, tagged):
    def trained():
        subject = encode_subject(mini_sd, tagged, "one", SHUFFLED)
        config = TrainConfig(steps=2, learning_rate=1e-3, batch_size=2, validate_every=0)
        run = run_training(mini_sd, subject, CalibrationConfig(init="gaussian"), config)
        return torch.cat([f.up.flatten() for f in run.lora.values()])

    first = trained()
    assert torch.equal(first, trained())
    assert first.abs().max() > 0


def test_a_batch_shows_the_drawn_variant(mini_sd, tagged):
    subject = encode_subject(mini_sd, tagged, "one", SHUFFLED)
    generator = torch.Generator().manual_seed(1)
    drawn = [draw_batch(subject, torch.tensor([1]), 1000, generator) for _ in range(12)]
    tokens = torch.cat([batch.conditioning.tokens for batch in drawn])
    assert len(torch.unique(tokens, dim=0)) > 3
