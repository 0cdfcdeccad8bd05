"""How much memory a training step takes, from shapes alone: nothing is computed and nothing is
allocated."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..lora.adapter import Factors, attached_lora
from ..lora.targets import find_projections
from ..model.families import config_of
from ..model.gradient_checkpointing import recomputing_activations

TEXT_TOKENS = 77
# Adapter, gradient, two AdamW moments, last good copy: fp32 each.
COPIES_OF_ADAPTERS = 5
CHECKPOINTED_BLOCKS = (
    "ResnetBlock2D",
    "BasicTransformerBlock",
)  # what diffusers recomputes as a whole


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes. `weights`: the frozen UNet; `activations`: what the backward pass needs of one forward
    pass; `adapters`: factors, gradients and optimiser; `workspace`: a convolution in passing, its
    widest activations and its weights reordered."""

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
    dtype: torch.dtype = torch.float32,
    gradient_checkpointing: bool = False,
) -> MemoryEstimate:
    """Peak device memory of a training step of the family's full-size UNet, beside the framework's
    own.

    Runs the UNet on the meta device and adds up what autograd would keep, each storage once.
    """
    from diffusers import UNet2DConditionModel

    config = config_of(family)["unet"]
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(config).requires_grad_(False)
    nn.Module.to(unet, dtype)  # diffusers' own `to` warns about a cast that loses nothing here
    projections = find_projections(unet)
    lora = {
        p.name: Factors(
            torch.empty(p.out_features, rank, device="meta"),
            torch.empty(rank, p.in_features, device="meta"),
        )
        for p in projections
    }
    side = resolution // 8
    inputs = _inputs(config, batch_size, side, dtype)
    with attached_lora(unet, lora, trainable=True), _Kept(unet) as kept:
        unet(return_dict=False, **inputs)
    activations = kept.total
    if gradient_checkpointing:
        with (
            attached_lora(unet, lora, trainable=True),
            _Kept(unet) as few,
            recomputing_activations(unet),
        ):
            unet(return_dict=False, **inputs)
        activations = few.total + kept.largest_block  # one block at a time is recomputed
    weights = sum(p.numel() * p.element_size() for p in unet.parameters())
    adapters = sum(p.parameters_per_rank for p in projections) * rank * 4 * COPIES_OF_ADAPTERS
    largest = max(p.numel() for p in unet.parameters()) * dtype.itemsize
    widest = config["block_out_channels"][0] * 2 * side * side * batch_size * dtype.itemsize
    return MemoryEstimate(weights, activations, adapters, 4 * widest + 2 * largest)


def _inputs(config: dict[str, Any], batch: int, side: int, dtype: torch.dtype) -> dict[str, Any]:
    def empty(*shape: int) -> Tensor:
        return torch.empty(*shape, device="meta", dtype=dtype)

    inputs: dict[str, Any] = {
        "sample": empty(batch, 4, side, side),
        "timestep": torch.empty(batch, device="meta", dtype=torch.long),
        "encoder_hidden_states": empty(batch, TEXT_TOKENS, config["cross_attention_dim"]),
    }
    if config.get("addition_embed_type") == "text_time":
        inputs["added_cond_kwargs"] = {
            "text_embeds": empty(batch, 1280),
            "time_ids": empty(batch, 6),
        }
    return inputs


class _Kept:
    """Counts the bytes that autograd keeps for the backward pass, parameters left out."""

    def __init__(self, module: nn.Module) -> None:
        self.own = {id(p) for p in module.parameters()}
        self.module = module
        self.seen: dict[int, Tensor] = {}
        self.total = 0
        self.largest_block = 0
        self.hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, lambda tensor: tensor)

    def _pack(self, tensor: Tensor) -> Tensor:
        base = tensor._base if tensor._base is not None else tensor
        if (
            id(base) not in self.seen
            and id(base) not in self.own
            and not isinstance(base, nn.Parameter)
        ):
            self.seen[id(base)] = base  # held, so that no id is used twice
            self.total += base.numel() * base.element_size()
        return tensor

    def __enter__(self) -> _Kept:
        before: list[int] = []

        def enter(*_: Any) -> None:
            before.append(self.total)

        def leave(*_: Any) -> None:
            self.largest_block = max(self.largest_block, self.total - before.pop())

        blocks = [m for m in self.module.modules() if type(m).__name__ in CHECKPOINTED_BLOCKS]
        self.handles = [m.register_forward_pre_hook(enter) for m in blocks]
        self.handles += [m.register_forward_hook(leave) for m in blocks]
        self.hooks.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self.hooks.__exit__(*error)
        for handle in self.handles:
            handle.remove()


def describe_needs() -> dict[str, str]:
    """For `info`: estimated peak of a training step at each family's own resolution, batch 1,
    bf16."""
    sizes = {"sd1": 512, "sd2-v": 768, "sdxl": 1024}
    needs = {}
    for family, resolution in sizes.items():
        for checkpointing in (False, True):
            estimate = estimate_training_memory(
                family,
                resolution=resolution,
                dtype=torch.bfloat16,
                gradient_checkpointing=checkpointing,
            )
            how = " with gradient checkpointing" if checkpointing else ""
            needs[f"{family} {resolution} px{how}"] = f"{estimate.peak / 1e9:.1f} GB"
    return needs
