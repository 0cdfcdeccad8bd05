import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cntlora_core.data.importance import BINS, UNIFORM_SHARE, Importance, draw_timesteps

STEPS = 1000
densities = st.lists(st.floats(-3, 3), min_size=3, max_size=12).map(
    lambda y: Importance.measured(
        torch.linspace(0, STEPS - 1, len(y)).long(), torch.tensor(y).exp(), STEPS
    )
)


@settings(deadline=None)
@given(densities)
def test_weights_undo_the_draws_and_are_bounded(importance):
    """Summed over the schedule, the density times the weight is one everywhere."""
    t = torch.arange(STEPS)
    weights = importance.weights(t, STEPS)
    density = torch.tensor(importance.density)
    assert density.mean() == pytest.approx(1)
    assert float(weights.max()) <= 1 / UNIFORM_SHARE + 1e-3
    torch.testing.assert_close(density[t * BINS // STEPS] * weights, torch.ones(STEPS))


@settings(deadline=None)
@given(densities, st.integers(1, 64), st.integers(0, 2**31))
def test_draws_follow_the_density(importance, count, seed):
    generator = torch.Generator().manual_seed(seed)
    drawn = importance.draw(count, STEPS, generator)
    assert drawn.shape == (count,)
    assert int(drawn.min()) >= 0
    assert int(drawn.max()) < STEPS
    many = importance.draw(20_000, STEPS, generator)
    share = torch.bincount(many * BINS // STEPS, minlength=BINS) * (BINS / 20_000)
    # Stratified: each part of the schedule holds what it should, to a draw at either end, and to
    # the step that lies across it: a part is 31.25 of them.
    torch.testing.assert_close(
        share, torch.tensor(importance.density).float(), atol=3 * BINS / 20_000, rtol=0.05
    )


def test_a_mean_by_importance_is_that_of_uniform_draws():
    importance = Importance.usual()
    losses = torch.linspace(2, 0.1, STEPS) ** 2
    t = importance.draw(4096, STEPS, torch.Generator().manual_seed(0))
    estimate = (losses[t] * importance.weights(t, STEPS)).mean()
    assert float(estimate) == pytest.approx(float(losses.mean()), rel=2e-3)


def test_longer_gradients_are_drawn_more_often():
    t = torch.tensor([60, 190, 310, 440, 560, 690, 810, 940])
    importance = Importance.measured(t, torch.linspace(2.5, 0.2, 8), STEPS)
    assert importance.density[0] > 1.5 * importance.density[BINS // 2] > 2 * importance.density[-1]
    flat = Importance.measured(t, torch.full((8,), 3.0), STEPS)
    assert flat.density == pytest.approx([1.0] * BINS)


def test_without_importance_draws_are_uniform_and_weigh_alike():
    t, weights = draw_timesteps(None, 10, STEPS, torch.Generator().manual_seed(0))
    assert weights is None
    assert sorted(t // 100) == list(range(10))


def test_many_small_batches_cover_the_schedule_evenly():
    """Two timesteps a batch, 24 batches: nearer to the density than as many random ones."""
    importance = Importance.usual()
    generator = torch.Generator().manual_seed(0)

    share = torch.tensor(importance.density).repeat_interleave(STEPS // BINS + 1)[:STEPS]
    wanted = share.cumsum(0) / share.sum()

    def farthest(turns):  # between how many were drawn up to a timestep, and should have been
        t = torch.cat([draw_timesteps(importance, 2, STEPS, generator, k)[0] for k in turns])
        return float((torch.bincount(t, minlength=STEPS).cumsum(0) / len(t) - wanted).abs().max())

    assert farthest(range(24)) < 0.06 < farthest([None] * 24)


def test_a_picture_without_a_gradient_says_nothing_of_the_timesteps():
    """Its mask shows nothing: it would be taken for a gradient of 1e-38."""
    t = torch.arange(8) * 125
    norms = 5 * torch.exp(-2 * t / 1000)
    whole = Importance.measured(t[1:], norms[1:], 1000)
    norms[0] = 0
    assert Importance.measured(t, norms, 1000) == whole
    assert Importance.measured(t, torch.zeros(8), 1000) == Importance.usual()
