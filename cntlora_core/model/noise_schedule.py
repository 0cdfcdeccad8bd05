"""The noise schedule, the training target and stratified timesteps.

Notation (Ho et al. 2020): x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) eps; `alphas_cumprod` is abar.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import CheckpointError

PREDICTION_TYPES = ("epsilon", "v_prediction")
# Where a schedule of zero terminal SNR ends here as in ComfyUI: 0 would make sigma infinite.
ZERO_SNR_END = 4.8973451890853435e-08
# Schedulers of diffusers, by a part of their names, and keys with the one value that leaves the
# schedule as it is.
CONTINUOUS = {"EDM": "EDM", "FlowMatch": "flow-matching", "VQ": "VQ diffusion"}
FIXED_KEYS = {
    "use_flow_sigmas": False,
    "timestep_type": "discrete",
    "snr_shift_scale": 1.0,
    "use_snr_shift": False,
    "use_dynamic_shifting": False,
    "sigma_min": None,
    "sigma_max": None,
}
FOLLOWED = {
    *("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas"),
    *("prediction_type", "rescale_betas_zero_snr"),
}
# What steers sampling alone says nothing of training.
OF_SAMPLING = {
    *("algorithm_type", "clip_sample", "clip_sample_range", "corrector_order", "disable_corrector"),
    *("dynamic_thresholding_ratio", "eta", "euler_at_final", "final_sigmas_type", "flow_shift"),
    *("interpolation_type", "lambda_min_clipped", "lower_order_final", "original_inference_steps"),
    *("predict_x0", "predictor_order", "sample_max_value", "set_alpha_to_one", "shift_terminal"),
    *("skip_prk_steps", "solver_order", "solver_p", "solver_type", "steps_offset", "tau_func"),
    *("thresholding", "time_shift_type", "timestep_scaling", "timestep_spacing", "use_lu_lambdas"),
    *("use_beta_sigmas", "use_exponential_sigmas", "use_karras_sigmas", "variance_type"),
    *("clip_sample_value", "use_karras_sigma", "denoise_final", "set_alpha_to_zero"),
}


@dataclass(frozen=True)
class NoiseSchedule:
    """`abar[t]`, fp32 on the CPU, for t = 0 (clean) .. T - 1 (noise), and what the UNet
    predicts."""

    alphas_cumprod: Tensor
    prediction_type: str = "epsilon"

    def __post_init__(self) -> None:
        if self.prediction_type not in PREDICTION_TYPES:
            raise CheckpointError(
                f"The checkpoint's prediction type is {self.prediction_type!r}: "
                f"CNTLoRA trains {' and '.join(PREDICTION_TYPES)} models."
            )

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> NoiseSchedule:
        """From a diffusers scheduler configuration; a missing key takes Stable Diffusion 1's
        value."""
        _refuse_other_schedules(config)
        steps = int(config.get("num_train_timesteps", 1000))
        start, end = float(config.get("beta_start", 0.00085)), float(config.get("beta_end", 0.012))
        kind = config.get("beta_schedule", "scaled_linear")
        if config.get("trained_betas") is not None:
            betas = torch.tensor(config["trained_betas"], dtype=torch.float64)
        elif kind == "scaled_linear":
            betas = torch.linspace(start**0.5, end**0.5, steps, dtype=torch.float64) ** 2
        elif kind == "linear":
            betas = torch.linspace(start, end, steps, dtype=torch.float64)
        else:
            raise CheckpointError(
                f"Unknown beta schedule {kind!r}: expected scaled_linear or linear."
            )
        alphas_cumprod = torch.cumprod(1 - betas, 0)
        if config.get("rescale_betas_zero_snr"):
            alphas_cumprod = rescaled_to_zero_snr(alphas_cumprod)
        return cls(alphas_cumprod.float(), str(config.get("prediction_type") or "epsilon"))

    @classmethod
    def from_sigmas(cls, sigmas: Tensor, prediction_type: str) -> NoiseSchedule:
        """From sigma_t = sqrt(1 / abar_t - 1), increasing `[T]`."""
        return cls((1 / (1 + sigmas.double().square())).float(), prediction_type)

    @property
    def zero_terminal_snr(self) -> bool:
        """Whether the last step is noise alone. Stable Diffusion's own schedule ends at 0.0047."""
        return float(self.alphas_cumprod[-1]) <= 2 * ZERO_SNR_END

    @property
    def prediction(self) -> str:
        """For a reader: `epsilon`, `v`, `v + zero terminal SNR`."""
        name = "epsilon" if self.prediction_type == "epsilon" else "v"
        return f"{name} + zero terminal SNR" if self.zero_terminal_snr else name

    def __len__(self) -> int:
        return len(self.alphas_cumprod)

    def coefficients(self, t: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """sqrt(abar_t) and sqrt(1 - abar_t), shaped to multiply `like` `[n, ...]`."""
        alphas_cumprod = self.alphas_cumprod.to(like.device)[t.to(like.device)].view(
            -1, *[1] * (like.ndim - 1)
        )
        return alphas_cumprod.sqrt(), (1 - alphas_cumprod).sqrt()

    def add_noise(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        signal, sigma = self.coefficients(t, x0)
        return signal * x0 + sigma * noise

    def target(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """What the UNet should predict: eps, or v = sqrt(abar) eps - sqrt(1 - abar) x_0 (Salimans &
        Ho 2022)."""
        if self.prediction_type == "epsilon":
            return noise
        signal, sigma = self.coefficients(t, x0)
        return signal * noise - sigma * x0

    def min_snr_weight(self, t: Tensor, gamma: float) -> Tensor:
        """min(SNR_t, gamma) / SNR_t for epsilon, / (SNR_t + 1) for v, `[n]` (Hang et al. 2023,
        section 3.4)."""
        alphas_cumprod = self.alphas_cumprod.to(t.device)[t]
        snr = alphas_cumprod / (1 - alphas_cumprod)
        return snr.clamp_max(gamma) / (snr + (self.prediction_type == "v_prediction"))

    def debiased_weight(self, t: Tensor) -> Tensor:
        """1 / sqrt(SNR_t) for epsilon, 1 / (SNR_t + 1) for v, `[n]` (Yu et al. 2023; SNR at most
        1000, at least 0.001, where a zero terminal SNR has none)."""
        alphas_cumprod = self.alphas_cumprod.to(t.device)[t]
        snr = (alphas_cumprod / (1 - alphas_cumprod)).clamp(1e-3, 1e3)
        return 1 / (snr + 1) if self.prediction_type == "v_prediction" else snr.rsqrt()


def _refuse_other_schedules(config: Mapping[str, Any]) -> None:
    """Raises CheckpointError for a scheduler configuration of no discrete DDPM schedule, and for
    keys that nobody knows."""
    name = str(config.get("_class_name") or "")
    for part, what in CONTINUOUS.items():
        if part in name:
            raise CheckpointError(
                f"The checkpoint's scheduler is {name}: {what} models have another schedule than "
                "Stable Diffusion's, which CNTLoRA does not train."
            )
    for key, usual in FIXED_KEYS.items():
        if config.get(key, usual) not in (usual, None):
            raise CheckpointError(
                f"The checkpoint's scheduler has {key} {config[key]!r}, which changes the noise "
                f"schedule in a way CNTLoRA does not train: it must be {usual!r}."
            )
    known = FIXED_KEYS.keys() | FOLLOWED | OF_SAMPLING
    for key in config:
        if key not in known and not key.startswith("_"):
            raise CheckpointError(
                f"The checkpoint's scheduler has {key} {config[key]!r}, which CNTLoRA does not "
                "know: it may change the noise schedule. Take it out of scheduler_config.json if "
                "it only steers sampling."
            )


def rescaled_to_zero_snr(alphas_cumprod: Tensor) -> Tensor:
    """sqrt(abar) shifted and stretched so that its first value stays and its last is 0 (Lin et al.
    2024, algorithm 1), the last then set to `ZERO_SNR_END`."""
    root = alphas_cumprod.sqrt()
    rescaled = ((root - root[-1]) * (root[0] / (root[0] - root[-1]))).square()
    rescaled[-1] = ZERO_SNR_END
    return rescaled


def stratified_timesteps(count: int, steps: int, generator: torch.Generator) -> Tensor:
    """`count` timesteps, one uniform draw from each of `count` equal bins of [0, steps), in random
    order."""
    draws = (torch.arange(count) + torch.rand(count, generator=generator)) * (steps / count)
    return draws.long().clamp_(max=steps - 1)[torch.randperm(count, generator=generator)]


def bin_centres(count: int, steps: int) -> Tensor:
    """The centres of `count` equal bins of [0, steps), rounded down: `[62, 187, ...]` for 8 bins of
    1000."""
    return ((torch.arange(count) + 0.5) * (steps / count)).long()
