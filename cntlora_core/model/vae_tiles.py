"""Large pictures through the VAE: in tiles where they do not fit whole."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from ..devices import at_once

# Of a picture's px, fp32, with attention kernels that never keep all pairs of places: what
# `vae_memory` counts.
ENCODE_BYTES = 2560
DECODE_BYTES = 3073
TILE_PX = 512  # the side of a tile; diffusers blends a quarter of it into the next


@contextmanager
def fitting(vae: Any, each: int, most: int) -> Iterator[int]:
    """How many of `most` pictures that take `each` bytes to pass at once; where not even one fits,
    the VAE works in tiles meanwhile."""
    if count := at_once(vae.device, each, most):
        yield count
        return
    scale = 2 ** (len(vae.config.block_out_channels) - 1)
    tiles = {
        "use_tiling": True,
        "tile_sample_min_size": TILE_PX,
        "tile_latent_min_size": TILE_PX // scale,
    }
    before = {name: getattr(vae, name) for name in tiles}
    try:
        vars(vae).update(tiles)
        yield 1
    finally:
        vars(vae).update(before)
