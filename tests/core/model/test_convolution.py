"""Convolutions as linear maps of patches."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from cntlora_core.lora.adapter import Factors, attached_lora
from cntlora_core.model.convolution import Convolution

pairs = st.tuples(st.integers(1, 3), st.integers(1, 3))


@settings(deadline=None, max_examples=50)
@given(pairs, pairs, st.tuples(st.integers(0, 2), st.integers(0, 2)), st.integers(0, 2**31))
def test_patches_times_rows_are_the_convolution(kernel, stride, padding, seed):
    torch.manual_seed(seed)
    module = nn.Conv2d(3, 5, kernel, stride, padding, bias=False)
    own = Convolution.of(module)
    x, weight = torch.randn(2, 3, 7, 6), module.weight.detach().flatten(1)
    y = module(x).detach()
    torch.testing.assert_close(own(x, weight), y)
    assert own.size(x) == tuple(y.shape[2:])
    every = own.patches(x, own.index(x, torch.arange(y[0, 0].numel())))
    torch.testing.assert_close(every @ weight.T, y.flatten(2).mT, rtol=1e-4, atol=1e-5)
    unfolded = F.unfold(x, kernel, padding=padding, stride=stride).mT
    assert torch.equal(every, unfolded)
    some = torch.randperm(y[0, 0].numel())[:4]
    assert torch.equal(own.patches(x, own.index(x, some)), every[:, some])
    answers = torch.randn_like(y)
    expected = answers.flatten(2).transpose(0, 1).flatten(1) @ every.flatten(0, 1)
    torch.testing.assert_close(own.outer(x, answers), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "other",
    [
        nn.Linear(3, 4),
        nn.Conv2d(4, 4, 3, groups=2),
        nn.Conv2d(4, 4, 3, dilation=2),
        nn.Conv2d(4, 4, 3, padding="same"),
        nn.Conv2d(4, 4, 3, padding=1, padding_mode="circular"),
    ],
)
def test_others_are_none(other):
    assert Convolution.of(other) is None


@pytest.mark.parametrize("stride", [1, 2])
def test_an_adapter_is_the_merged_weight(stride):
    torch.manual_seed(0)
    base = nn.Conv2d(3, 5, 3, stride, 1)
    net, x = nn.Sequential(base), torch.randn(2, 3, 8, 8, requires_grad=True)
    own = Factors(torch.randn(5, 2), torch.randn(2, 27))
    merged = (base.weight + own.delta().view_as(base.weight)).detach().requires_grad_(True)
    expected = F.conv2d(x, merged, base.bias, stride, 1)
    expected.square().sum().backward()
    of_x, of_weight = x.grad.clone(), merged.grad.flatten(1)
    x.grad = None
    with attached_lora(net, {"0": own}, trainable=True) as adapters:
        y = net(x)
        y.square().sum().backward()
        grads = adapters.split(adapters.flat.grad)["0"]
        with adapters.bypassed():
            assert torch.equal(net(x), base(x))
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(x.grad, of_x, rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(grads.up, of_weight @ own.down.T, rtol=1e-4, atol=1e-2)
    torch.testing.assert_close(grads.down, own.up.T @ of_weight, rtol=1e-4, atol=1e-2)
    assert net[0] is base
