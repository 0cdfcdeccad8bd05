"""Natural-gradient directions of both factors against brute force, on small random problems."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cntlora_core.calibration.natural_step import (
    ROW_DAMPING,
    Half,
    both_ways,
    damped_inverses,
    natural_steps,
)
from cntlora_core.calibration.second_moment import Diagonal, LowRank, Rows, stack

seeds = st.integers(0, 2**31)


def drawn(*shape, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, dtype=torch.float64, generator=generator)


def moment_of(width, seed, thin):
    rows = Rows(drawn(4 * width, width, seed=seed))
    return (Diagonal if thin else LowRank).of(rows).damped(0.1)


def dense(moment, width):
    return moment.matmul(torch.eye(width, dtype=torch.float64))


@settings(deadline=None)
@given(st.integers(2, 40), st.integers(1, 4), st.booleans(), seeds)
def test_a_metric_and_its_inverse_share_products(width, rank, thin, seed):
    moment, rows = moment_of(width, seed, thin), drawn(2 * rank, width, seed=seed + 1)
    (metric,) = both_ways([stack([moment])])
    form, direction = metric.products(rows[None])
    X, Y = rows.chunk(2)
    M = dense(moment, width)
    torch.testing.assert_close(form[0], X @ M @ X.T)
    torch.testing.assert_close(direction[0] @ M, Y)


@settings(deadline=None)
@given(st.integers(2, 9), st.integers(2, 9), st.integers(1, 4), st.booleans(), st.booleans(), seeds)
def test_a_step_lands_at_the_models_minimum(m, d, r, thin_in, thin_out, seed):
    """<G, D> + 1/2 tr(P D K D^T), in the other factor's span: a whole step in B from B = 0 leaves
    no gradient for B."""
    G, A = drawn(m, d, seed=seed), drawn(r, d, seed=seed + 1)
    P, K = moment_of(m, seed + 2, thin_out), moment_of(d, seed + 3, thin_in)
    up = torch.cat([torch.zeros(r, m, dtype=torch.float64), (G @ A.T).T])
    down = torch.cat([A, torch.zeros(r, d, dtype=torch.float64)])
    up, down = (
        Half(rows[None], *both_ways([stack([metric])]), torch.tensor([r]))
        for rows, metric in ((up, P), (down, K))
    )
    only = torch.tensor([0])
    (of_B,), (of_A,) = natural_steps([up], [down], only, only)
    assert not of_A.rows.any()
    B = of_B.rows[0].T
    left = P.matmul(-B @ K.matmul(A.T).T) @ A.T + G @ A.T  # the model's gradient after it
    rows = A @ K.matmul(A.T)
    damping = ROW_DAMPING * rows.diagonal().mean()  # what the rows' own damping leaves, exactly
    torch.testing.assert_close(left, damping * P.matmul(B))
    assert float(left.norm()) <= float((G @ A.T).norm())
    if torch.linalg.eigvalsh(rows)[0] >= damping * 100:  # no row nearly depends on the others
        assert float(left.norm()) <= 0.01 * float((G @ A.T).norm())
    torch.testing.assert_close(of_B.squares[0], ((G @ A.T) * B).sum())
    assert not of_A.squares.any()


def test_systems_of_all_shapes_are_one():
    """Zeros beyond a layer's own rank change nothing."""
    ranks = [torch.tensor([2, 1]), torch.tensor([3]), torch.tensor([1, 1, 1])]
    forms = []
    for seed, own in enumerate(ranks):
        form = torch.zeros(len(own), int(own.max()), int(own.max()), dtype=torch.float64)
        for i, rank in enumerate(own):
            part = drawn(rank, rank + 1, seed=10 * seed + i)
            form[i, :rank, :rank] = part @ part.T
        forms.append(form)
    found = iter(damped_inverses(forms, 0.2, ranks))
    for form, own in zip(forms, ranks, strict=True):
        for layer, rank in zip(form, own, strict=True):
            layer, inverse = layer[:rank, :rank], next(found)
            expected = layer + 0.2 * layer.diagonal().mean() * torch.eye(rank).to(layer)
            torch.testing.assert_close(inverse[:rank, :rank], expected.inverse())
            assert not inverse[:rank, rank:].any()


def test_other_metrics_are_refused():
    with pytest.raises(TypeError, match="Rows"):
        both_ways([Rows(torch.ones(1, 2, 3))])


def test_metrics_of_all_widths_are_inverted_as_one():
    moments = [
        moment_of(width, width, thin) for width, thin in ((9, False), (40, False), (9, True))
    ]
    moments.append(moment_of(50, 7, False))
    rows = [drawn(1, 2, moment.diagonal().shape[-1], seed=1) for moment in moments]
    together = both_ways([stack([moment]) for moment in moments])
    for moment, own, metric in zip(moments, rows, together, strict=True):
        (alone,) = both_ways([stack([moment])])
        for one, other in zip(metric.products(own), alone.products(own), strict=True):
            torch.testing.assert_close(one, other)
