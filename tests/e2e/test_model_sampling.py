"""Our noise schedule beside ComfyUI's own `model_sampling`: the same sigmas, inputs and denoised
pictures for every kind of prediction."""

from types import SimpleNamespace

import pytest
import torch
from comfyui_models import use_host_on_cpu

from cntlora_core.model.noise_schedule import NoiseSchedule
from cntlora_core.model.prediction import EPSILON, V_ZERO_SNR, V, scheduler_keys

pytestmark = pytest.mark.comfyui
KINDS = {
    EPSILON: ("EPS", scheduler_keys(EPSILON)),
    V: ("V_PREDICTION", scheduler_keys(V)),
    V_ZERO_SNR: ("V_PREDICTION", scheduler_keys(V_ZERO_SNR)),
    "epsilon + zero terminal SNR": (
        "EPS",
        {"prediction_type": "epsilon", "rescale_betas_zero_snr": True},
    ),
}


@pytest.fixture(scope="module")
def model_base():
    use_host_on_cpu()
    import comfy.model_base

    return comfy.model_base


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_numbers_as_comfyui(model_base, kind):
    name, config = KINDS[kind]
    settings = {"zsnr": config["rescale_betas_zero_snr"]}
    theirs = model_base.model_sampling(
        SimpleNamespace(sampling_settings=settings), model_base.ModelType[name]
    )
    ours = NoiseSchedule.from_config(config)
    assert ours.prediction == kind
    t = torch.arange(1000)
    signal, sigma = ours.coefficients(t, torch.zeros(1000, 1, 1, 1))
    # abar is kept in fp32, so 1 - abar is known to 1e-4 of itself at the first steps.
    torch.testing.assert_close((sigma / signal).flatten(), theirs.sigmas, rtol=1e-4, atol=0)

    generator = torch.Generator().manual_seed(0)
    x0, noise = (torch.randn(1000, 4, 2, 2, generator=generator) for _ in range(2))
    noised = theirs.noise_scaling(theirs.sigmas, noise.clone(), x0)
    seen = theirs.calculate_input(theirs.sigmas, noised)
    torch.testing.assert_close(ours.add_noise(x0, noise, t), seen, rtol=1e-4, atol=1e-4)

    # Who predicts our target exactly gets the clean picture back from ComfyUI.
    clean = theirs.calculate_denoised(theirs.sigmas, ours.target(x0, noise, t), noised)
    scale = theirs.sigmas.view(-1, 1, 1, 1).clamp_min(1)
    torch.testing.assert_close(clean / scale, x0 / scale, rtol=1e-4, atol=1e-4)
