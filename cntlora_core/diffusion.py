"""The loss that both calibration and training descend."""

from __future__ import annotations

from torch import Tensor

from .checkpoint import StableDiffusion
from .conditioning import Conditioning


def denoising_loss(
    model: StableDiffusion, latents: Tensor, t: Tensor, noise: Tensor, conditioning: Conditioning
) -> Tensor:
    """Mean squared error of the UNet's prediction for each picture, fp32 `[n]`.

    `latents` and `noise` are fp32 `[n, c, h, w]`, `t` is `[n]`, `conditioning` has n rows.
    """
    noisy = model.schedule.add_noise(latents, noise, t)
    target = model.schedule.target(latents, noise, t)
    predicted = model.unet(noisy.to(model.dtype), t.to(noisy.device), return_dict=False, **conditioning.unet_kwargs())[
        0
    ]
    return (predicted.float() - target).square().mean(dim=(1, 2, 3))
