"""ComfyUI's CLIP and VAE as the core sees what encodes prompts and pictures."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import comfy.model_management as management
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from ..cntlora_core.errors import CheckpointError
from ..cntlora_core.events import Notice, Observer, ignore
from ..cntlora_core.model.sampling import LATENT_CHANNELS


@contextmanager
def _hosts_work() -> Iterator[None]:
    """ComfyUI at work with a model of its own, in the mode it works in; out of the way after."""
    try:
        with torch.inference_mode():
            yield
    finally:
        management.unload_all_models()


# Not escaped, and not `(words:1.2)`, which is meant as a weight.
BARE_PARENTHESES = re.compile(r"(?<!\\)\((?![^()]*:\s*[\d.]+\s*\))")


def _out_of_memory(error: Exception) -> bool:
    known = getattr(management, "is_oom", None)  # newer hosts know more of them
    return bool(known(error)) if known else isinstance(error, management.OOM_EXCEPTION)


def _content(patcher: Any, setting: str) -> dict[str, Tensor]:
    """Weights, their patches (LoRAs, merges) beside them, and a setting: all that one is told from
    another by, and no patch is worked out."""
    weights = dict(patcher.model.state_dict())
    weights |= {key: own.weight for key, own in patcher.backup.items()}  # while they are loaded
    patches = {
        f"{key} changed {n}": part
        for key, patches in patcher.patches.items()
        for n, part in enumerate(_parts(patches))
    }
    return weights | patches | {setting: torch.empty(0)}


def _parts(patch: Any) -> Iterator[Tensor]:
    """Tensors and numbers of patches: alone, several, merged, in the host's adapters."""
    for part in tree_leaves(patch):
        if isinstance(part, (Tensor, int, float)):
            yield torch.as_tensor(part)
        elif hasattr(part, "weights"):
            yield from _parts(part.weights)


@dataclass
class ComfyUIPrompts:
    """A CLIP: chunks, weights in parentheses, embeddings and its layer are those of generation."""

    clip: Any
    family: str
    features: int  # that the UNet reads
    observer: Observer = ignore
    max_tokens: int | None = None
    modules: tuple[nn.Module, ...] = ()  # none is ours to drop
    told: bool = False  # of parentheses

    @property
    def content(self) -> list[dict[str, Tensor]]:
        return [_content(self.clip.patcher, f"layer {self.clip.layer_idx}")]

    @property
    def pooled(self) -> bool:
        return self.family == "sdxl"

    @property
    def clip_skip(self) -> int | None:
        """The host counts from the encoder's end; SD 2 was trained one layer before it."""
        layer = getattr(self.clip, "layer_idx", None)
        if layer is None or self.pooled:
            return None
        return -int(layer) - int(self.family.startswith("sd2"))

    def encode(
        self, prompts: Sequence[str], device: torch.device
    ) -> list[tuple[Tensor, Tensor | None]]:
        weighed = [text for text in prompts if BARE_PARENTHESES.search(text)]
        if weighed and not self.told:
            self.told = True
            said = (
                f"'{weighed[0]}' holds parentheses, which ComfyUI reads as weights. Where they are "
                r"part of a name write \( and \), here as when you generate."
            )
            self.observer(Notice(said))
        with _hosts_work():
            rows = [self._encode(prompt) for prompt in prompts]
        return [(tokens.clone(), None if p is None else p.clone()) for tokens, p in rows]

    def _encode(self, prompt: str) -> tuple[Tensor, Tensor | None]:
        found = self.clip.encode_from_tokens_scheduled(self.clip.tokenize(prompt))
        if len(found) != 1 or found[0][1].get("hooks") is not None:
            raise CheckpointError(
                "The CLIP is changed by hooks, differently from step to step: connect it as it is "
                "before them."
            )
        tokens, pooled = found[0][0][0], found[0][1].get("pooled_output")
        if tokens.shape[-1] != self.features or (self.pooled and pooled is None):
            raise CheckpointError(
                f"The CLIP is of another kind of model: it gives {tokens.shape[-1]} features, the "
                f"MODEL reads {self.features}. Connect the CLIP that belongs to it."
            )
        return tokens.float(), pooled[0].float() if self.pooled else None

    def cut(self, prompts: Sequence[str]) -> dict[str, tuple[int, ...]]:
        return {}  # however long


@dataclass
class ComfyUIPictures:
    """A VAE, in tiles where memory does not suffice."""

    vae: Any
    factor: float  # of the latents that the UNet reads
    observer: Observer = ignore
    modules: tuple[nn.Module, ...] = ()
    told_tiles: bool = False

    def __post_init__(self) -> None:
        if self.vae.latent_channels != LATENT_CHANNELS or self.scale != 8:
            raise CheckpointError(
                f"The VAE is of another kind of model: its latents have {self.vae.latent_channels} "
                f"channels, Stable Diffusion's {LATENT_CHANNELS}. Connect the VAE that belongs to "
                "the MODEL."
            )

    @property
    def content(self) -> list[dict[str, Tensor]]:
        return [_content(self.vae.patcher, f"factor {self.factor}")]

    @property
    def scale(self) -> int:
        ratio = self.vae.downscale_ratio
        return ratio if isinstance(ratio, int) else 0

    @contextmanager
    def working(self, device: torch.device) -> Iterator[None]:
        try:
            yield
        finally:
            management.unload_all_models()

    def encode(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        with torch.inference_mode():
            each = [self._whole_or_tiled(picture) for picture in pixels.split(1)]
            mean, std = (torch.cat(parts).float() for parts in zip(*each, strict=True))
        return mean * self.factor, std * self.factor

    def _whole_or_tiled(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Of one picture `[1, 3, h, w]`: the host makes room for no more."""
        try:
            return self._posterior(pixels)
        except Exception as error:
            if not _out_of_memory(error):
                raise
        if not self.told_tiles:
            self.told_tiles = True
            text = "Memory did not suffice for the VAE: the pictures are encoded in tiles."
            self.observer(Notice(text))
        mean = self.vae.encode_tiled((pixels.movedim(1, -1) + 1) / 2)
        return mean, torch.zeros_like(mean)

    def _posterior(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation where the VAE has them, as `vae.encode` computes its mean."""
        images, network = (pixels + 1) / 2, self.vae.first_stage_model
        if type(getattr(network, "regularization", None)).__name__ != "DiagonalGaussianRegularizer":
            mean = self.vae.encode(images.movedim(1, -1))
            return mean, torch.zeros_like(mean)
        memory = self.vae.memory_used_encode(images.shape, self.vae.vae_dtype)
        management.load_models_gpu([self.vae.patcher], memory_required=memory)
        x = self.vae.process_input(images).to(self.vae.vae_dtype).to(self.vae.device)
        moments = network.encoder(x)
        if hasattr(network, "quant_conv"):
            moments = network.quant_conv(moments)
        mean, log_variance = moments.float().chunk(2, dim=1)
        return mean, (log_variance.clamp(-30, 20) / 2).exp()

    def decode(self, latents: Tensor) -> Tensor:
        with torch.inference_mode():
            images = self.vae.decode(latents / self.factor)
        return images.movedim(-1, 1).float() * 2 - 1
