"""(picture, timestep, noise) triples: drawn for a calibration or a training step, fixed for a
validation."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain, islice
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..defaults import VALIDATION_TIMESTEPS
from ..distributed import ALONE, Group
from ..model.denoising_loss import denoising_loss
from ..model.noise_schedule import bin_centres
from .importance import Importance, draw_timesteps

if TYPE_CHECKING:
    from ..model.conditioning import Conditioning
    from ..model.loader import StableDiffusion
    from .encoded import EncodedImages

VALIDATION_SEED = 20250709  # one noise for every run of everybody, whatever its own seed


@dataclass(frozen=True)
class Batch:
    """n triples of one size: `latents` and `noise` `[n, c, h, w]`, `timesteps` `[n]`,
    `conditioning` of n rows, what counts of each picture, `mask` `[n, 1, h, w]` (None: everything),
    and what each loss counts, `weights` `[n]` (None: alike). `shown_noise`: what the model sees, in
    place of the `noise` that it shall find."""

    latents: Tensor
    timesteps: Tensor
    noise: Tensor
    conditioning: Conditioning
    mask: Tensor | None = None
    weights: Tensor | None = None
    shown_noise: Tensor | None = None

    def __len__(self) -> int:
        return len(self.timesteps)

    def __getitem__(self, part: slice) -> Batch:
        def rows(t: Tensor | None) -> Tensor | None:
            return None if t is None else t[part]

        return Batch(
            self.latents[part], self.timesteps[part], self.noise[part], self.conditioning[part],
            rows(self.mask), rows(self.weights), rows(self.shown_noise),
        )  # fmt: skip

    def split(self, size: int) -> Iterator[Batch]:
        for start in range(0, len(self), size):
            yield self[start : start + size]

    def loss(self, model: StableDiffusion) -> Tensor:
        """The denoising loss of each triple `[n]`, weighted, in one pass."""
        return self.weighted(
            denoising_loss(
                model,
                self.latents,
                self.timesteps,
                self.noise,
                self.conditioning,
                mask=self.mask,
                shown_noise=self.shown_noise,
            )
        )

    def weighted(self, losses: Tensor) -> Tensor:
        """Losses `[n]` so that their mean is that of uniform timesteps."""
        return losses if self.weights is None else losses * self.weights.to(losses.device)


@dataclass(frozen=True)
class NoisedSet:
    """Triples of any sizes: one `Batch` for each size."""

    sizes: tuple[Batch, ...]

    def __len__(self) -> int:
        return sum(len(batch) for batch in self.sizes)

    def batches(self, size: int) -> Iterator[Batch]:
        for batch in self.sizes:
            yield from batch.split(size)

    def share(self, group: Group) -> NoisedSet:
        """What this process works on: every `group.size`-th."""
        return NoisedSet(tuple(batch[group.rank :: group.size] for batch in self.sizes))


def shuffled_cycle(count: int, of: int, generator: torch.Generator) -> Tensor:
    """`count` indices below `of`: whole shuffled passes one after another, so that each appears
    equally often."""
    passes = -(-count // of)
    return torch.cat([torch.randperm(of, generator=generator) for _ in range(passes)])[:count]


def batch_order(
    subject: EncodedImages,
    size: int,
    count: int,
    generator: torch.Generator,
    importance: Importance | None = None,
) -> list[Tensor]:
    """`count` batches of `size` views, each of one picture size. Shuffled passes one after another;
    a view waits until its size has a full batch, so that each appears equally often, times its
    repeats. Of several concepts each has an equal share of every pass. Where batches are drawn in
    pairs (`draw_batch`), each view is there twice."""
    if in_pairs(size, importance):
        halves = batch_order(subject, size // 2, count, generator)
        return [half.repeat_interleave(2) for half in halves]
    repeated = [i for i, times in enumerate(subject.repeats) for _ in range(times)]
    passes = _passes(subject, repeated, generator)
    waiting: dict[torch.Size, list[int]] = {}
    order: list[Tensor] = []
    while len(order) < count:
        for view in next(passes):
            same = waiting.setdefault(subject.mean[view].shape, [])
            same.append(view)
            if len(same) == size:
                order.append(torch.tensor(same))
                same.clear()
    return order[:count]


def _passes(
    subject: EncodedImages, views: Sequence[int], generator: torch.Generator
) -> Iterator[list[int]]:
    """Shuffled passes without end. The concept of the most views is seen whole in each; the others
    as often, going round their own views."""
    concepts: dict[int, list[int]] = {}
    for view in views:
        concepts.setdefault(subject.concepts[view] if subject.concepts else 0, []).append(view)
    most = max(len(own) for own in concepts.values())
    rest: dict[int, list[int]] = {concept: [] for concept in concepts}
    while True:
        chosen = []
        for concept, own in concepts.items():
            while len(concepts) > 1 and len(rest[concept]) < most:
                shuffled = torch.randperm(len(own), generator=generator).tolist()
                rest[concept] += [own[n] for n in shuffled]
            chosen += (rest[concept] or own)[:most]
            rest[concept] = rest[concept][most:]
        yield [chosen[n] for n in torch.randperm(len(chosen), generator=generator).tolist()]


def draw_batch(
    subject: EncodedImages,
    index: Tensor,
    timesteps: int,
    generator: torch.Generator,
    importance: Importance | None = None,
    turn: int | None = None,
) -> Batch:
    """The views at `index` (of one size) at stratified timesteps with fresh noise, each with a
    variant of its caption. `turn`: the number of the batch, see `draw_timesteps`.

    In pairs, the second of each has the first one's noise with its sign turned: what a gradient
    owes to the noise falls out of their mean in first order (antithetic variates). Together with
    the places of the timesteps it takes a quarter off the variance of a step's gradient.
    """
    latents = subject.sample_latents(index, generator)
    t, weights = draw_timesteps(importance, len(index), timesteps, generator, turn)
    batch = _batch(subject, index, latents, t, generator, weights)
    noise = batch.noise
    if in_pairs(len(index), importance):
        noise = torch.stack([noise[::2], -noise[::2]], 1).flatten(0, 1)
    return replace(batch, noise=noise, conditioning=subject.draw_words(index, generator))


def in_pairs(size: int, importance: Importance | None) -> bool:
    """Whether a step's `size` pictures are drawn two and two: where a calibration has measured how
    to draw, and they are even."""
    return importance is not None and size % 2 == 0


def draw_noised(
    subject: EncodedImages,
    count: int,
    timesteps: int,
    generator: torch.Generator,
    importance: Importance | None = None,
) -> NoisedSet:
    """`count` triples: views equally often, timesteps stratified over the whole schedule, fresh
    noise."""
    if subject.concepts:
        passes = _passes(subject, range(len(subject)), generator)
        index = torch.tensor(list(islice(chain.from_iterable(passes), count)))
    else:
        index = shuffled_cycle(count, len(subject), generator)
    t, weights = draw_timesteps(importance, count, timesteps, generator)
    sizes = []
    for rows in _by_size(subject, index):
        latents = subject.sample_latents(index[rows], generator)
        some = None if weights is None else weights[rows]
        sizes.append(_batch(subject, index[rows], latents, t[rows], generator, some))
    return NoisedSet(tuple(sizes))


def fixed_noised(subject: EncodedImages, timesteps: int) -> NoisedSet:
    """Every view at the centres of 8 equal timestep bins, with a noise that is the same in every
    run."""
    centres = bin_centres(VALIDATION_TIMESTEPS, timesteps)
    index = torch.arange(len(subject)).repeat_interleave(len(centres))
    t = centres.repeat(len(subject))
    generator = torch.Generator().manual_seed(VALIDATION_SEED)
    sizes = []
    for rows in _by_size(subject, index):
        latents = torch.stack([subject.mean[i] for i in index[rows].tolist()])
        sizes.append(_batch(subject, index[rows], latents, t[rows], generator))
    return NoisedSet(tuple(sizes))


def _by_size(subject: EncodedImages, index: Tensor) -> Sequence[Tensor]:
    """Positions in `index`, grouped by the size of the view there."""
    groups: dict[torch.Size, list[int]] = {}
    for position, view in enumerate(index.tolist()):
        groups.setdefault(subject.mean[view].shape, []).append(position)
    return [torch.tensor(rows) for rows in groups.values()]


def _batch(
    subject: EncodedImages,
    index: Tensor,
    latents: Tensor,
    t: Tensor,
    generator: torch.Generator,
    weights: Tensor | None = None,
) -> Batch:
    noise = torch.randn(latents.shape, generator=generator).to(latents.device)
    mask = (
        None if subject.masks is None else torch.stack([subject.masks[i] for i in index.tolist()])
    )
    words = subject.conditioning[index]
    return Batch(latents, t.to(latents.device), noise, words, mask, weights)


@torch.no_grad()
def mean_loss(
    model: StableDiffusion,
    triples: NoisedSet,
    batch_size: int,
    group: Group = ALONE,
    before_each: Callable[[], None] = lambda: None,
) -> float:
    """Mean denoising loss over all triples, forward passes only; the processes of `group` share the
    work. `before_each` pass may raise to stop."""
    total = torch.zeros(1, dtype=torch.float64)
    for batch in triples.share(group).batches(batch_size):
        before_each()
        total += batch.loss(model).cpu().double().sum()
    group.sum_([total])
    return float(total) / len(triples)
