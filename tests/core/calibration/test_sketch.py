"""A layer's gradient from what it does to random vectors."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cntlora_core.calibration.sketch import Sketches, sketch_bytes
from cntlora_core.lora.targets import Projection

seeds = st.integers(0, 2**31)


def passes(m, d, tokens, pictures, seed):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(pictures, tokens, size, generator=generator) for size in (m, d)]


def gradient(delta, x):
    return delta.flatten(0, 1).T @ x.flatten(0, 1) / x.shape[:2].numel()


@settings(deadline=None)
@given(st.integers(1, 40), st.integers(1, 40), st.integers(1, 3), st.integers(1, 3), seeds)
def test_what_has_no_more_directions_is_exact(m, d, tokens, pictures, seed):
    """Whichever of both sides is the wider, and however few there are."""
    delta, x = passes(m, d, tokens, pictures, seed)
    sketches = Sketches(9)
    for part in zip(delta.split(1), x.split(1), strict=True):
        sketches.add("p", *part)
    found = sketches.get(Projection("p", d, m, "p"))
    torch.testing.assert_close(found.delta(), gradient(delta, x), rtol=1e-3, atol=1e-3)
    assert found.rank <= 9


def test_leading_directions_are_kept_and_little_else_is_lost():
    generator = torch.Generator().manual_seed(0)
    strength = 1 / torch.arange(1.0, 201) ** 1.5
    delta = torch.randn(1, 3000, 200, generator=generator)
    x = delta @ torch.randn(200, 150, generator=generator) * strength[:150]
    sketches = Sketches(26)
    sketches.add("p", delta * strength, x)
    G = gradient(delta * strength, x)
    error = torch.linalg.matrix_norm(sketches.get(Projection("p", 150, 200, "p")).delta() - G)
    best = torch.linalg.svdvals(G)[26:].square().sum().sqrt()
    assert float(error) < 4 * float(best)
    assert float(error) < 0.05 * float(G.norm())


def test_norms_of_single_pictures_are_right_in_the_mean():
    ratios = []
    for seed in range(30):
        delta, x = passes(64, 96, 20, 4, seed)
        real = (delta.mT @ x).square().sum((1, 2))
        ratios.append(Sketches(26).add("p", delta, x) / real)
    ratios = torch.cat(ratios)
    assert float(ratios.mean()) == pytest.approx(1, abs=0.05)
    assert float(ratios.std()) < 0.3


def test_processes_add_up_whoever_counts(spoken_by_two):
    delta, x = passes(12, 15, 3, 2, 0)
    whole = Sketches(8)
    whole.add("p", delta, x)
    mine, other = Sketches(8), Sketches(8)
    mine.add("p", delta[:1], x[:1])
    mine.add("p", delta[1:], x[1:], counts=False)  # seen by both, counted by one
    other.add("p", delta[1:], x[1:])
    mine.combine(spoken_by_two(other))
    p = Projection("p", 15, 12, "p")
    torch.testing.assert_close(mine.get(p).delta(), whole.get(p).delta(), rtol=1e-4, atol=1e-5)
    assert mine.tokens == whole.tokens


@pytest.fixture
def spoken_by_two():
    """A group of this process and of one that brings `other`'s sums."""

    class Two:
        rank, size = 0, 2

        def __init__(self, other):
            self.parts = [
                [*sums, torch.tensor([float(n)])]
                for sums, n in zip(other.sums.values(), other.tokens.values(), strict=True)
            ]

        def sum_(self, tensors):
            for tensor, more in zip(tensors, self.parts.pop(0), strict=True):
                tensor += more

    return Two


def test_nothing_recorded_is_an_error():
    with pytest.raises(RuntimeError, match="no tokens"):
        Sketches(4).get(Projection("p", 3, 3, "p"))


def test_the_bytes_are_those_of_the_sums():
    delta, x = passes(12, 150, 3, 1, 0)
    sketches = Sketches(8)
    sketches.add("p", delta, x)
    said = sketch_bytes([Projection("p", 150, 12, "p")], 8)
    assert said == sum(part.nbytes for part in sketches.sums["p"])
