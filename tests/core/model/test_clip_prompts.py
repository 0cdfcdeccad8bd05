"""Prompts in chunks, and the layer that is read."""

import pytest
import torch

from cntlora_core.errors import SettingError
from cntlora_core.events import Notice
from cntlora_core.model.conditioning import Conditioning, encode_prompts
from cntlora_core.model.loader import load_checkpoint

CHUNK = 30  # tokens that the miniature's encoder reads at once
WIDTH = CHUNK + 2


def test_a_long_prompt_is_read_in_chunks_of_their_own(mini_sd):
    cats, dogs = "cat " * CHUNK, "dog " * CHUNK
    whole, first, second = (
        encode_prompts(mini_sd, [text]).tokens for text in (cats + dogs, cats, dogs)
    )
    assert whole.shape[1] == 2 * WIDTH
    torch.testing.assert_close(whole, torch.cat([first, second], 1))


def test_escaped_parentheses_are_those_that_comfyui_reads(mini_sd):
    plain, escaped, other = (
        encode_prompts(mini_sd, [text]).tokens
        for text in ("cat (red)", r"cat \(red\)", r"cat \red")
    )
    assert torch.equal(plain, escaped)
    assert not torch.equal(plain, other)


def test_captions_that_differ_after_the_first_chunk_differ(mini_sd):
    a, b = (encode_prompts(mini_sd, ["cat " * 50 + word]).tokens for word in ("red", "blue"))
    assert torch.equal(a[:, :WIDTH], b[:, :WIDTH])
    assert not torch.allclose(a, b)


def test_what_is_longer_than_the_limit_is_cut_and_named(mini_sd):
    text = "cat " * 100
    cut = mini_sd.prompts.cut([text, "cat"])
    assert list(cut) == [text]
    assert len(cut[text]) == 3 * CHUNK
    assert encode_prompts(mini_sd, [text]).tokens.shape[1] == 3 * WIDTH


def test_prompts_of_different_lengths_are_repeated_and_mean_the_same(mini_sd):
    """The UNet predicts what it does for each alone."""
    prompts = ["cat", "cat " * 50, "dog " * 80]
    together = encode_prompts(mini_sd, prompts)
    assert together.tokens.shape[1] == 6 * WIDTH
    joined = Conditioning.cat([encode_prompts(mini_sd, [p]) for p in prompts])
    torch.testing.assert_close(joined.tokens, together.tokens)
    assert together.copies.tolist() == joined.copies.tolist() == [6, 3, 2]
    # some of them are as long as they must be together
    assert together[torch.tensor([2, 0])].copies.tolist() == [1, 3]
    assert together[:2].tokens.shape[1] == 2 * WIDTH
    alone = together[torch.tensor([1, 1])]
    assert alone.copies is None
    assert torch.equal(alone.tokens[:1], encode_prompts(mini_sd, prompts[1:2]).tokens)
    short = together[:2].replaced(torch.tensor([False, True]), encode_prompts(mini_sd, [""]))
    assert short.copies.tolist() == [2, 2]
    latent = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    t = torch.tensor([500])
    with torch.no_grad():
        for row, prompt in enumerate(prompts):
            alone = encode_prompts(mini_sd, [prompt]).unet_kwargs()
            repeated = {"encoder_hidden_states": together.tokens[row : row + 1]}
            a, b = (mini_sd.unet(latent, t, **kwargs).sample for kwargs in (alone, repeated))
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_too_many_lengths_are_a_sentence():
    given = [Conditioning(torch.zeros(1, 3 * chunks, 2)) for chunks in (7, 8, 9)]
    with pytest.raises(
        SettingError, match=r"7, 8, 9 chunks, too many lengths .* max_tokens to 450"
    ):
        Conditioning.cat(given)
    assert Conditioning.cat(given[:2]).copies.tolist() == [8, 7]


def test_a_skipped_layers_output_goes_through_the_final_norm():
    whole, skipped = (load_checkpoint("mini-sd", clip_skip=n) for n in (1, 2))
    encoder = whole.prompts.encoders[0].float()
    ids = whole.prompts.tokenizers[0]("a cat", padding="max_length", return_tensors="pt").input_ids
    with torch.no_grad():
        states = encoder(ids, output_hidden_states=True).hidden_states
        expected = getattr(encoder, "text_model", encoder).final_layer_norm(states[-2])
    torch.testing.assert_close(encode_prompts(skipped, ["a cat"]).tokens, expected)
    assert not torch.allclose(encode_prompts(whole, ["a cat"]).tokens, expected)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"clip_skip": 0}, "clip_skip is 0"),
        ({"clip_skip": 9}, "text encoder has 3 layers"),
        ({"max_tokens": 100}, "multiple of 75"),
    ],
)
def test_settings_out_of_range_are_refused(options, says):
    with pytest.raises(SettingError, match=says):
        load_checkpoint("mini-sd", **options)


def test_nothing_is_said_of_what_is_left_as_it_is():
    said = []
    load_checkpoint("mini-sd", observer=said.append)
    assert not [e for e in said if isinstance(e, Notice)]
