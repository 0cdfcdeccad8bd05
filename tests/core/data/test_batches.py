import pytest
import torch

from cntlora_core.data.batches import (
    batch_order,
    draw_batch,
    draw_noised,
    fixed_noised,
    mean_loss,
    shuffled_cycle,
)
from cntlora_core.data.importance import Importance


def test_every_picture_equally_often():
    index = shuffled_cycle(12, 4, torch.Generator().manual_seed(0))
    assert torch.bincount(index).tolist() == [3, 3, 3, 3]
    assert shuffled_cycle(3, 5, torch.Generator().manual_seed(0)).unique().numel() == 3


def test_the_validation_set_is_always_the_same(subject):
    first, second = (fixed_noised(subject, 1000).sizes[0] for _ in range(2))
    assert torch.equal(first.noise, second.noise)
    assert len(first) == 8 * len(subject)
    assert first.timesteps[:8].tolist() == [62, 187, 312, 437, 562, 687, 812, 937]
    torch.manual_seed(99)
    assert torch.equal(first.noise, fixed_noised(subject, 1000).sizes[0].noise)


def test_the_mean_does_not_depend_on_the_batch_size(mini_sd, subject):
    triples = draw_noised(subject, 7, 1000, torch.Generator().manual_seed(0))
    assert abs(mean_loss(mini_sd, triples, 7) - mean_loss(mini_sd, triples, 3)) < 1e-6


@pytest.mark.parametrize("size", [2, 4])
def test_by_importance_a_picture_is_drawn_with_a_noise_and_its_opposite(subject, size):
    generator = torch.Generator().manual_seed(0)
    importance, count = Importance.usual(), 2 * len(subject)
    order = batch_order(subject, size, count, generator, importance)
    seen = torch.cat(order).bincount()
    assert seen.tolist() == [2 * size] * len(subject), "each as often"
    batch = draw_batch(subject, order[0], 1000, generator, importance, turn=0)
    assert torch.equal(batch.noise[::2], -batch.noise[1::2])
    assert torch.equal(order[0][::2], order[0][1::2])
    assert len(set(batch.timesteps.tolist())) == size


def test_odd_batches_and_uniform_draws_are_not_in_pairs(subject):
    generator = torch.Generator().manual_seed(0)
    for size, importance in ((3, Importance.usual()), (2, None)):
        (index,) = batch_order(subject, size, 1, generator, importance)
        assert len(set(index.tolist())) == size
        batch = draw_batch(subject, index, 1000, generator, importance, turn=0)
        assert not torch.equal(batch.noise[0], -batch.noise[1])
