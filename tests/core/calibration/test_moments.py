import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from cntlora_core.calibration.moments import RunningMean, record
from cntlora_core.lora.targets import Projection


@settings(deadline=None)
@given(st.lists(st.integers(1, 20), min_size=1, max_size=6), st.integers(0, 2**31))
def test_streaming_equals_batch(counts, seed):
    g = torch.Generator().manual_seed(seed)
    chunks = [torch.randn(n, 4, generator=g) for n in counts]
    mean = RunningMean()
    for chunk in chunks:
        mean.update(chunk.T @ chunk, len(chunk))
    every = torch.cat(chunks)
    torch.testing.assert_close(mean.get(), every.T @ every / len(every), rtol=1e-4, atol=1e-5)


def test_a_million_tokens_lose_no_digits():
    mean = RunningMean()
    for _ in range(2000):
        mean.update(torch.full((1, 1), 500 * 0.1), 500)
    assert float(mean.get()) == pytest.approx(0.1, rel=1e-6)


def test_nothing_recorded_is_an_error():
    with pytest.raises(RuntimeError, match="no tokens"):
        RunningMean().get()


class Block(nn.Module):
    """Two projections of one input, and one of their product."""

    def __init__(self):
        super().__init__()
        self.q, self.k, self.out = nn.Linear(5, 4), nn.Linear(5, 4), nn.Linear(4, 3)
        self.requires_grad_(False)

    def forward(self, x):
        return self.out(self.q(x) * self.k(x))


PROJECTIONS = [
    Projection("q", 5, 4, "qk"),
    Projection("k", 5, 4, "qk"),
    Projection("out", 4, 3, "out"),
]


@settings(deadline=None, max_examples=20)
@given(st.integers(0, 2**31))
def test_moments_match_autograd(seed):
    torch.manual_seed(seed)
    block = Block()
    x = torch.randn(6, 7, 5)
    with record(block, PROJECTIONS, backward=True) as moments:
        for part in x.split(2):
            block(part).square().sum().backward()

    rows = x.reshape(-1, 5)
    torch.testing.assert_close(moments.C(PROJECTIONS[0]), rows.T @ rows / len(rows))
    assert moments.tokens(PROJECTIONS[0]) == len(rows)
    block.requires_grad_(True)
    block(x).square().sum().backward()
    for p in PROJECTIONS:
        torch.testing.assert_close(
            moments.G(p), block.get_submodule(p.name).weight.grad / len(rows), rtol=1e-4, atol=1e-5
        )
    q = block.q(x).detach().requires_grad_(True)
    block.out(q * block.k(x)).square().sum().backward()
    delta = q.grad.reshape(-1, 4)
    torch.testing.assert_close(
        moments.S(PROJECTIONS[0]), delta.T @ delta / len(rows), rtol=1e-4, atol=1e-5
    )


def test_hooks_are_removed_after_an_error():
    block = Block()
    with pytest.raises(ZeroDivisionError), record(block, PROJECTIONS, backward=False):
        raise ZeroDivisionError
    assert not any(module._forward_hooks for module in block.modules())


def test_merged_means_are_the_mean_of_all():
    g = torch.Generator().manual_seed(0)
    chunks = [torch.randn(n, 3, generator=g) for n in (5, 2, 9)]
    total = RunningMean()
    for chunk in chunks:
        one = RunningMean()
        one.update(chunk.T @ chunk, len(chunk))
        total.merge(one)
    rows = torch.cat(chunks)
    torch.testing.assert_close(total.get(), rows.T @ rows / len(rows))
    assert total.count == len(rows)
