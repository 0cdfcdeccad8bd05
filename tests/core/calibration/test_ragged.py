"""Layers of unequal ranks worked on together."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cntlora_core.calibration import ragged
from cntlora_core.calibration.closed_form import factor_steps
from cntlora_core.calibration.ragged import Ragged, grouped
from cntlora_core.calibration.second_moment import LowRank, Rows, stack

CPU = torch.device("cpu")


def made(ranks):
    return Ragged.make({f"layer {i}": rank for i, rank in enumerate(ranks)}, CPU)


@given(st.lists(st.integers(1, 5), min_size=1, max_size=6), st.integers(1, 4))
def test_there_and_back(ranks, width):
    layers = made(ranks)
    parts = [torch.rand(rank, width) + 1 for rank in ranks]
    grads = [-part for part in parts]
    rows, of_grads = layers.rows(parts, grads)
    assert torch.equal(of_grads, -rows)
    assert rows.shape == (len(ranks), max(ranks), width)
    assert [int((own != 0).any(1).sum()) for own in rows] == ranks
    assert torch.equal(layers.every_row(rows), torch.cat(parts))
    columns = layers.columns([part.T for part in parts], [part.T for part in grads])
    assert torch.equal(columns, torch.stack([rows.mT, of_grads.mT]))
    columns = columns[0]
    assert torch.equal(layers.every_column(columns), torch.cat(parts).T)
    assert [ranks[i] for i in layers.of] == [rank for rank in ranks for _ in range(rank)]


@settings(deadline=None, max_examples=30)
@given(st.lists(st.integers(1, 5), min_size=1, max_size=5), st.integers(0, 2**31))
def test_a_layer_steps_as_it_would_by_itself(ranks, seed):
    g, (m, d) = torch.Generator().manual_seed(seed), (9, 12)

    def drawn(*shape):
        return torch.randn(*shape, dtype=torch.float64, generator=g)

    parts = [(drawn(m, r), drawn(r, d), drawn(m, r), drawn(r, d)) for r in ranks]
    moments = [(LowRank.of(Rows(drawn(30, m))), LowRank.of(Rows(drawn(30, d)))) for _ in ranks]

    def steps(which):
        layers = made([ranks[i] for i in which])
        up, down, grad_up, grad_down = zip(*(parts[i] for i in which), strict=True)
        P, K = (stack(own) for own in zip(*(moments[i] for i in which), strict=True))
        (B, of_B), (A, of_A) = layers.columns(up, grad_up), layers.rows(down, grad_down)
        step_up, step_down = factor_steps(
            B, A, of_B, of_A, P, K, P.inverse(), K.inverse(), layers.counts
        )
        return layers.every_column(step_up), layers.every_row(step_down)

    alone = [steps([i]) for i in range(len(ranks))]
    up, down = steps(range(len(ranks)))
    torch.testing.assert_close(up, torch.cat([own[0] for own in alone], 1))
    torch.testing.assert_close(down, torch.cat([own[1] for own in alone]))


def test_so_many_at_a_time(monkeypatch):
    """As the largest of them takes, and one alone that is larger."""
    monkeypatch.setattr(ragged, "MOST", 100)
    ranks = {"a": 1, "b": 1, "c": 2, "d": 3, "e": 4, "f": 30}
    found = [(tuple(own.names), tuple(own.ranks)) for own in grouped(ranks, 10, CPU)]
    assert found == [
        (("a", "b", "c"), (1, 1, 2)), (("d", "e"), (3, 4)), (("f",), (30,)),
    ]  # fmt: skip
