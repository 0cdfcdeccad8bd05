import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cntlora_core.errors import CheckpointError
from cntlora_core.model.noise_schedule import NoiseSchedule, bin_centres, stratified_timesteps


def test_the_schedule_agrees_with_diffusers(mini_sd):
    from diffusers import DDPMScheduler

    theirs = DDPMScheduler.from_config(mini_sd.scheduler_config)
    torch.testing.assert_close(
        mini_sd.schedule.alphas_cumprod, theirs.alphas_cumprod, rtol=1e-5, atol=1e-7
    )
    x, noise, t = torch.randn(3, 4, 2, 2), torch.randn(3, 4, 2, 2), torch.tensor([0, 500, 999])
    torch.testing.assert_close(
        mini_sd.schedule.add_noise(x, noise, t), theirs.add_noise(x, noise, t)
    )
    v = NoiseSchedule(mini_sd.schedule.alphas_cumprod, "v_prediction").target(x, noise, t)
    torch.testing.assert_close(v, theirs.get_velocity(x, noise, t))


def test_unknown_predictions_and_schedules_are_refused():
    with pytest.raises(CheckpointError, match="'sample'"):
        NoiseSchedule.from_config({"prediction_type": "sample"})
    with pytest.raises(CheckpointError, match="'squaredcos_cap_v2'"):
        NoiseSchedule.from_config({"beta_schedule": "squaredcos_cap_v2"})


@given(st.integers(1, 40), st.integers(0, 2**31))
def test_one_timestep_in_every_bin(count, seed):
    t = stratified_timesteps(count, 1000, torch.Generator().manual_seed(seed))
    bins = (t.double() * count / 1000).floor().long().sort().values
    # A draw just above a bin's lower edge may round down to the integer below it.
    assert ((bins - torch.arange(count)).abs() <= 1).all()
    assert int(t.min()) >= 0
    assert int(t.max()) <= 999


def test_bin_centres():
    assert bin_centres(8, 1000).tolist() == [62, 187, 312, 437, 562, 687, 812, 937]


def test_the_debiased_weight_is_one_over_the_root_of_snr():
    schedule = NoiseSchedule(torch.tensor([0.8, 0.5, 0.2, 0.0]), "epsilon")
    t = torch.arange(4)
    expected = torch.tensor([0.5, 1.0, 2.0, 1000**0.5])
    torch.testing.assert_close(schedule.debiased_weight(t), expected)
    v = NoiseSchedule(schedule.alphas_cumprod, "v_prediction").debiased_weight(t)
    torch.testing.assert_close(v, torch.tensor([0.2, 0.5, 0.8, 1 / 1.001]))
