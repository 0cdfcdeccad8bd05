"""A layer's gradient from what it does to random vectors."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cntlora_core.calibration.inputs import Tokens
from cntlora_core.calibration.sketch import Sketches, sketch_bytes, sketch_width
from cntlora_core.lora.targets import Projection
from cntlora_core.training.shapes import peak_bytes

seeds = st.integers(0, 2**31)


def passes(m, d, tokens, pictures, seed):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(pictures, tokens, size, generator=generator) for size in (m, d)]


def whole(sketches, projection, tokens=1):
    """What `tokens` brought, as a mean of them."""
    up, down = sketches.get([projection], [tokens])
    return up[0] @ down[0]


def gradient(delta, x):
    return delta.flatten(0, 1).T @ x.flatten(0, 1) / x.shape[:2].numel()


@settings(deadline=None)
@given(st.integers(1, 40), st.integers(1, 40), st.integers(1, 3), st.integers(1, 3), seeds)
def test_what_has_no_more_directions_is_exact(m, d, tokens, pictures, seed):
    """Whichever of both sides is the wider, and however few there are."""
    delta, x = passes(m, d, tokens, pictures, seed)
    sketches = Sketches(9)
    for part in zip(delta.split(1), x.split(1), strict=True):
        sketches.add("p", part[0], Tokens(part[1]))
    up, down = sketches.get([Projection("p", d, m, "p")], [x.shape[:2].numel()])
    torch.testing.assert_close(up[0] @ down[0], gradient(delta, x), rtol=1e-3, atol=1e-3)
    assert up.shape[-1] <= 9


def test_leading_directions_are_kept_and_little_else_is_lost():
    generator = torch.Generator().manual_seed(0)
    strength = 1 / torch.arange(1.0, 201) ** 1.5
    delta = torch.randn(1, 3000, 200, generator=generator)
    x = delta @ torch.randn(200, 150, generator=generator) * strength[:150]
    sketches = Sketches(26)
    sketches.add("p", delta * strength, Tokens(x))
    G = gradient(delta * strength, x)
    error = torch.linalg.matrix_norm(whole(sketches, Projection("p", 150, 200, "p"), 3000) - G)
    best = torch.linalg.svdvals(G)[26:].square().sum().sqrt()
    assert float(error) < 4 * float(best)
    assert float(error) < 0.05 * float(G.norm())


@pytest.mark.parametrize(("m", "d"), [(320, 320), (320, 2880)])  # attention's, a convolution's
def test_many_faint_directions_are_not_taken_for_leading_ones(m, d):
    """As in wide layers, whose gradients are mostly noise: what the leading terms claim is there,
    and nearly the most that so many can hold."""
    generator = torch.Generator().manual_seed(0)
    leading = torch.randn(m, 4, generator=generator) @ torch.randn(4, d, generator=generator)
    fall = torch.arange(1.0, d + 1) ** -0.5  # of strengths, as activations' and gradients' are
    sketches, G = Sketches(sketch_width(4)), torch.zeros(m, d)
    for seed in range(4):
        delta, x = passes(m, d, 100, 2, seed)
        x = x * fall + 0.001 * delta @ leading  # alike in every pass, beside noise
        delta = delta * fall[:m]
        sketches.add("p", delta, Tokens(x))
        G += delta.flatten(0, 1).T @ x.flatten(0, 1)
    U, sigma, Vh = torch.linalg.svd(whole(sketches, Projection("p", d, m, "p")), False)
    claimed, held = sigma[:4], (U.T @ G @ Vh.T).diagonal()[:4]
    best = torch.linalg.svdvals(G)[:4].square().sum()
    assert float(claimed.square().sum()) < 1.05 * float(held.square().sum())
    assert float(held.square().sum()) > 0.95 * float(best)


def test_norms_of_single_pictures_are_right_in_the_mean():
    ratios = []
    for seed in range(30):
        delta, x = passes(64, 96, 20, 4, seed)
        real = (delta.mT @ x).square().sum((1, 2))
        ratios.append(Sketches(26).add("p", delta, Tokens(x)).square() / real)
    ratios = torch.cat(ratios)
    assert float(ratios.mean()) == pytest.approx(1, abs=0.05)
    assert float(ratios.std()) < 0.3


@pytest.mark.parametrize("at_once", [1, 150, 1000])
def test_parts_of_a_pass_add_up(monkeypatch, at_once):
    """Tokens of a picture, or some pictures at once: 28 numbers a token, 20 tokens each."""
    delta, x = passes(12, 16, 20, 3, 0)
    entire, parted = Sketches(8), Sketches(8)
    norms = entire.add("p", delta, Tokens(x))
    monkeypatch.setattr("cntlora_core.calibration.inputs.AT_ONCE", at_once)
    torch.testing.assert_close(parted.add("p", delta, Tokens(x)), norms)
    for one, other in zip(parted.sums["p"], entire.sums["p"], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_summed_in_full_and_never_overflows(dtype):
    """As strong as fp16 holds, and as many tokens as SDXL has: their sums are beyond it."""
    scale = 1024.0 if dtype == torch.float16 else 1.0
    delta, x = (part.to(dtype) for part in passes(12, 16, 4096, 1, 0))
    delta = (delta.abs() * 1e4).clamp_max(6e4)
    halves, full = Sketches(8), Sketches(8)
    norms = halves.add("p", delta, Tokens(x.abs() * 1e3), scale)
    expected = full.add("p", delta.float() / scale, Tokens((x.abs() * 1e3).float()))
    torch.testing.assert_close(norms, expected)
    assert torch.isfinite(norms).all()
    for one, other in zip(halves.sums["p"], full.sums["p"], strict=True):
        assert one.dtype == torch.float32
        torch.testing.assert_close(one, other)


def test_what_passes_in_fp32_is_bounded():
    """SDXL's widest layer at 1024 px, two pictures, in bf16: 190 MB would be its copies."""
    delta, x = (torch.empty(2, 4096, n, dtype=torch.bfloat16, device="meta") for n in (5120, 640))
    sketches = Sketches(26)
    sketches.add("p", delta, Tokens(x))
    held = [delta, x, *sketches.sums["p"], *sketches.probes.values()]
    assert peak_bytes(lambda: sketches.add("p", delta, Tokens(x)), held) < 75e6


