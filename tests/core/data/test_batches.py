import torch

from cntlora_core.data.batches import draw_noised, fixed_noised, mean_loss, shuffled_cycle


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
