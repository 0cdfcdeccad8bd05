"""Weights that are no numbers, found where they are read."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..errors import CheckpointError


def check_weights(
    name: str, unet: nn.Module, vae: nn.Module, text_encoders: Sequence[nn.Module]
) -> None:
    """Raises CheckpointError for a weight of the checkpoint `name` that holds NaN or infinite
    values, with the part and the weight it is in."""
    parts = {"UNet": unet, "VAE": vae}
    for n, encoder in enumerate(text_encoders, 1):
        parts[f"text encoder {n}" if len(text_encoders) > 1 else "text encoder"] = encoder
    for part, module in parts.items():
        for key, weight in module.named_parameters():
            if not all_finite(weight.detach()):
                raise CheckpointError(
                    f"The checkpoint '{name}' is damaged: the {part}'s weight '{key}' holds "
                    "NaN or infinite values. Download it again or choose another."
                )


def all_finite(weight: Tensor) -> bool:
    """Without a copy as large as the weight."""
    if not weight.is_floating_point() or weight.numel() == 0:
        return True
    if weight.element_size() == 1:  # 8-bit floats know no arithmetic
        weight = weight.to(torch.float32)
    return bool(torch.isfinite(torch.stack(torch.aminmax(weight))).all())
