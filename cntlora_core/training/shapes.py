"""Networks on torch's meta device, where nothing is computed and nothing is allocated, and what
would live there at once."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from ..model.single_file import empty_unet

TEXT_TOKENS = 77
POOLED_FEATURES = 1280  # of SDXL's second text encoder


def meta_unet(config: Mapping[str, Any], dtype: torch.dtype, device: str) -> Any:
    """A frozen UNet by its diffusers configuration. `device`: the kind whose attention kernels
    run."""
    unet = empty_unet(config).requires_grad_(False).eval()
    unet.set_attn_processor(_Attention(device))
    nn.Module.to(unet, dtype)  # diffusers' own `to` warns about a cast that loses nothing here
    return unet


def unet_inputs(
    config: Mapping[str, Any], batch: int, side: int, dtype: torch.dtype
) -> dict[str, Any]:
    """What a pass of the UNet reads, on the meta device."""

    def empty(*shape: int) -> Tensor:
        return torch.empty(*shape, device="meta", dtype=dtype)

    inputs: dict[str, Any] = {
        "sample": empty(batch, config["in_channels"], side, side),
        "timestep": torch.empty(batch, device="meta", dtype=torch.long),
        "encoder_hidden_states": empty(batch, TEXT_TOKENS, config["cross_attention_dim"]),
    }
    if config.get("addition_embed_type") == "text_time":
        inputs["added_cond_kwargs"] = {
            "text_embeds": empty(batch, POOLED_FEATURES),
            "time_ids": torch.empty(batch, 6, device="meta"),
        }
    return inputs


def meta_vae(config: Mapping[str, Any], device: str) -> Any:
    """A frozen VAE in fp32, in which it computes."""
    from diffusers import AutoencoderKL

    with torch.device("meta"):
        vae = AutoencoderKL.from_config(dict(config)).requires_grad_(False).eval()
    for module in vae.modules():
        if hasattr(module, "set_processor"):
            module.set_processor(_PictureAttention(device))
    return vae


def nbytes(module: nn.Module) -> int:
    return sum(p.numel() * p.element_size() for p in module.parameters())


def peak_bytes(run: Callable[[], None], held: Iterable[Tensor]) -> int:
    """The most bytes that storages made by `run` on the meta device hold at once; `held` was there
    before and does not count."""
    with Live(held) as live:
        run()
    return live.peak


class Live(TorchDispatchMode):
    """Counts the storages that operations make, until each is gone."""

    def __init__(self, held: Iterable[Tensor]) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.held = [tensor.untyped_storage() for tensor in held]  # so that no id is used twice
        self.seen = {id(storage) for storage in self.held}

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_iter(out):
            if isinstance(tensor, Tensor):
                self._count(tensor.untyped_storage())
        return out

    def _count(self, storage: Any) -> None:
        key, size = id(storage), storage.nbytes()
        if key in self.seen:
            return
        self.seen.add(key)
        self.now += size
        self.peak = max(self.peak, self.now)

        def gone() -> None:
            self.now -= size
            self.seen.discard(key)

        weakref.finalize(storage, gone)


class _Attention:
    """diffusers' attention processor, with the kernel that a device takes. CUDA's (flash in half
    precision, memory-efficient in fp32) and the CPU's never keep the matrix of all pairs of places;
    torch's own composition, which other devices run, does."""

    def __init__(self, device: str) -> None:
        self.device = device

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,  # the UNet passes it; Stable Diffusion has none
    ) -> Tensor:
        read = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        q, k, v = (
            y.unflatten(-1, (attn.heads, -1)).transpose(1, 2)
            for y in (attn.to_q(hidden_states), attn.to_k(read), attn.to_v(read))
        )
        attended = self._kernel(q, k, v).transpose(1, 2).flatten(2)
        out: Tensor = attn.to_out[1](attn.to_out[0](attended))
        return out

    def _kernel(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        kernels, out = torch.ops.aten, None
        if self.device == "cpu":
            out = kernels._scaled_dot_product_flash_attention_for_cpu(q, k, v)[0]
        elif self.device == "cuda" and q.dtype in (torch.float16, torch.bfloat16):
            out = kernels._scaled_dot_product_flash_attention(q, k, v)[0]
        elif self.device == "cuda":
            keeps = torch.is_grad_enabled() and q.requires_grad
            out = kernels._scaled_dot_product_efficient_attention(q, k, v, None, keeps)[0]
        return F.scaled_dot_product_attention(q, k, v) if out is None else out


class _PictureAttention(_Attention):
    """The VAE's, over a picture's places, with its own norm and sum."""

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,  # these three: of other networks
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
    ) -> Tensor:
        rows = attn.group_norm(hidden_states).flatten(2).transpose(1, 2)
        out = super().__call__(attn, rows).transpose(1, 2).view_as(hidden_states)
        return out + hidden_states
