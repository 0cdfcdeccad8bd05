"""The learning rate over the steps of a run."""

import pytest

from cntlora_core.config import TrainConfig
from cntlora_core.training.learning_rate import lr_at


def test_learning_rates():
    config = TrainConfig(steps=10, learning_rate=1.0, schedule="cosine", warmup=4)
    rates = [lr_at(config, step) for step in range(1, 11)]
    assert rates[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert rates[5:] == sorted(rates[5:], reverse=True)
    assert 0 < rates[-1] < 0.2


def test_restarts_fall_three_times():
    config = TrainConfig(steps=9, learning_rate=1.0, schedule="restarts")
    rates = [lr_at(config, step) for step in range(1, 10)]
    assert rates == pytest.approx([1, 0.75, 0.25] * 3)


def test_a_warmup_below_1_is_a_share():
    config = TrainConfig(steps=10, learning_rate=1.0, warmup=0.3)
    assert [lr_at(config, step) for step in (1, 2, 3, 4)] == [0.25, 0.5, 0.75, 1.0]
    assert TrainConfig(steps=10, warmup=3).warmup_steps == 3
