"""Activations computed twice instead of kept."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

# What diffusers' UNets run outside of their checkpoints.
KEPT = re.compile(r"^mid_block\.resnets\.0\.|\.(down|up)samplers\.")


@contextmanager
def recomputing_activations(unet: Any, on: bool = True) -> Iterator[None]:
    """Recompute each block's activations in the backward pass instead of keeping them: a third
    slower, far less memory."""
    if not on:
        yield
        return
    was_training = unet.training
    unet.enable_gradient_checkpointing()
    unet.train()  # older diffusers checkpoint only then; Stable Diffusion's UNets have no dropout
    try:
        yield
    finally:
        unet.disable_gradient_checkpointing()
        unet.train(was_training)


def is_recomputed(name: str) -> bool:
    """Whether the layer of this name runs a second time then."""
    return KEPT.search(name) is None
