"""Which layers of the UNet get an adapter, and which of them read the same input."""

import math
import re
from dataclasses import dataclass

from torch import nn

from ..config import CalibrationConfig
from ..errors import CheckpointError
from ..model.convolution import Convolution

ALL = "attention+ff+conv"  # whatever a LoRA file may hold
ATTENTION = re.compile(r"\.transformer_blocks\.\d+\.(attn[12])\.(to_q|to_k|to_v|to_out\.0)$")
FEED_FORWARD = re.compile(r"\.transformer_blocks\.\d+\.ff\.net\.(0\.proj|2)$")
CONVOLUTION = re.compile(r"\.(resnets\.\d+\.conv[12]|(down|up)samplers\.0\.conv)$")
KERNEL = (3, 3)  # of those
TEXT = "text"  # the input that all keys and values of cross-attention read


@dataclass(frozen=True)
class Projection:
    """A frozen linear map y = W x of the UNet, of tokens or of the patches of a `convolution`.

    `name` is its module path in diffusers' UNet; `input_key` names the activations it reads:
    projections with the same key see the same tensor, so their second moment is measured once. Of
    the feed-forward layers' wide hidden side, 4 to 8 times the block's width, only the diagonal of
    the second moment is kept: `diagonal_in`, `diagonal_out`.
    """

    name: str
    in_features: int
    out_features: int
    input_key: str
    diagonal_in: bool = False
    diagonal_out: bool = False
    convolution: Convolution | None = None

    @property
    def attention(self) -> bool:
        return not (self.diagonal_in or self.diagonal_out or self.convolution)

    @property
    def channels_in(self) -> int:
        """Of its input; a patch holds each of them several times."""
        return self.in_features // math.prod(self.convolution.kernel if self.convolution else ())

    @property
    def parameters_per_rank(self) -> int:
        return self.in_features + self.out_features


def _input_key(name: str, attention: str, kind: str) -> str:
    block = name[: -len(kind) - 1]
    if kind == "to_out.0":
        return f"{block}.out"
    if attention == "attn1":
        return f"{block}.qkv"
    # Keys and values of every cross-attention read the prompt's embeddings: one tensor for the
    # whole UNet.
    return f"{block}.q" if kind == "to_q" else TEXT


def find_projections(unet: nn.Module, targets: str = "attention") -> tuple[Projection, ...]:
    """All attention projections (q, k, v, out of self- and cross-attention) in the UNet's own
    order, with `attention+ff` the two linear layers of each feed-forward too, and with
    `attention+ff+conv` the 3 x 3 convolutions of the residual blocks and between the levels.

    Attention: 56 in the mini SD, 128 in SD 1.5 and 2.1, 560 in SDXL; feed-forward: 14, 32 and 140
    more; convolutions: 26, 50 and 38 more.
    """
    found = []
    for name, module in unet.named_modules():
        if isinstance(module, nn.Linear):
            if match := ATTENTION.search(name):
                key = _input_key(name, *match.groups())
                found.append(Projection(name, module.in_features, module.out_features, key))
            elif "ff" in targets and (match := FEED_FORWARD.search(name)):
                hidden_in = match[1] == "2"
                sides = hidden_in, not hidden_in
                found.append(
                    Projection(name, module.in_features, module.out_features, name, *sides)
                )
        elif targets == ALL and CONVOLUTION.search(name):
            own = Convolution.of(module)
            if own and own.kernel == KERNEL:
                size = module.weight[0].numel(), len(module.weight)
                found.append(Projection(name, *size, name, convolution=own))
    if not found:
        raise CheckpointError(
            "The UNet has no attention projections: this is not a Stable Diffusion UNet."
        )
    return tuple(found)


def targets_for(config: CalibrationConfig) -> str:
    """What `auto` means: more layers where data ranks find them room in the same budget, of
    `domain`, which was not measured with convolutions, feed-forward layers alone."""
    if config.targets != "auto":
        return config.targets
    if config.rank_rule == "data":
        return {"target": ALL, "domain": "attention+ff"}.get(config.init, "attention")
    return "attention"
