"""What a training step, a natural-gradient step and a batch of a calibration's sweep cost at real
size, counted from shapes: no GPU is needed, nothing is computed.

    python benchmarks/counts.py
    python benchmarks/counts.py --family sd1 --batch-size 2 --json

Each phase runs on torch's meta device with CUDA's attention kernels, in bf16. Counted are FLOPs,
bytes that kernels read and write, bytes held beside the weights, kernels, and bytes to and from the
host. The model of time adds up, for each kernel, what takes longer, its arithmetic or its bytes;
where launching them all takes longer than that, launching it is. Writes a Markdown table, and how
many training steps of that batch each length of a calibration takes.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.utils._pytree import tree_iter
from torch.utils.flop_counter import flop_registry

from cntlora_core.calibration import solution
from cntlora_core.calibration.constraints import Metric, Target
from cntlora_core.calibration.moments import Moments
from cntlora_core.calibration.natural import FRESH, REFRESH, NaturalStart
from cntlora_core.calibration.recording import record
from cntlora_core.calibration.sketch import Sketches, sketch_width
from cntlora_core.config import EFFORTS, CalibrationConfig, TrainConfig
from cntlora_core.lora.adapter import Adapters, attached_lora
from cntlora_core.lora.targets import ALL, Projection, find_projections
from cntlora_core.model.families import config_of
from cntlora_core.model.gradient_checkpointing import recomputing_activations
from cntlora_core.training.memory_estimate import meta_lora
from cntlora_core.training.shapes import Live, meta_unet, unet_inputs
from cntlora_core.training.state import TrainState, start_state

META = torch.device("meta")
SIZES = {"sd1": 512, "sdxl": 1024}
VIEWS = {
    "alias", "as_strided", "detach", "empty", "empty_like", "empty_strided", "expand", "lift_fresh",
    "new_empty", "new_empty_strided", "permute", "select", "slice", "split", "split_with_sizes",
    "squeeze", "t", "transpose", "unbind", "unsqueeze", "view", "_reshape_alias", "_unsafe_view",
    "_fused_sdp_choice", "diagonal", "chunk", "is_same_size", "unsafe_split",
    "unfold",
}  # fmt: skip


WAITS = {"_local_scalar_dense", "_linalg_check_errors", "equal", "is_nonzero", "nonzero"}
ON_HOST = {"_linalg_svd"}  # what linalg.py does not leave to a GPU, there and back


@dataclass(frozen=True)
class Card:
    """What a card does at best, and the share of it that is assumed: arithmetic in bf16 summed in
    fp32, TFLOP/s; memory, GB/s; microseconds between two kernels that PyTorch launches."""

    name: str
    tflops: float
    gb_per_second: float
    efficiency: float = 0.5
    bandwidth_share: float = 0.8
    launch_us: float = 6.0


CARDS = (Card("24 GB (RTX 4090)", 165, 1008), Card("12 GB (RTX 3060)", 25.6, 360))


@dataclass(frozen=True)
class Counts:
    """Of one phase; `seconds` by the model of time, for each of `CARDS`."""

    phase: str
    tflop: float
    moved_gb: float
    held_gb: float
    kernels: int
    to_host_mb: float
    waits: int
    seconds: tuple[float, ...]


class Counted(Live):
    """Kernels with their FLOPs and bytes, and what makes the host wait."""

    def __init__(self, held: Any) -> None:
        super().__init__(held)
        self.kernels: list[tuple[float, int]] = []
        self.waits = self.to_host = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        out = super().__torch_dispatch__(func, types, args, kwargs)
        name = func._schema.name.split("::")[1]
        self.waits += name in WAITS and args[0].is_meta
        if name not in VIEWS:
            count = flop_registry.get(func._overloadpacket)
            flops = count(*args, **(kwargs or {}), out_val=out) if count else 0
            tensors = [t for t in tree_iter((args, kwargs, out)) if isinstance(t, Tensor)]
            size = sum(t.numel() * t.element_size() for t in tensors)
            if name in ON_HOST:
                self.to_host, self.waits = self.to_host + size, self.waits + 1
            else:
                # of tensors that do not lie in one piece torch makes a kernel each
                scattered = name.startswith("_foreach") and any(
                    not t.is_contiguous() for t in tensors
                )
                times = len(args[0]) if scattered else 1
                self.kernels += [(flops / times, size // times)] * times
        return out

    def seconds(self, card: Card) -> float:
        rate = card.tflops * 1e12 * card.efficiency
        band = card.gb_per_second * 1e9 * card.bandwidth_share
        working = sum(max(flops / rate, size / band) for flops, size in self.kernels)
        return max(working, len(self.kernels) * card.launch_us * 1e-6)


def counted(phase: str, run: Callable[[], None], held: Any, *, waits: int = 0) -> Counts:
    with Counted(held) as counts:
        run()
    return Counts(
        phase,
        sum(flops for flops, _ in counts.kernels) / 1e12,
        sum(size for _, size in counts.kernels) / 1e9,
        counts.peak / 1e9,
        len(counts.kernels),
        counts.to_host / 1e6,
        waits + counts.waits,
        tuple(counts.seconds(card) for card in CARDS),
    )


def phases(
    config: dict[str, Any],
    *,
    side: int,
    batch_size: int = 1,
    rank: int = 4,
    targets: str = ALL,
    gradient_checkpointing: bool = False,
) -> list[Counts]:
    """A pass without gradients, a step of AdamW, natural-gradient steps with a metric that is
    brought up to date and with one that is kept, and a batch of the sweep."""
    unet = meta_unet(config, torch.bfloat16, "cuda")
    model: Any = SimpleNamespace(unet=unet, device=META, dtype=torch.bfloat16)
    projections = find_projections(unet, targets)
    inputs = unet_inputs(config, batch_size, side, torch.bfloat16)
    held = [*unet.parameters(), *unet.buffers()]

    def backward() -> None:
        (predicted,) = unet(return_dict=False, **inputs)
        (predicted.float().square().mean(dim=(1, 2, 3)).sum() / batch_size).backward()

    def forward() -> None:
        with torch.no_grad():
            unet(return_dict=False, **inputs)

    with (
        attached_lora(unet, meta_lora(projections, rank), trainable=True) as adapters,
        recomputing_activations(unet, gradient_checkpointing),
    ):
        steps = training_steps(model, projections, adapters, backward, held)
    sketches = Sketches(sketch_width(rank))
    moments = Moments(gradients=sketches)

    def sweep() -> None:
        with (
            recomputing_activations(unet, gradient_checkpointing),
            record(
                unet,
                projections,
                backward=True,
                gradient=sketches.add,
                recomputes=gradient_checkpointing,
            ) as recording,
        ):
            backward()
            moments.take_in(recording.take())

    sweep()  # makes the sums that every further batch adds to

    return [
        counted("pass without gradients", forward, held),
        *steps,
        counted("batch of a sweep", sweep, held, waits=2),
        solving(model, projections, moments, rank, held),
    ]


def solving(
    model: Any,
    projections: Sequence[Projection],
    moments: Moments,
    rank: int,
    held: Sequence[Tensor],
) -> Counts:
    """All layers solved and cut, once, between the sweep and the first step. Their scores are
    numbers that nobody has here: each layer gets the mean rank."""
    waited: list[int] = []  # bytes

    def on_host(tensors: Sequence[Tensor]) -> list[Tensor]:
        waited.append(torch.cat([t.flatten() for t in tensors]).nbytes)  # as it gathers them
        return [torch.ones(t.shape) for t in tensors]

    config, ranks = CalibrationConfig(rank=rank), {p.name: rank for p in projections}
    constraint, generator = Target(Metric(config.rho)), torch.Generator()

    def run() -> None:
        solution.solve(model, projections, constraint, moments, config, ranks, generator)

    with patch.object(solution, "on_host", on_host):
        found = counted("layers solved, once", run, held)
    waits = found.waits + len(waited)
    return replace(found, to_host_mb=found.to_host_mb + sum(waited) / 1e6, waits=waits)


def training_steps(
    model: Any,
    projections: Sequence[Projection],
    adapters: Adapters,
    backward: Callable[[], None],
    held: list[Tensor],
) -> list[Counts]:
    """Of AdamW, and of natural-gradient steps whose metric is brought up to date or kept."""
    settings = TrainConfig(steps=1, learning_rate=1e-4)

    def step(state: TrainState) -> None:
        state.begin_step()
        with state.recording(model, 1):
            backward()
        state.gather_gradient()
        torch.nn.utils.clip_grad_norm_(state.flat, settings.max_grad_norm)
        state.optimise(1e-4, finite=True)
        state.end_step()

    found = []
    natural = NaturalStart(projections, Metric(0.5), Moments(), 1.0)
    for optimizer, start in (("AdamW", None), ("natural", natural)):
        state = start_state(model, adapters, settings, start)
        step(state)  # makes the optimiser's tensors
        held_now = [*held, state.flat, state.live, state.average.value]
        name, again = f"training step, {optimizer}", partial(step, state)
        if start is None:
            found.append(counted(name, again, held_now, waits=1))
            continue
        found.append(counted(f"{name}, metric brought up to date", again, held_now, waits=1))
        state.optimizer.param_groups[0]["made"] = FRESH + 1
        found.append(counted(f"{name}, metric kept", again, held_now, waits=1))
    return found


def table(family: str, found: list[Counts]) -> str:
    head = ["TFLOP", "GB moved", "GB held", "kernels", "MB to host", "waits"]
    head += [f"ms, {card.name}" for card in CARDS]
    lines = ["| " + " | ".join([f"{family} {SIZES[family]} px", *head]) + " |"]
    lines.append("|---" * (len(head) + 1) + "|")
    for c in found:
        cells = [f"{c.tflop:.2f}", f"{c.moved_gb:.0f}", f"{c.held_gb:.2f}", f"{c.kernels}"]
        cells += [f"{c.to_host_mb:.0f}", f"{c.waits}", *(f"{1000 * s:.0f}" for s in c.seconds)]
        lines.append("| " + " | ".join([c.phase, *cells]) + " |")
    return "\n".join(lines)


def lengths(found: Sequence[Counts]) -> str:
    """Each length of a calibration in training steps of the same batch, on each card. The step's
    fit and the last check pass a sweep's batches without gradients three times at most."""
    forward, adamw, new, kept, sweep, solved = found
    lines = []
    for effort, (sweeps, steps) in EFFORTS.items():
        fresh = sum(made < FRESH or made % REFRESH == 0 for made in range(steps))
        times = ((sweeps, sweep), (1, solved), (fresh, new), (steps - fresh, kept))
        times += ((3 * sweeps, forward),)
        seconds = [sum(n * c.seconds[i] for n, c in times) for i in range(len(CARDS))]
        told = (
            f"{s / adamw.seconds[i]:.1f} steps, {s:.1f} s on {card.name}"
            for i, (s, card) in enumerate(zip(seconds, CARDS, strict=True))
        )
        lines.append(f"{effort}: {'; '.join(told)}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--family", choices=SIZES, action="append")
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--rank", type=int, default=4)
    parser.add_argument("--targets", default=ALL)
    parser.add_argument("--gradient-checkpointing", action="store_true")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    for family in args.family or SIZES:
        found = phases(
            config_of(family)["unet"],
            side=SIZES[family] // 8,
            batch_size=args.batch_size,
            rank=args.rank,
            targets=args.targets,
            gradient_checkpointing=args.gradient_checkpointing,
        )
        if args.json:
            print(json.dumps([asdict(c) for c in found]))
        else:
            print(table(family, found), lengths(found), sep="\n\n", end="\n\n", flush=True)


if __name__ == "__main__":
    main()
