"""How much a layer's metric is damped."""

import pytest
import torch

from cntlora_core.calibration import moments as layers
from cntlora_core.calibration.constraints import WIDEST, WIDEST_OF_PATCHES, Metric
from cntlora_core.calibration.moments import Moments
from cntlora_core.calibration.recording import input_key, output_key
from cntlora_core.calibration.seen import Seen
from cntlora_core.lora.targets import Projection
from cntlora_core.model.convolution import Convolution

PATCHES = Convolution((3, 3), (1, 1), (1, 1))
RHO = 0.5


def moments_of(p):
    seen = Seen()
    for key, width, diagonal in (
        (input_key(p), p.in_features, p.diagonal_in),
        (output_key(p), p.out_features, p.diagonal_out),
    ):
        seen.add(key, torch.randn(1, 64, width), 64, diagonal, 1.0)
    moments = Moments()
    moments.take_in(seen)
    return moments


def shares(p):
    """Of the mean strength, what is added to the inputs' metric and to the outputs'."""
    moments, metric = moments_of(p), Metric(RHO)
    pairs = (metric.K(p, moments), moments.C(p)), (metric.P(p, moments), moments.S(p))
    found = [
        float((damped.diagonal() - own.diagonal()).mean() / own.diagonal().mean())
        for damped, own in pairs
    ]
    together = metric.of_inputs([p], moments), metric.of_outputs([p], moments)
    for (alone, _), group in zip(pairs, together, strict=True):
        torch.testing.assert_close(group.diagonal()[0], alone.diagonal())
    return found


@pytest.mark.parametrize(
    ("d", "m", "more", "share_in", "share_out"),
    [
        (96, WIDEST, {}, RHO, RHO),
        (2 * WIDEST, 5 * WIDEST, {}, 2 * RHO, 5 * RHO),
        (9 * WIDEST_OF_PATCHES, 96, {"convolution": PATCHES}, RHO, RHO),
        (9 * 2 * WIDEST_OF_PATCHES, 2 * WIDEST, {"convolution": PATCHES}, 2 * RHO, 2 * RHO),
        (8 * WIDEST, 2 * WIDEST, {"diagonal_in": True}, RHO, 2 * RHO),
        (96, 8 * WIDEST, {"diagonal_out": True}, RHO, RHO),
    ],
)
def test_what_is_wider_is_damped_more(d, m, more, share_in, share_out):
    torch.manual_seed(0)
    found = shares(Projection("p", d, m, "x", **more))
    assert found == pytest.approx([share_in, share_out], rel=1e-3)


@pytest.mark.parametrize("diagonal", [False, True])
def test_layers_with_a_prior_are_added_up_a_few_at_a_time(monkeypatch, diagonal):
    torch.manual_seed(0)
    each = [Projection(str(i), 96, 64, str(i), diagonal_in=diagonal) for i in range(3)]
    moments, prior = (Moments(), Moments())
    for p in each:
        moments.seconds |= moments_of(p).seconds
        prior.seconds |= moments_of(p).seconds
    metric = Metric(RHO, prior, 4.0)
    X = torch.randn(96, 5)
    monkeypatch.setattr(layers, "MOST", 2 * 96 * 32)  # two, and one
    together = metric.of_inputs(each, moments).matmul(X)
    for p, product in zip(each, together, strict=True):
        torch.testing.assert_close(product, metric.K(p, moments).matmul(X))
