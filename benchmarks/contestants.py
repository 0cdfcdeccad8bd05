"""What is compared in opponents.py: starts, batches, optimisers, rates."""

from __future__ import annotations

from dataclasses import dataclass, replace

from cntlora_core.config import CalibrationConfig


@dataclass(frozen=True)
class Method:
    """A start, a batch and an optimiser; `rates` are tried one by one (one for ours: none is).

    `held_out`: one of the pictures is, and says the strength. `alpha`: a trainer as it comes, which
    multiplies the update by alpha / rank, has its own rank and averages nothing. `peer`: PEFT
    makes the start.
    """

    start: CalibrationConfig
    batch: int = 2
    optimizer: str = "adamw"
    rates: tuple[float, ...] = (1.5e-3, 3e-3, 6e-3)
    importance: bool = False
    held_out: bool = False
    alpha: float = 0.0
    peer: str = ""


ATTENTION = CalibrationConfig(init="gaussian", targets="attention")
WIDE = CalibrationConfig(init="gaussian", targets="attention+ff")
WIDEST = CalibrationConfig(init="gaussian", targets="attention+ff+conv")
OURS = CalibrationConfig(effort="quick")  # the steps after it are those of a longer effort
ORDINARY = {
    "attention, 4": Method(ATTENTION, 4, rates=(3e-3, 6e-3, 1.2e-2)),
    "attention, 2": Method(ATTENTION, 2, rates=(3e-3, 6e-3, 1.2e-2)),
    "with feed-forward, 4": Method(WIDE, 4, rates=(3e-3, 6e-3, 1.2e-2)),
    "with feed-forward, 2": Method(WIDE, 2),
    "with feed-forward, 1": Method(WIDE, 1),
    "with convolutions, 2": Method(WIDEST, 2),
    "with feed-forward, 2, Prodigy": Method(WIDE, 2, "prodigy", rates=(1.0,)),
    "with feed-forward, 2, schedule-free": Method(WIDE, 2, "schedulefree"),
    "with feed-forward, 2, Muon": Method(WIDE, 2, "muon", rates=(3e-3, 1.2e-2, 4.8e-2)),
    "with feed-forward, 2, Riemannian": Method(WIDE, 2, "riemannian"),
}
BESIDE = {
    "with feed-forward, 2, importance": Method(WIDE, 2, importance=True),
    "ours": Method(OURS, optimizer="natural", rates=(0.0,)),
    "ours, no convolutions": Method(
        replace(OURS, targets="attention+ff"), optimizer="natural", rates=(0.0,)
    ),
    "ours, held out": Method(OURS, optimizer="natural", rates=(0.0,), held_out=True),
    "ours, then AdamW": Method(OURS, rates=(7.5e-4, 1.5e-3, 3e-3)),
}
# What people get who change nothing: diffusers' script, the example of kohya's documentation,
# OneTrainer's preset for SD 1.5. Their rates are meant for real models.
PLAIN = CalibrationConfig(init="default", targets="attention+ff")
AS_THEY_COME = {
    "diffusers as it comes": Method(replace(ATTENTION, rank=4), 4, rates=(5e-4,), alpha=4),
    "kohya as it comes": Method(replace(PLAIN, rank=16), 1, rates=(1e-4,), alpha=1),
    "OneTrainer as it comes": Method(replace(PLAIN, rank=16), 4, rates=(3e-4,), alpha=1),
}
PEERS = {
    f"PEFT's {name}": Method(ATTENTION, rates=(3e-3, 6e-3, 1.2e-2), peer=peer)
    for name, peer in {
        "default": "default",
        "PiSSA": "pissa",
        "OLoRA": "olora",
        "EVA": "eva",
        "CorDA": "corda",
        "LoRA-GA": "lora_ga",
    }.items()
}
METHODS = ORDINARY | BESIDE | AS_THEY_COME | PEERS


def rank_of(method: Method, rank: int) -> int:
    """So that all methods have the same number of parameters: with feed-forward layers an ordinary
    LoRA has twice as many, with convolutions nearly five times (and gets one more than its share).
    A trainer as it comes keeps its own."""
    if method.alpha:
        return method.start.rank
    return max(1, rank // (2 if method.start is WIDE else 4 if method.start is WIDEST else 1))
