"""Second moments of small rank against whole matrices."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cntlora_core.calibration import linalg
from cntlora_core.calibration.natural_step import Half, both_ways, natural_steps
from cntlora_core.calibration.second_moment import (
    RANK,
    WIDE_RANK,
    Diagonal,
    LowRank,
    Rows,
    moved,
    rank_of,
    stack,
    unstack,
)

seeds = st.integers(0, 2**31)


def rows_of(n, d, seed, spectrum=None):
    g = torch.Generator().manual_seed(seed)
    scale = torch.linspace(1, 0.1, d) if spectrum is None else spectrum
    turn = torch.linalg.qr(torch.randn(d, d, generator=g, dtype=torch.float64)).Q
    return (torch.randn(n, d, generator=g, dtype=torch.float64) * scale) @ turn


def dense(moment):
    return moment.matmul(torch.eye(moment.diagonal().shape[-1], dtype=torch.float64))


def moment(rows):
    return rows.T @ rows / len(rows)


@settings(deadline=None, max_examples=30)
@given(st.integers(1, RANK), st.integers(1, 40), st.integers(1, 40), seeds)
def test_nothing_is_left_out_of_a_narrow_layer(d, n, more, seed):
    first, second = rows_of(n, d, seed), rows_of(more, d, seed + 1)
    both = LowRank.of(Rows(first)).merged(Rows(second), more / (n + more))
    torch.testing.assert_close(dense(both), moment(torch.cat([first, second])))
    again = LowRank.of(Rows(first)).merged(LowRank.of(Rows(second)), more / (n + more))
    torch.testing.assert_close(dense(again), dense(both))


def test_wide_layers_keep_more_directions():
    """Of the miniature's widths 32, from a fifth on more, 64 at most, and never more than all."""
    assert [rank_of(d) for d in (5, 96, 128, 160)] == [5, RANK, RANK, RANK]
    assert [rank_of(d) for d in (240, 320, 1280)] == [48, WIDE_RANK, WIDE_RANK]


def falling(d):
    return torch.arange(1, d + 1, dtype=torch.float64) ** -1.0


@pytest.mark.parametrize("d", [2 * RANK, 96, 160, 240, 400])
def test_of_a_wide_layer_the_leading_directions_are_kept(d):
    """Streamed, it is nearly as near as the best matrix of this form; the trace is exact."""
    parts = rows_of(200, d, seed=0, spectrum=falling(d)).split(50)
    streamed = LowRank.of(Rows(parts[0]))
    for k, part in enumerate(parts[1:], 2):
        streamed = streamed.merged(Rows(part), 1 / k)
    C, kept = moment(torch.cat(parts)), rank_of(d)
    values, vectors = torch.linalg.eigh(C)
    best = LowRank(vectors[:, -kept:], torch.diag(values[-kept:]), values[:-kept].mean())
    error, least = (torch.linalg.matrix_norm(dense(m) - C) for m in (streamed, best))
    assert float(error) < 2.5 * float(least) < 0.01 * float(torch.linalg.matrix_norm(C))
    torch.testing.assert_close(streamed.trace(), C.trace())
    torch.testing.assert_close(
        streamed.basis.T @ streamed.basis, torch.eye(kept, dtype=torch.float64)
    )
    torch.testing.assert_close(streamed.diagonal(), dense(streamed).diagonal())


@settings(deadline=None, max_examples=20)
@given(st.sampled_from([5, RANK + 8, 3 * RANK]), st.booleans(), st.integers(1, 9), seeds)
def test_how_strongly_weights_answer(d, thin, m, seed):
    """In their own precision too: half of it is brought to the moment's."""
    each = [Rows(rows_of(60, d, seed + i)) for i in range(3)]
    moments = stack([(Diagonal if thin else LowRank).of(rows) for rows in each])
    weights = torch.randn(3, m, d, generator=torch.Generator().manual_seed(seed)).half()
    found = moments.power(iter(weights))
    for own, W, power in zip(unstack(moments), weights.double(), found, strict=True):
        torch.testing.assert_close(power, (W @ dense(own) @ W.T).trace())


