"""How much device memory a step takes, from shapes alone: the step runs on torch's meta device,
where nothing is computed and nothing is allocated, and what would live at once is added up."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from ..config import CalibrationConfig
from ..lora.adapter import Factors, attached_lora
from ..lora.targets import find_projections, targets_for
from ..model.families import config_of
from ..model.gradient_checkpointing import recomputing_activations
from ..model.single_file import empty_unet
from .memory_plan import COPIES_OF_ADAPTERS

TEXT_TOKENS = 77
POOLED_FEATURES = 1280  # of SDXL's second text encoder
# oneDNN reorders a convolution's weights in every call: a copy of the largest, and one in passing.
CPU_WEIGHT_COPIES = 2


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes. `weights`: the frozen UNet; `activations`: what else lives at once in a forward and
    backward pass, the backward pass's own results included; `adapters`: factors, gradients and
    optimiser; `workspace`: a convolution in passing."""

    weights: int
    activations: int
    adapters: int
    workspace: int

    @property
    def peak(self) -> int:
        return self.weights + self.activations + self.adapters + self.workspace


def estimate_training_memory(
    family: str,
    *,
    resolution: int,
    batch_size: int = 1,
    rank: int = 4,
    targets: str | None = None,
    dtype: torch.dtype = torch.float32,
    gradient_checkpointing: bool = False,
    device: str = "cuda",
) -> MemoryEstimate:
    """Peak device memory of a training step of the family's full-size UNet, beside the framework's
    own.

    `targets`: layers with an adapter, the default's when None. `device`: the kind whose attention
    kernels run.
    """
    targets = targets or targets_for(family, CalibrationConfig())
    return unet_training_memory(
        config_of(family)["unet"],
        side=resolution // 8,
        batch_size=batch_size,
        rank=rank,
        targets=targets,
        dtype=dtype,
        gradient_checkpointing=gradient_checkpointing,
        device=device,
    )


def unet_training_memory(
    config: Mapping[str, Any],
    *,
    side: int,
    batch_size: int,
    rank: int,
    targets: str,
    dtype: torch.dtype,
    gradient_checkpointing: bool,
    device: str,
) -> MemoryEstimate:
    """The same for any UNet by its diffusers configuration, with latents of `side` x `side`."""
    unet = empty_unet(config).requires_grad_(False)
    unet.set_attn_processor(_Attention(device))
    nn.Module.to(unet, dtype)  # diffusers' own `to` warns about a cast that loses nothing here
    projections = find_projections(unet, targets)
    lora = {
        p.name: Factors(
            torch.empty(p.out_features, rank, device="meta"),
            torch.empty(rank, p.in_features, device="meta"),
        )
        for p in projections
    }
    inputs = unet_inputs(config, batch_size, side, dtype)
    with attached_lora(unet, lora, trainable=True):

        def step() -> None:
            with recomputing_activations(unet, gradient_checkpointing):
                (predicted,) = unet(return_dict=False, **inputs)
                predicted.float().square().mean().backward()

        activations = peak_bytes(step, [*unet.parameters(), *unet.buffers()])
    weights = sum(p.numel() * p.element_size() for p in unet.parameters())
    adapters = sum(p.parameters_per_rank for p in projections) * rank * 4 * COPIES_OF_ADAPTERS
    largest = max(p.numel() * p.element_size() for p in unet.parameters())
    workspace = CPU_WEIGHT_COPIES * largest if device == "cpu" else 0
    return MemoryEstimate(weights, activations, adapters, workspace)


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
            "time_ids": empty(batch, 6),
        }
    return inputs


def peak_bytes(run: Callable[[], None], held: Iterable[Tensor]) -> int:
    """The most bytes that storages made by `run` on the meta device hold at once; `held` was there
    before and does not count."""
    with _Live(held) as live:
        run()
    return live.peak


class _Live(TorchDispatchMode):
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
