"""Layers of unequal ranks worked on together."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cntlora_core.calibration import moments
from cntlora_core.calibration.natural_step import Half, both_ways, natural_steps
from cntlora_core.calibration.ragged import Ragged, grouped, together
from cntlora_core.calibration.second_moment import LowRank, Rows, stack
from cntlora_core.lora.targets import Projection

CPU = torch.device("cpu")


def made(ranks, width):
    return Ragged.make({f"layer {i}": rank for i, rank in enumerate(ranks)}, width, CPU)


@given(st.lists(st.integers(1, 5), min_size=1, max_size=6), st.integers(1, 4))
def test_there_and_back(ranks, width):
    layers = made(ranks, width)
    parts = [torch.rand(rank, width) + 1 for rank in ranks]
    grads = [-part for part in parts]
    rows = layers.rows(parts, grads)
    assert rows.shape == (len(ranks), 2 * max(ranks), width)
    rows, of_grads = rows.chunk(2, 1)
    assert torch.equal(of_grads, -rows)
    assert [int((own != 0).any(1).sum()) for own in rows] == ranks
    assert torch.equal(layers.every_row(rows), torch.cat(parts))
    assert [ranks[i] for i in layers.of] == [rank for rank in ranks for _ in range(rank)]


@settings(deadline=None, max_examples=30)
@given(
    st.lists(
        st.tuples(st.sampled_from([9, 11]), st.sampled_from([12, 9]), st.integers(1, 5)),
        min_size=1,
        max_size=5,
    ),
    st.integers(0, 2**31),
)
def test_a_layer_steps_as_it_would_by_itself(shapes, seed):
    """Whatever the others' widths and ranks."""
    g = torch.Generator().manual_seed(seed)

    def drawn(*shape):
        return torch.randn(*shape, dtype=torch.float64, generator=g)

    projections = [Projection(f"p{i}", d, m, f"in{i}") for i, (m, d, _) in enumerate(shapes)]
    ranks = {f"p{i}": rank for i, (*_, rank) in enumerate(shapes)}
    own = {
        f"p{i}": (drawn(r, m), drawn(r, m), drawn(r, d), drawn(r, d))
        for i, (m, d, r) in enumerate(shapes)
    }
    moments = {
        f"p{i}": [LowRank.of(Rows(drawn(30, width))) for width in (m, d)]
        for i, (m, d, _) in enumerate(shapes)
    }

    def steps(which):
        (group,) = together(which, ranks, CPU)

        def halves(groups, half):
            return [
                Half(
                    layers.rows(
                        [own[name][2 * half] for name in layers.names],
                        [own[name][2 * half + 1] for name in layers.names],
                    ),
                    *both_ways([stack([moments[name][half] for name in layers.names])]),
                    layers.counts,
                )
                for layers in groups
            ]

        ups, downs = halves(group.up, 0), halves(group.down, 1)
        found = natural_steps(ups, downs, group.to_up, group.to_down)
        rows = {}
        for letter, groups, made in zip("BA", (group.up, group.down), found, strict=True):
            for layers, step in zip(groups, made, strict=True):
                each = layers.every_row(step.rows).split(layers.ranks)
                keys = [f"{name}.{letter}" for name in layers.names]
                rows |= dict(zip(keys, each, strict=True))
        assert list(rows) == group.factors()
        assert [len(rows[key]) for key in rows] == [ranks[key[:-2]] for key in rows]
        return rows

    every = steps(projections)
    alone = [steps([p]) for p in projections]
    assert every.keys() == {key for one in alone for key in one}
    for one in alone:
        for key, step in one.items():
            torch.testing.assert_close(every[key], step)


def test_so_many_at_a_time(monkeypatch):
    """As the largest of them takes, and one alone that is larger."""
    monkeypatch.setattr(moments, "MOST", 100)
    ranks = {"a": 1, "b": 1, "c": 2, "d": 3, "e": 4, "f": 30}
    found = [(tuple(own.names), tuple(own.ranks)) for own in grouped(ranks, 10, CPU)]
    assert found == [
        (("a", "b", "c"), (1, 1, 2)),
        (("d", "e"), (3, 4)), (("f",), (30,)),
    ]  # fmt: skip


def test_small_systems_are_bounded(monkeypatch):
    """Layers of small ranks are not brought to the largest of all."""
    monkeypatch.setattr(moments, "MOST", 50)
    projections = [Projection(name, 4, 6, name) for name in "abcdef"]
    ranks = dict(zip("fabecd", (9, 2, 2, 5, 4, 3), strict=True))
    found = [*together(projections, ranks, CPU)]
    names = [sorted(name for own in group.up for name in own.names) for group in found]
    assert names == [["a", "b", "d"], ["c", "e"], ["f"]]
