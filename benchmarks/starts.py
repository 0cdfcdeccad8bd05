"""The starts that are compared: ours, PEFT's own, and controls that separate the effects."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from peer_starts import METHODS, PeerStart, peer_start

from cntlora_core.calibration.calibrate import calibrate
from cntlora_core.calibration.closed_form import unit_response
from cntlora_core.calibration.moments import Moments
from cntlora_core.calibration.ranks import uniform_ranks
from cntlora_core.calibration.recording import record
from cntlora_core.config import CalibrationConfig
from cntlora_core.data.batches import draw_noised
from cntlora_core.data.encoded import EncodedImages
from cntlora_core.events import Event, Progress
from cntlora_core.lora.adapter import LoRA, gaussian_init
from cntlora_core.lora.targets import Projection, find_projections
from cntlora_core.model.loader import StableDiffusion

BATCH = 4
SHOWN = CalibrationConfig().passes * CalibrationConfig().batch_size  # pictures of our sweep
OURS = {
    "target thorough": CalibrationConfig(effort="thorough"),
    "target balanced": CalibrationConfig(effort="balanced"),
    "target quick": CalibrationConfig(effort="quick"),
    "target thorough, attention": CalibrationConfig(effort="thorough", targets="attention"),
    "target thorough, uniform ranks": CalibrationConfig(effort="thorough", rank_rule="uniform"),
    "domain, data ranks": CalibrationConfig(init="domain", effort="quick"),
    "domain, uniform ranks": CalibrationConfig(init="domain", effort="quick", rank_rule="uniform"),
}
# Random directions with our response; our ranks at other layers' places; an ordinary start with our
# layers.
CONTROLS = ("random directions", "permuted ranks", "gaussian with feed-forward")
ALL = [*OURS, *METHODS, *CONTROLS]
Point = tuple[
    float, float, float
]  # cost in training steps, held-out loss, seconds without validations
Validate = Callable[[], float]


class Stopwatch:
    """Seconds of work; validations do not count."""

    def __init__(self, validate: Validate) -> None:
        self.began, self.away, self.inner = time.perf_counter(), 0.0, validate

    def validate(self) -> float:
        started = time.perf_counter()
        loss = self.inner()
        self.away += time.perf_counter() - started
        return loss

    def seconds(self) -> float:
        return time.perf_counter() - self.began - self.away


def steps_worth(forward: int, backward: int) -> float:
    """Passes of single pictures in training steps: a forward and a backward pass of a batch are
    one."""
    return (forward + backward) / 2 / BATCH


def make_start(
    model: StableDiffusion,
    subject: EncodedImages,
    method: str,
    rank: int,
    seed: int,
    watch: Stopwatch,
) -> tuple[PeerStart, list[Point]]:
    """The start, and what was passed on the way to it: the loss after every fourth batch of a
    refinement."""
    if method in METHODS:
        return peer_start(model, subject, method, rank, seed, SHOWN, 1), []
    if method == "random directions":
        return _random(model, subject, rank, seed), []
    if method == "gaussian with feed-forward":
        projections = find_projections(model.unet, "attention+ff")
        ranks = uniform_ranks(
            projections, rank // 2
        )  # the same parameters, as nearly as whole ranks allow
        return PeerStart(
            gaussian_init(projections, ranks, torch.Generator().manual_seed(seed)), {}, 0, 0
        ), []
    if method == "permuted ranks":
        config = replace(OURS["target thorough"], rank=rank, seed=seed)
        found = calibrate(model, subject, replace(config, effort="quick")).lora
        ranks = _permuted(find_projections(model.unet, "attention+ff"), found, seed)
        return _ours(model, subject, config, ranks, watch)
    return _ours(model, subject, replace(OURS[method], rank=rank, seed=seed), None, watch)


def _ours(
    model: StableDiffusion,
    subject: EncodedImages,
    config: CalibrationConfig,
    ranks: dict[str, int] | None,
    watch: Stopwatch,
) -> tuple[PeerStart, list[Point]]:
    passed: list[tuple[int, float, float]] = []

    def observe(event: Event) -> None:
        if isinstance(event, Progress) and event.phase == "refining" and event.done % 4 == 0:
            passed.append((event.done, watch.validate(), watch.seconds()))

    made = calibrate(model, subject, config, ranks=ranks, observer=observe)
    report = made.report
    total = steps_worth(report.forward_passes, report.backward_passes)
    each = config.batch_size / BATCH
    # The last look at the sweep's pictures comes after.
    before = total - (config.refinements + config.passes / 2) * each
    path = [(before + done * each, loss, seconds) for done, loss, seconds in passed]
    return PeerStart(made.lora, {}, report.forward_passes, report.backward_passes), path


def _permuted(projections: Sequence[Projection], lora: LoRA, seed: int) -> dict[str, int]:
    """The ranks of a LoRA shuffled among layers of one size, so that the parameters stay the
    same."""
    ranks = {p.name: lora[p.name].rank if p.name in lora else 0 for p in projections}
    generator = torch.Generator().manual_seed(seed)
    for size in sorted({p.parameters_per_rank for p in projections}):
        names = [p.name for p in projections if p.parameters_per_rank == size]
        held = [ranks[n] for n in names]
        for name, place in zip(
            names, torch.randperm(len(names), generator=generator).tolist(), strict=True
        ):
            ranks[name] = held[place]
    return ranks


def _random(model: StableDiffusion, subject: EncodedImages, rank: int, seed: int) -> PeerStart:
    """Gaussian rows scaled to unit response on the subject, B = 0."""
    generator = torch.Generator().manual_seed(seed)
    projections = find_projections(model.unet)
    triples = draw_noised(subject, SHOWN, len(model.schedule), generator)
    moments = Moments()
    with record(model.unet, projections, backward=False) as recording, torch.no_grad():
        for batch in triples.batches(BATCH):
            batch.loss(model)
            moments.take_in(recording.take())
    drawn = gaussian_init(projections, uniform_ranks(projections, rank), generator)
    lora = {
        p.name: replace(
            drawn[p.name], down=unit_response(drawn[p.name].up, drawn[p.name].down, moments.C(p))[1]
        )
        for p in projections
    }
    return PeerStart(lora, {}, len(triples), 0)
