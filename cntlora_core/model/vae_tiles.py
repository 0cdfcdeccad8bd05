"""Pictures through the VAE as the memory holds them: several at once, one, or one in tiles."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from ..devices import halved

# Of a picture's px, fp32: measured on an H100, beside the VAE's weights, with four pictures of 512
# px and of 1024 px (3109 and 3111), and with one that is decoded (5070 and 5030). `vae_memory`
# counts 2560 and 3073 of it; the rest is workspaces of cuDNN.
ENCODE_BYTES = 3110
DECODE_BYTES = 5070
TILES_PX = (512, 256)  # the side of a tile; diffusers blends a quarter of it into the next


@dataclass(frozen=True)
class Way:
    """So many pictures at once, or one in tiles of that side."""

    at_once: int
    tile_px: int | None = None


def ways(count: int, height: int, width: int, each: int) -> dict[Way, int]:
    """Of `count` pictures of so many px, which take `each` bytes; with the bytes that a way
    takes."""
    whole = {Way(n): n * height * width * each for n in halved(count)}
    sides = [side for side in TILES_PX if side < max(height, width)]
    return whole | {Way(1, side): side**2 * each for side in sides}


@contextmanager
def in_tiles(vae: Any, side_px: int | None) -> Iterator[None]:
    """The VAE works in tiles of that side while the block runs; whole when None."""
    if side_px is None:
        yield
        return
    scale = 2 ** (len(vae.config.block_out_channels) - 1)
    tiles = {
        "use_tiling": True,
        "tile_sample_min_size": side_px,
        "tile_latent_min_size": side_px // scale,
    }
    before = {name: getattr(vae, name) for name in tiles}
    try:
        vars(vae).update(tiles)
        yield
    finally:
        vars(vae).update(before)