@settings(deadline=None, max_examples=25)
@given(st.sampled_from([5, RANK + 8, 3 * RANK]), st.floats(0.01, 1), st.floats(0.1, 4), seeds)
def test_its_algebra_is_that_of_matrices(d, rho, weight, seed):
    C = LowRank.of(Rows(rows_of(60, d, seed)))
    other = LowRank.of(Rows(rows_of(60, d, seed + 1)))
    K = C.damped(rho).plus(other, weight)
    assert d < 2 * RANK or torch.equal(K.basis[:, :RANK], C.basis)
    expected = dense(C) + weight * dense(other)
    expected += rho * dense(C).trace() / d * torch.eye(d, dtype=torch.float64)
    torch.testing.assert_close(dense(K), expected)
    torch.testing.assert_close(dense(K.inverse()), torch.linalg.inv(expected))
    root = dense(K.inverse().root())
    torch.testing.assert_close(root @ root, torch.linalg.inv(expected))


def test_rows_that_say_little_do_no_harm():
    """Fewer than the rank, all alike, or nothing: still orthonormal, finite and invertible."""
    d = 2 * RANK
    alike = torch.ones(40, d)
    for rows in (torch.randn(3, d), alike, torch.zeros(40, d)):
        C = LowRank.of(Rows(rows))
        for _ in range(3):
            C = C.merged(Rows(rows), 0.5)
        torch.testing.assert_close(C.basis.T @ C.basis, torch.eye(RANK), rtol=0, atol=1e-5)
        K = C.damped(0.1)
        X = torch.randn(d, 2)
        assert torch.isfinite(K.inverse().matmul(X)).all()
        assert torch.isfinite(K.root().matmul(X)).all()
    torch.testing.assert_close(
        LowRank.of(Rows(alike)).matmul(torch.ones(d, 1)), torch.full((d, 1), float(d))
    )


def test_new_directions_are_found():
    """Strong rows in a direction that had none."""
    d = 3 * RANK
    old = rows_of(200, d, 1)
    new = torch.randn(50, 1, dtype=torch.float64) * (10 * torch.eye(d, dtype=torch.float64)[d - 1])
    C = LowRank.of(Rows(old)).merged(Rows(new), 0.2)
    expected = 0.8 * moment(old)[-1, -1] + 0.2 * moment(new)[-1, -1]
    assert float(C.diagonal()[-1]) > 0.9 * float(expected)


@settings(deadline=None, max_examples=20)
@given(st.integers(1, 9), st.integers(1, 5), seeds)
def test_a_diagonal_stands_for_its_matrix(d, k, seed):
    rows = rows_of(12, d, seed)
    D = Diagonal.of(Rows(rows))
    torch.testing.assert_close(D.values, moment(rows).diagonal())
    X = rows_of(d, k, seed + 1)
    matrix = torch.diag(D.values)
    K = D.damped(0.3).plus(D, 2.0)
    expected = 3 * matrix + 0.3 * matrix.trace() / d * torch.eye(d, dtype=torch.float64)
    torch.testing.assert_close(K.matmul(X), expected @ X)
    torch.testing.assert_close(K.inverse().root().root().matmul(X), expected.inverse() ** 0.25 @ X)


def test_several_are_worked_on_together():
    each = [LowRank.of(Rows(rows_of(50, 48, seed))) for seed in range(3)]
    others = [Rows(rows_of(20, 48, seed)) for seed in range(3, 6)]
    together = stack(each).merged(Rows(torch.stack([o.rows for o in others])), 0.3).damped(0.1)
    for one, own, other in zip(unstack(together), each, others, strict=True):
        torch.testing.assert_close(dense(one), dense(own.merged(other, 0.3).damped(0.1)))
    assert moved(each[0], torch.device("meta")).basis.is_meta


def test_what_has_no_factor_moves_nothing():
    """Nobody asks the device whether it was one: such a layer stays where it is."""
    assert linalg.cholesky(torch.tensor([[1.0, 2.0], [2.0, 1.0]])).isnan().all()
    both = torch.stack([torch.eye(2), torch.full((2, 2), torch.nan)])
    assert torch.equal(linalg.cholesky(both)[0], torch.eye(2))
    (metric,) = both_ways([LowRank(torch.eye(2).expand(2, 2, 2), both, torch.ones(2))])
    ones = torch.ones(2, 4, 2)
    half, order = Half(ones, metric, torch.tensor([2, 2])), torch.arange(2)
    for (found,) in natural_steps([half], [half], order, order):
        step = found.rows
        assert step[0].abs().min() > 0
        assert torch.equal(step[1], torch.zeros(2, 2))
