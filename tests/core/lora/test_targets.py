import pytest
from torch import nn

from cntlora_core.errors import CheckpointError
from cntlora_core.lora.targets import ALL, find_projections


def test_the_mini_sd_has_56_in_29_distinct_inputs(mini_sd):
    """7 transformer blocks of 8; each block reads attn1 qkv, attn1 out, attn2 q, attn2 out; the
    text is read by all."""
    projections = find_projections(mini_sd.unet)
    assert len(projections) == 56
    assert len({p.input_key for p in projections}) == 7 * 4 + 1
    assert {p.in_features for p in projections if p.input_key == "text"} == {128}


def test_convolutions_are_maps_of_patches(mini_sd):
    """Two in each of 11 residual blocks, and those between the levels; no 1 x 1."""
    found = [p for p in find_projections(mini_sd.unet, ALL) if p.convolution]
    assert len(found) == 2 * 11 + 4
    for p in found:
        weight = mini_sd.unet.get_submodule(p.name).weight
        assert weight.flatten(1).shape == (p.out_features, p.in_features)
        assert (p.convolution.kernel, p.input_key, p.attention) == ((3, 3), p.name, False)
    assert {p.convolution.stride for p in found} == {(1, 1), (2, 2)}
    assert not any(p.convolution for p in find_projections(mini_sd.unet, "attention+ff"))


def test_shared_keys_mean_shared_tensors(mini_sd, subject):
    """What the keys claim is what the UNet does: the same values reach all projections of a key."""
    seen = {}
    handles = [
        mini_sd.unet.get_submodule(p.name).register_forward_hook(
            lambda _m, args, _y, p=p: seen.setdefault(p.input_key, []).append(args[0])
        )
        for p in find_projections(mini_sd.unet)
    ]
    try:
        import torch

        with torch.no_grad():
            kwargs = subject.conditioning[:1].unet_kwargs()
            mini_sd.unet(
                torch.stack(subject.mean[:1]), torch.tensor([400]), return_dict=False, **kwargs
            )
        assert all(torch.equal(x, xs[0]) for xs in seen.values() for x in xs)
        assert len(seen["text"]) == 14
    finally:
        for handle in handles:
            handle.remove()


def test_another_network_is_refused():
    with pytest.raises(CheckpointError, match="not a Stable Diffusion UNet"):
        find_projections(nn.Sequential(nn.Linear(2, 2)))
