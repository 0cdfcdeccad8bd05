"""Several subjects in one run."""

import pytest
import torch
from PIL import Image

from cntlora_core.config import DataConfig
from cntlora_core.data.batches import batch_order, draw_noised
from cntlora_core.data.concepts import join_concepts
from cntlora_core.data.dataset import encode_subject
from cntlora_core.data.encoded import unvalidated, unvalidated_subjects, with_validation
from cntlora_core.data.images import Picture
from cntlora_core.errors import SettingError


def concept(mini_sd, name, count, data=None, *, size=64, mask=None, caption=None):
    noise = torch.Generator().manual_seed(len(name) + count)
    pictures = [
        Picture(
            f"{name}{n}",
            Image.fromarray((torch.rand(size, size, 3, generator=noise) * 255).byte().numpy()),
            f"{name}{n}",
            mask,
            caption,
        )
        for n in range(count)
    ]
    return encode_subject(mini_sd, pictures, f"a {name} thing", data, trigger=name)


def test_each_concept_has_an_equal_share_of_every_pass(mini_sd):
    joined = join_concepts([concept(mini_sd, "sks", 7), concept(mini_sd, "zwx", 3)])
    assert len(joined) == joined.picture_count == 10
    order = batch_order(joined, 1, 14 * 3, torch.Generator().manual_seed(0))
    of = [joined.concepts[int(i)] for i in order]
    for start in range(0, len(of), 14):
        assert sum(of[start : start + 14]) == 7
    counts = torch.bincount(torch.cat(order), minlength=10)
    assert counts[:7].tolist() == [3] * 7
    assert counts[7:].tolist() == [7] * 3
    (batch,) = draw_noised(joined, 28, 1000, torch.Generator().manual_seed(0)).sizes
    words = torch.unique(batch.conditioning.tokens, dim=0, return_counts=True)[1]
    assert words.tolist() == [14, 14]


def test_joining_keeps_every_view_as_it_was(mini_sd):
    mask = Image.new("L", (64, 64), 0)
    mask.paste(255, (0, 0, 32, 64))
    first = concept(mini_sd, "sks", 5)
    data = DataConfig(masked=True, shuffle_tags=True)
    second = concept(mini_sd, "zwx", 6, data, mask=mask, caption="zwx, a, b, c, d")
    joined = join_concepts([first, second])
    assert joined.names == first.names + second.names
    assert torch.equal(joined.mean[6], second.mean[1])
    assert joined.masks[0].min() == 1
    assert torch.equal(joined.masks[5], second.masks[0])
    assert joined.trigger == "sks, zwx"
    generator = torch.Generator().manual_seed(0)
    words = joined.draw_words(torch.tensor([0, 5, 5, 5, 5]), generator).tokens
    assert torch.equal(words[0], first.conditioning.tokens[0])
    assert {tuple(w.flatten().tolist()) for w in words[1:]} <= {
        tuple(w.flatten().tolist()) for w in second.variants.tokens
    }
    training, held = with_validation(joined)
    assert held.names == ("sks4", "zwx5")
    assert held.concepts == (0, 1)
    assert set(training.names).isdisjoint(held.names)


def test_a_subject_that_is_not_validated_is_told(mini_sd):
    few = join_concepts([concept(mini_sd, "sks", 5), concept(mini_sd, "zwx", 4)])
    training, held = with_validation(few)
    assert held.names == ("sks4",)
    assert unvalidated(training, held) == [
        "Of 1 of 2 subjects nothing is held out (fewer than 5 pictures): the best weights are "
        "chosen by the others'."
    ]
    enough = join_concepts([concept(mini_sd, "sks", 5), concept(mini_sd, "zwx", 5)])
    assert unvalidated(*with_validation(enough)) == []
    assert unvalidated(*with_validation(concept(mini_sd, "sks", 5))) == []
    (said,) = unvalidated(*with_validation(concept(mini_sd, "sks", 4)))
    assert said.startswith("4 pictures are too few to hold one out (5 or more)")
    alone = concept(mini_sd, "sks", 5)
    assert unvalidated(alone, alone) == []  # hold_out is off


def test_pictures_of_one_subject_validate_several(mini_sd):
    one = concept(mini_sd, "sks", 5)
    both = join_concepts([one, concept(mini_sd, "zwx", 5)])
    (said,) = unvalidated_subjects(both, one)
    assert said.startswith("The pictures to validate with show 1 of 2 subjects")
    assert unvalidated_subjects(both, both) == unvalidated_subjects(one, one) == []


def test_one_subject_is_joined_to_itself(mini_sd):
    alone = concept(mini_sd, "sks", 3)
    assert join_concepts([alone]) is alone


def test_what_cannot_be_joined_is_a_sentence(mini_sd):
    first = concept(mini_sd, "sks", 1)
    said = []
    join_concepts([first, concept(mini_sd, "sks", 2)], observer=said.append)
    assert "Two subjects answer to 'sks'" in said[0].text
    with pytest.raises(SettingError, match="resolutions of 32 and 64 px"):
        join_concepts([first, concept(mini_sd, "zwx", 1, DataConfig(resolution=32))])
