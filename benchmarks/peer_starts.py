"""PEFT's own initialisations of LoRA, as starts for our training loop."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from peft import EvaConfig, LoraConfig, get_peft_model, initialize_lora_eva_weights
from peft.tuners.lora.config import CordaConfig, LoraGAConfig
from peft.tuners.lora.corda import preprocess_corda
from peft.tuners.lora.layer import Linear
from peft.tuners.lora.loraga import preprocess_loraga
from torch import Tensor

from cntlora_core.data.batches import NoisedSet, draw_noised
from cntlora_core.data.encoded import EncodedImages
from cntlora_core.lora.adapter import Factors, LoRA
from cntlora_core.lora.targets import find_projections
from cntlora_core.model.loader import StableDiffusion

METHODS = {
    "default": True, "gaussian": "gaussian", "orthogonal": "orthogonal", "pissa": "pissa",
    "olora": "olora", "eva": "eva",
    "corda": "corda", "lora_ga": "lora_ga",
}  # fmt: skip
PASSES = {
    "eva": (1, 0),
    "corda": (1, 0),
    "lora_ga": (1, 1),
}  # forward, backward passes of each picture


@dataclass(frozen=True)
class PeerStart:
    """Factors, what the method took off the base weights (by projection), and passes made, in
    single pictures."""

    lora: LoRA
    residuals: dict[str, Tensor]
    forward: int
    backward: int


def peer_start(
    model: StableDiffusion,
    subject: EncodedImages,
    method: str,
    rank: int,
    seed: int,
    passes: int,
    batch_size: int,
) -> PeerStart:
    """The start that PEFT computes on a copy of the UNet, shown `passes` batches of pictures."""
    generator = torch.Generator().manual_seed(seed)
    triples = draw_noised(subject, passes * batch_size, len(model.schedule), generator)
    other = replace(model, unet=copy.deepcopy(model.unet).requires_grad_(False))
    projections = find_projections(model.unet)
    config = LoraConfig(
        r=rank,
        lora_alpha=rank,
        target_modules=[p.name for p in projections],
        init_lora_weights=METHODS[method],
    )
    torch.manual_seed(seed)
    if method == "eva":
        config.eva_config = EvaConfig(
            rho=1.0
        )  # rho = 1: uniform ranks, so that parameters are equal
    if method == "corda":
        config.corda_config = CordaConfig(corda_method="ipm")
        # One picture at a time: PEFT's hook takes the first dimension for the batch and drops it.
        preprocess_corda(
            other.unet, config, run_model=lambda: _run(other, triples, 1, backward=False)
        )
    if method == "lora_ga":
        config.lora_ga_config = LoraGAConfig()
        for p in projections:
            other.unet.get_submodule(p.name).weight.requires_grad_(True)
        preprocess_loraga(
            other.unet, config, lambda: _run(other, triples, batch_size, backward=True)
        )
    peft = get_peft_model(other.unet, config)
    if method == "eva":
        initialize_lora_eva_weights(
            peft,
            list(triples.batches(batch_size)),
            forward_fn=lambda unet, batch: batch.loss(replace(other, unet=unet)),
            prepare_model_inputs_fn=None,
            prepare_layer_inputs_fn=lambda x, *_: x[0].reshape(-1, x[0].shape[-1]),
            show_progress_bar=False,
        )
    lora, residuals = {}, {}
    for p in projections:
        layer = peft.base_model.model.get_submodule(p.name)
        assert isinstance(layer, Linear)
        up, down = layer.lora_B["default"].weight, layer.lora_A["default"].weight
        lora[p.name] = Factors(
            up.detach().clone() * layer.scaling["default"], down.detach().clone()
        )
        change = layer.base_layer.weight.detach() - model.unet.get_submodule(p.name).weight.detach()
        if change.any():
            residuals[p.name] = change
    forward, backward = (n * len(triples) for n in PASSES.get(method, (0, 0)))
    return PeerStart(lora, residuals, forward, backward)


def _run(model: StableDiffusion, triples: NoisedSet, batch_size: int, *, backward: bool) -> None:
    for batch in triples.batches(batch_size):
        with torch.set_grad_enabled(backward):
            loss = batch.loss(model).mean()
        if backward:
            loss.backward()


@contextmanager
def without(model: StableDiffusion, residuals: dict[str, Tensor]) -> Iterator[None]:
    """The base weights as the method left them, while the block runs; then the very same as
    before."""
    held = {name: model.unet.get_submodule(name).weight.data for name in residuals}
    try:
        for name, change in residuals.items():
            model.unet.get_submodule(name).weight.data = held[name] + change
        yield
    finally:
        for name, weight in held.items():
            model.unet.get_submodule(name).weight.data = weight
