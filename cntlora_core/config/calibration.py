"""How the LoRA starts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ..settings import check_settings, setting
from . import common

Init = Literal["target", "domain", "gaussian", "default"]
RankRule = Literal["data", "uniform"]
Effort = Literal["quick", "balanced", "thorough"]
Targets = Literal[
    "auto", "attention", "attention+ff", "attention+ff+conv"
]  # layers that get an adapter

CALIBRATED: tuple[Init, ...] = ("target", "domain")  # the inits that look at the pictures
EFFORTS = {
    "quick": (4, 8),
    "balanced": (4, 48),
    "thorough": (4, 108),
}  # sweep, refinement: batches


@dataclass(frozen=True)
class CalibrationConfig:
    """How the LoRA starts. `rank` sets the budget: the parameters of a LoRA of that rank on the
    attention projections."""

    init: Init = setting(
        "target",
        "target: fits what the denoising loss asks for, usable before training. domain: forward "
        "passes only, less memory, a weaker start. gaussian and default: ordinary LoRA starts, to "
        "compare with.",
    )
    rank: int = setting(
        4,
        "Mean rank, so the file's size. 4-8 for an object, 8-16 for a face or a style. Too high "
        "learns the background too; too low misses detail.",
        low=1,
        high=1024,
    )
    rank_rule: RankRule = setting(
        "data",
        "data: layers of which the pictures ask more get more rank, others less, the file stays "
        "the same size and fits better (measured on the embedded model). uniform: the same rank "
        "everywhere.",
    )
    seed: int = common.seed()
    effort: Effort = setting(
        "balanced",
        "How long init target calibrates. quick: a look, 12 batches. balanced: 52 batches of 2, "
        "by counts the time of about 30 training steps of 4 pictures. thorough: 112, about 60.",
    )
    batch_size: int = common.batch_size()
    targets: Targets = setting(
        "auto",
        "Layers that get an adapter. auto: all of them with init target and data ranks, no "
        "convolutions with domain, else attention. conv: the UNet's 3 x 3 convolutions share the "
        "ranks (a LoCon file, which the common tools load): more likeness, and a little more of "
        "what else the model draws changes. The file's size is the same.",
        advanced=True,
    )
    # 4 kept the subject's loss and most of the class (docs/method.md)
    preservation: float = setting(
        4.0,
        "Weight of the prior, when there is one. Higher forgets less and fits a little less.",
        high=1000,
        step=0.1,
        advanced=True,
    )
    gradient_checkpointing: bool = common.gradient_checkpointing()
    # 0.5 was best or level among 0.1 to 2
    rho: float = setting(
        0.5,
        "Damping of the second moments, as a share of their size. Higher trusts the pictures less.",
        low=1e-3,
        high=1000,
        step=0.1,
        advanced=True,
    )

    @property
    def passes(self) -> int:
        """Batches of the sweep."""
        return EFFORTS[self.effort][0]

    @property
    def refinements(self) -> int:
        """Batches after the sweep, each a natural-gradient step."""
        return EFFORTS[self.effort][1]

    def __post_init__(self) -> None:
        check_settings(self)
