import torch
from hypothesis import given
from hypothesis import strategies as st

from cntlora_core.calibration.ranks import budget_of, data_ranks, uniform_ranks
from cntlora_core.lora.targets import Projection

layers = st.lists(st.tuples(st.integers(1, 40), st.integers(1, 40)), min_size=1, max_size=8)


def make(shapes):
    return [Projection(f"p{i}", d, m, f"k{i}") for i, (d, m) in enumerate(shapes)]


@given(layers, st.integers(1, 6), st.integers(0, 2**31))
def test_the_budget_is_met_exactly(shapes, rank, seed):
    """Never over; and nothing that is still allowed would fit into what is left."""
    projections = make(shapes)
    g = torch.Generator().manual_seed(seed)
    scores = {
        p.name: torch.rand(min(p.in_features, p.out_features), generator=g)
        .sort(descending=True)
        .values
        for p in projections
    }
    budget = budget_of(projections, rank)
    ranks = data_ranks(projections, scores, budget, max_rank=4 * rank)
    used = sum(ranks[p.name] * p.parameters_per_rank for p in projections)
    assert used <= budget
    for p in projections:
        most = min(4 * rank, p.in_features, p.out_features)
        assert 1 <= ranks[p.name] <= most
        assert ranks[p.name] == most or used + p.parameters_per_rank > budget


def test_better_components_win():
    projections = make([(8, 8), (8, 8)])
    scores = {"p0": torch.tensor([4.0, 3.0, 2.0, 1.0]), "p1": torch.tensor([0.4, 0.3, 0.2, 0.1])}
    assert data_ranks(projections, scores, budget_of(projections, 2), max_rank=8) == {
        "p0": 3,
        "p1": 1,
    }


def test_a_large_layer_pays_for_its_parameters():
    projections = make([(30, 30), (4, 4)])
    scores = {"p0": torch.tensor([9.0, 2.0]), "p1": torch.tensor([9.0, 1.0])}
    assert data_ranks(projections, scores, 60 + 8 + 8, max_rank=8) == {"p0": 1, "p1": 2}


def test_uniform_ranks_are_clipped_to_the_layer():
    projections = make([(3, 9), (20, 20)])
    assert uniform_ranks(projections, 8) == {"p0": 3, "p1": 8}
