"""The loss that both calibration and training descend."""

from __future__ import annotations

from torch import Tensor

from .conditioning import Conditioning
from .loader import StableDiffusion


def denoising_loss(
    model: StableDiffusion,
    latents: Tensor,
    t: Tensor,
    noise: Tensor,
    conditioning: Conditioning,
    *,
    mask: Tensor | None = None,
    shown_noise: Tensor | None = None,
) -> Tensor:
    """Mean squared error of the UNet's prediction for each picture, fp32 `[n]`.

    `latents` and `noise` are fp32 `[n, c, h, w]`, `t` is `[n]`, `conditioning` has n rows; `mask`
    `[n, 1, h, w]` weighs places, and the error is the mean over what it shows. `shown_noise` is
    what the model sees, `noise` (where None) what it shall find.
    """
    target = model.schedule.target(latents, noise, t)
    seen = noise if shown_noise is None else shown_noise
    error = (predict(model, latents, t, seen, conditioning) - target).square()
    if mask is None:
        return error.mean(dim=(1, 2, 3))
    return (error * mask).sum(dim=(1, 2, 3)) / (mask.sum(dim=(1, 2, 3)) * error.shape[1]).clamp_min(
        1e-6
    )


def predict(
    model: StableDiffusion, latents: Tensor, t: Tensor, noise: Tensor, conditioning: Conditioning
) -> Tensor:
    """The UNet's prediction for noised latents, fp32 `[n, c, h, w]`."""
    noisy = model.schedule.add_noise(latents, noise, t).to(model.dtype)
    (predicted,) = model.unet(
        noisy, t.to(noisy.device), return_dict=False, **conditioning.unet_kwargs()
    )
    return predicted.float()
