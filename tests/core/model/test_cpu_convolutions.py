"""Convolutions as matrix products: the same numbers, the same gradients, and the UNet as it was
afterwards."""

import pytest
import torch
from torch import nn

from cntlora_core.model import cpu_convolutions
from cntlora_core.model.cpu_convolutions import (
    CHANNELS_PER_PLACE,
    FEW_PLACES,
    FEWEST_CHANNELS,
    ProductConv,
    convolutions_as_matmul,
)


@pytest.fixture
def runs(monkeypatch):
    """A convolution's own, each as an entry."""
    found, own = [], nn.Conv2d.forward

    def forward(self, x):
        found.append(x.shape)
        return own(self, x)

    monkeypatch.setattr(nn.Conv2d, "forward", forward)
    return found


def conv(channels=160, **settings):
    torch.manual_seed(0)
    base = nn.Conv2d(6, channels, **({"kernel_size": 3, "padding": 1} | settings))
    return base.double().requires_grad_(False)


@pytest.mark.parametrize(
    "shape", [(1, 6, 2, 2), (1, 6, 5, 6), (3, 6, 4, 2), (2, 6, 3, 3), (1, 6, 1, 7)]
)
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"bias": False},
        {"stride": 2},
        {"kernel_size": 1, "padding": 0},
        {"kernel_size": (3, 1), "padding": (1, 0)},
    ],
)
def test_a_product_is_the_convolution(shape, settings, runs):
    base = conv(**settings)
    product = ProductConv(base)
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    y = product(x)
    assert not runs
    expected = base(x)
    assert y.shape == expected.shape
    assert y.is_contiguous()
    torch.testing.assert_close(y, expected)
    weight = torch.randn_like(y)
    (got,), (wanted,) = (torch.autograd.grad((z * weight).sum(), x) for z in (y, expected))
    torch.testing.assert_close(got, wanted)


def test_many_places_are_left_to_the_convolution(runs):
    base = conv(channels=CHANNELS_PER_PLACE * FEW_PLACES)
    product = ProductConv(base)
    product(torch.randn(1, 6, 4, 4, dtype=torch.float64))
    assert not runs
    product(torch.randn(1, 6, 4, 5, dtype=torch.float64))
    assert len(runs) == 1


def test_the_unet_predicts_the_same_and_has_its_own_modules_back(mini_sd, monkeypatch):
    monkeypatch.setattr(cpu_convolutions, "FEWEST_CHANNELS", 8)
    unet = mini_sd.unet
    before = dict(unet.named_modules())
    x, words = torch.randn(1, 4, 16, 16), torch.randn(1, 77, unet.config.cross_attention_dim)
    with torch.no_grad():
        expected = unet(x, 10, words).sample
        with convolutions_as_matmul(unet):
            assert any(isinstance(m, ProductConv) for m in unet.modules())
            got = unet(x, 10, words).sample
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)
    with pytest.raises(ZeroDivisionError), convolutions_as_matmul(unet):
        raise ZeroDivisionError
    after = dict(unet.named_modules())
    assert before.keys() == after.keys()
    assert all(before[name] is after[name] for name in before)


@pytest.mark.parametrize(
    "other",
    [
        nn.Conv2d(8, FEWEST_CHANNELS - 1, 3),
        nn.Conv2d(8, FEWEST_CHANNELS, 3, groups=2),
        nn.Conv2d(8, FEWEST_CHANNELS, 3, padding=1, padding_mode="reflect"),
        nn.Conv2d(8, FEWEST_CHANNELS, 3, padding="same"),
        nn.Conv2d(8, FEWEST_CHANNELS, 3, dtype=torch.bfloat16),
        nn.Conv2d(8, FEWEST_CHANNELS, 3, device="meta"),
        nn.Conv1d(8, FEWEST_CHANNELS, 3),
    ],
)
def test_what_gains_nothing_stays_as_it_is(other):
    model = nn.Sequential(other, nn.Conv2d(8, FEWEST_CHANNELS, 3))
    with convolutions_as_matmul(model):
        assert model[0] is other
        assert isinstance(model[1], ProductConv)
