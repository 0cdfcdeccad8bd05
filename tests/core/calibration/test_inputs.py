"""Tokens and patches of a convolution answer alike."""

import pytest
import torch
from torch import nn

from cntlora_core.calibration import inputs
from cntlora_core.calibration.inputs import Patches, Tokens, inputs_of, outputs_of
from cntlora_core.calibration.recording import record
from cntlora_core.calibration.sketch import Sketches
from cntlora_core.lora.targets import Projection
from cntlora_core.model.convolution import Convolution


def layer(stride=1):
    module = nn.Conv2d(3, 5, 3, stride, 1)
    own = Convolution.of(module)
    return module, Projection("0", 27, 5, "0", convolution=own)


@pytest.mark.parametrize("at_once", [1, 300, 1 << 24])
@pytest.mark.parametrize("stride", [1, 2])
def test_patches_are_tokens_that_are_not_made(monkeypatch, stride, at_once):
    torch.manual_seed(0)
    module, projection = layer(stride)
    x = torch.randn(3, 3, 6, 8)
    rows = outputs_of(projection, module(x)).detach()
    patches = inputs_of(projection, x)
    tokens = Tokens(patches.at(patches.index(torch.arange(patches.tokens))))
    assert tokens.tokens == patches.tokens == rows.shape[1]
    assert isinstance(patches, Patches)
    assert tokens.width == patches.width == 27
    torch.testing.assert_close(tokens.answers(module.weight.flatten(1).T) + module.bias, rows)
    monkeypatch.setattr(inputs, "AT_ONCE", at_once)
    found = [Sketches(8) for _ in range(2)]
    norms = [own.add("0", rows, way) for own, way in zip(found, (patches, tokens), strict=True)]
    torch.testing.assert_close(*norms)
    for one, other in zip(*(own.sums["0"] for own in found), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-3)


def test_what_a_convolution_reads_and_gets_back_is_recorded():
    torch.manual_seed(0)
    module, projection = layer()
    net = nn.Sequential(module).requires_grad_(False)
    x = torch.randn(2, 3, 10, 10, requires_grad=True)
    sketches = Sketches(40)  # all of the directions
    with record(net, [projection], backward=True, gradient=sketches.add) as recording:
        net(x).square().sum().backward()
        seen = recording.take()
        norms = recording.gradient_norms()
    assert seen.counts == {"C.0": [2], "S.0": [200]}
    assert seen.rows["C.0"][0].shape == (2, 64, 27)
    assert seen.rows["S.0"][0].shape == (2, 64, 5)
    G = torch.stack(
        [
            torch.autograd.grad(
                torch.nn.functional.conv2d(part[None], weight, module.bias, 1, 1).square().sum(),
                weight,
            )[0].flatten()
            for part in x.detach()
            for weight in [module.weight.detach().clone().requires_grad_(True)]
        ]
    )
    torch.testing.assert_close(norms, G.norm(dim=1), rtol=1e-4, atol=1e-4)
    up, down = sketches.get([projection], seen.counts["S.0"])
    torch.testing.assert_close((up[0] @ down[0]).flatten(), G.sum(0) / 200, rtol=1e-3, atol=1e-3)


def test_patches_pass_in_fp32_a_picture_at_a_time():
    x = torch.empty(4, 320, 64, 64, dtype=torch.bfloat16, device="meta")
    own = Convolution((3, 3), (1, 1), (1, 1))
    parts = list(Patches(x, own).parts(320 * 10))
    assert [pictures.start for pictures, _, _ in parts] == [0, 1, 2, 3]
    assert all(part.x.dtype == torch.float32 for *_, part in parts)
