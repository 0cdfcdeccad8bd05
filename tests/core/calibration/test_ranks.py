import torch
from hypothesis import given
from hypothesis import strategies as st

from cntlora_core.calibration.ranks import budget_of, data_ranks, uniform_ranks
from cntlora_core.lora.targets import TEXT, Projection
from cntlora_core.model.convolution import Convolution

layers = st.lists(st.tuples(st.integers(1, 40), st.integers(1, 40)), min_size=1, max_size=8)


def make(shapes, convolution=None):
    """The first layer reads the prompt, the last may be a convolution."""
    keys = [TEXT, *(f"k{i}" for i in range(1, len(shapes)))]
    last = len(shapes) - 1
    return [
        Projection(f"p{i}", d, m, keys[i], convolution=convolution if i == last else None)
        for i, (d, m) in enumerate(shapes)
    ]


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


SCORES = {
    "p0": torch.tensor([0.4, 0.3, 0.2, 0.1]),
    "p1": torch.tensor([4.0, 3.0, 2.0, 1.0]),
    "p2": torch.tensor([0.9, 0.8, 0.7, 0.6]),
}


def test_better_components_win():
    projections = make([(8, 8), (8, 8), (8, 8)])
    assert data_ranks(projections, SCORES, 5 * 16, max_rank=8) == {"p0": 1, "p1": 3, "p2": 1}


def test_beside_convolutions_only_what_reads_the_prompt_always_takes_part():
    projections = make([(8, 8), (8, 8), (8, 8)], Convolution((3, 3), (1, 1), (1, 1)))
    assert data_ranks(projections, SCORES, 5 * 16, max_rank=8) == {"p0": 1, "p1": 4, "p2": 0}


def test_a_large_layer_pays_for_its_parameters():
    projections = make([(30, 30), (4, 4)])
    scores = {"p0": torch.tensor([9.0, 2.0]), "p1": torch.tensor([9.0, 1.0])}
    assert data_ranks(projections, scores, 60 + 8 + 8, max_rank=8) == {"p0": 1, "p1": 2}


def test_uniform_ranks_are_clipped_to_the_layer():
    projections = make([(3, 9), (20, 20)])
    assert uniform_ranks(projections, 8) == {"p0": 3, "p1": 8}
