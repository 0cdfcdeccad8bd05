import pytest
import torch

from cntlora_core.lora.averaging import RunningAverage


def test_the_mean_of_a_constant_is_the_constant_and_of_a_ramp_lags():
    average = RunningAverage(torch.zeros(3), 0.95)
    for _ in range(200):
        average.add(torch.ones(3))
    torch.testing.assert_close(average.value, torch.ones(3), atol=1e-3, rtol=0)
    ramp = RunningAverage(torch.zeros(1), 0.95)
    for n in range(400):
        ramp.add(torch.tensor([float(n)]))
    assert float(ramp.value) == pytest.approx(399 - 19, abs=0.5)  # 1 / (1 - 0.95) - 1 steps behind


def test_the_first_steps_are_soon_forgotten():
    average = RunningAverage(torch.full((1,), 100.0), 0.95)
    for _ in range(8):
        average.add(torch.zeros(1))
    assert float(average.value) < 1


def test_without_averaging_the_last_weights_stay():
    average = RunningAverage(torch.zeros(2), 0.0)
    average.add(torch.tensor([1.0, 2.0]))
    assert torch.equal(average.value, torch.tensor([1.0, 2.0]))
