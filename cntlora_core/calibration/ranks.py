"""Variable ranks under one budget of parameters."""

from __future__ import annotations

import heapq
from collections.abc import Mapping, Sequence

from torch import Tensor

from ..lora.targets import TEXT, Projection

MAX_RANK_FACTOR = 4  # no layer takes more than this many times the mean rank


def uniform_ranks(projections: Sequence[Projection], rank: int) -> dict[str, int]:
    """`rank` for every projection, clipped to what the layer can hold."""
    return {p.name: min(rank, p.in_features, p.out_features) for p in projections}


def budget_of(projections: Sequence[Projection], rank: int) -> int:
    """Parameters that a LoRA of the same `rank` everywhere has: the budget of the data-driven
    ranks."""
    ranks = uniform_ranks(projections, rank)
    return sum(ranks[p.name] * p.parameters_per_rank for p in projections)


def shared_budget(projections: Sequence[Projection], rank: int) -> int:
    """What all layers share: as many as the attention's have at this mean `rank`."""
    return budget_of([p for p in projections if p.attention], rank)


def data_ranks(
    projections: Sequence[Projection], scores: Mapping[str, Tensor], budget: int, *, max_rank: int
) -> dict[str, int]:
    """Ranks that maximise the sum of the kept scores under sum_l r_l (m_l + d_l) <= budget.

    `scores[name]` `[k]` is non-increasing, and r_l <= min(max_rank, k). Every layer gets 1 at
    least, where the budget is large enough; beside convolutions only those that read the prompt do,
    since a trigger needs them. Greedy on score per parameter, which is optimal up to the last item
    since scores never increase; layers that no longer fit are passed over, so no further component
    fits in what is left. Each rank costs m + d parameters (EVA counts ranks instead).
    """
    one_each = sum(p.parameters_per_rank for p in projections)
    least = one_each <= budget and not any(p.convolution for p in projections)
    ranks = {p.name: int(least or p.input_key == TEXT) for p in projections}
    left = budget - sum(ranks[p.name] * p.parameters_per_rank for p in projections)
    heap: list[tuple[float, int]] = []

    def push(index: int) -> None:
        p = projections[index]
        values, rank = scores[p.name], ranks[p.name]
        if rank < min(max_rank, len(values)):
            heapq.heappush(heap, (-float(values[rank]) / p.parameters_per_rank, index))

    for index in range(len(projections)):
        push(index)
    while heap:
        _, index = heapq.heappop(heap)
        p = projections[index]
        if p.parameters_per_rank <= left:
            ranks[p.name] += 1
            left -= p.parameters_per_rank
            push(index)
    return ranks