def test_processes_add_up_whoever_counts(spoken_by_two):
    delta, x = passes(12, 15, 3, 2, 0)
    both = Sketches(8)
    both.add("p", delta, Tokens(x))
    mine, other = Sketches(8), Sketches(8)
    mine.add("p", delta[:1], Tokens(x[:1]))
    mine.add("p", delta[1:], Tokens(x[1:]), counts=False)  # seen by both, counted by one
    other.add("p", delta[1:], Tokens(x[1:]))
    mine.combine(spoken_by_two(other))
    p = Projection("p", 15, 12, "p")
    torch.testing.assert_close(whole(mine, p), whole(both, p), rtol=1e-4, atol=1e-5)


@pytest.fixture
def spoken_by_two():
    """A group of this process and of one that brings `other`'s sums."""

    class Two:
        rank, size = 0, 2

        def __init__(self, other):
            self.parts = list(other.sums.values())

        def sum_(self, tensors):
            for tensor, more in zip(tensors, self.parts.pop(0), strict=True):
                tensor += more

    return Two


def test_nothing_recorded_is_an_error():
    with pytest.raises(RuntimeError, match="no tokens"):
        Sketches(4).get([Projection("p", 3, 3, "p")], [0])


@pytest.mark.parametrize(("m", "d"), [(12, 150), (150, 12), (150, 150)])
def test_the_bytes_are_those_of_the_sums(m, d):
    delta, x = passes(m, d, 3, 1, 0)
    sketches = Sketches(8)
    sketches.add("p", delta, Tokens(x))
    said = sketch_bytes([Projection("p", d, m, "p")], 8)
    assert said == sum(part.nbytes for part in sketches.sums["p"])


def test_the_longer_side_has_the_fewer_vectors():
    wide, tall = (sketch_bytes([Projection("p", *size, "p")], 8) for size in ((900, 90), (90, 900)))
    assert wide == tall == 4 * (900 * 8 + 90 * 17)
