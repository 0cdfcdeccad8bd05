"""The loop that trains both models. On a GPU a whole step is one CUDA graph: the models are so
small that launching their kernels one by one would take most of the time."""

from __future__ import annotations

import argparse
import gc
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from common import learning_rate, report_due
from torch import Tensor, nn

EAGER_STEPS = 3  # before a capture: cuDNN chooses its kernels, AdamW makes its state


def add_arguments(parser: argparse.ArgumentParser, batch: int) -> None:
    parser.add_argument("--batch-size", type=int, default=batch)
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoint in OUTPUT")
    parser.add_argument("--save-every", type=int, default=2000, help="steps between checkpoints")
    parser.add_argument("--eager", action="store_true", help="no CUDA graph")


def plan(args: argparse.Namespace, warm_up: int, ema_decay: float) -> Plan:
    """What the command line asked for."""
    checkpoint = args.output / "training.pt"
    return Plan(
        args.steps, warm_up, ema_decay, checkpoint, args.save_every, args.resume, args.eager
    )


def bf16(device: torch.device) -> torch.autocast:
    """Where convolutions are faster for it: on a GPU. A graph must not keep the cast weights."""
    on_gpu = device.type == "cuda"
    return torch.autocast(device.type, torch.bfloat16, enabled=on_gpu, cache_enabled=False)


class EMA:
    """Exponential moving average of a module's parameters, counted on their device."""

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.decay = decay
        self.live = [p.detach() for p in module.parameters()]
        self.average = [p.clone() for p in self.live]
        self.updates = torch.zeros((), device=self.live[0].device)

    @torch.no_grad()
    def update(self) -> None:
        self.updates += 1
        decay = ((1 + self.updates) / (10 + self.updates)).clamp(max=self.decay)
        change = torch._foreach_sub(self.live, self.average)
        torch._foreach_mul_(change, 1 - decay)
        torch._foreach_add_(self.average, change)

    @torch.no_grad()
    def swap(self) -> None:
        """Exchange live and averaged weights."""
        for live, average in zip(self.live, self.average, strict=True):
            held = live.clone()
            live.copy_(average)
            average.copy_(held)


@dataclass(frozen=True)
class Plan:
    """How long to train, and how to keep the work. `after` is called every `save_every` steps."""

    steps: int
    warm_up: int
    ema_decay: float
    checkpoint: Path | None = None
    save_every: int = 2000
    resume: bool = False
    eager: bool = False
    after: Callable[[Training], None] | None = None


class Training:
    """AdamW with clipped gradients and averaged weights.

    `loss` draws a batch on the device of the parameters and returns the scalar to descend and the
    one to report; nothing in it may wait for a GPU. `running` are tensors that it changes in place.
    Each of `groups` has `params`, `peak` (learning rate) and `weight_decay`.
    """

    def __init__(
        self,
        module: nn.Module,
        groups: list[dict],
        loss: Callable[[], tuple[Tensor, Tensor]],
        plan: Plan,
        running: Sequence[Tensor] = (),
    ) -> None:
        self.module, self.loss, self.plan, self.running = module, loss, plan, list(running)
        self.device = next(module.parameters()).device
        self.on_gpu = self.device.type == "cuda"
        self.optimizer = torch.optim.AdamW(
            groups, betas=(0.9, 0.99), fused=True, capturable=self.on_gpu
        )
        self.ema = EMA(module, plan.ema_decay)
        self.reported = torch.zeros((), device=self.device)
        self.step = 0
        if plan.resume:
            self._load()
        for group in self.optimizer.param_groups:
            group["lr"] = torch.zeros((), device=self.device)  # a graph reads it anew every time

    def run(self) -> float:
        """Train to the last step and leave the averaged weights in the module. Returns the mean of
        the reported losses since the last report."""
        started, first, counted = time.monotonic(), self.step, self.step
        advance, last = self._on_side_stream if self.on_gpu else self._advance, float("nan")
        while self.step < self.plan.steps:
            if self.on_gpu and self.step == first + EAGER_STEPS and not self.plan.eager:
                advance = self._captured()
            for group in self.optimizer.param_groups:
                rate = learning_rate(self.step, self.plan.steps, self.plan.warm_up, group["peak"])
                group["lr"].fill_(rate)
            advance()
            self.step += 1
            if report_due(self.step - 1, self.plan.steps) or self.step == first + 100:
                last = self.reported.item() / (self.step - counted)
                self.reported.zero_()
                counted, seconds = self.step, time.monotonic() - started
                rate = (self.step - first) / seconds
                print(
                    f"{seconds:.0f} s, step {self.step}: loss {last:.5f}, {rate:.1f} steps/s",
                    flush=True,
                )
            if self.step % self.plan.save_every == 0:
                self._save()
        self.ema.swap()
        return last

    def _advance(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        loss, reported = self.loss()
        loss.backward()
        nn.utils.clip_grad_norm_(self.module.parameters(), 1.0)
        self.optimizer.step()
        self.ema.update()
        self.reported += reported.detach()

    def _on_side_stream(self) -> None:
        """As a capture wants the steps before it."""
        stream, current = torch.cuda.Stream(), torch.cuda.current_stream()
        stream.wait_stream(current)
        with torch.cuda.stream(stream):
            self._advance()
        current.wait_stream(stream)

    def _captured(self) -> Callable[[], None]:
        """A step as one CUDA graph, or kernel by kernel where that cannot be."""
        graph = torch.cuda.CUDAGraph()
        gc.collect()  # not while capturing: what is left of an earlier graph would be freed then
        try:
            with torch.cuda.graph(graph):
                self._advance()
        except RuntimeError as error:
            print(f"No CUDA graph, so steps will be slower: {error}", flush=True)
            return self._advance
        return graph.replay

    def _save(self) -> None:
        if self.plan.after:
            self.plan.after(self)
        if self.plan.checkpoint is None:
            return
        state = {
            "step": self.step,
            "module": self.module.state_dict(),
            "average": self.ema.average,
            "updates": self.ema.updates,
            "optimizer": self.optimizer.state_dict(),
            "running": self.running,
            "random": torch.get_rng_state(),
            "random_gpu": torch.cuda.get_rng_state(self.device) if self.on_gpu else None,
        }
        self.plan.checkpoint.parent.mkdir(parents=True, exist_ok=True)
        beside = self.plan.checkpoint.with_suffix(".part")
        torch.save(state, beside)
        os.replace(beside, self.plan.checkpoint)

    @torch.no_grad()
    def _load(self) -> None:
        if self.plan.checkpoint is None or not self.plan.checkpoint.is_file():
            raise SystemExit(
                f"'{self.plan.checkpoint}' is missing: there is nothing to resume. Leave --resume "
                "out, or give the --output of the training that was stopped."
            )
        state = torch.load(self.plan.checkpoint, map_location=self.device, weights_only=True)
        self.step = state["step"]
        self.module.load_state_dict(state["module"])
        self.optimizer.load_state_dict(state["optimizer"])
        kept = [*self.ema.average, self.ema.updates, *self.running]
        stored = [*state["average"], state["updates"], *state["running"]]
        for mine, theirs in zip(kept, stored, strict=True):
            mine.copy_(theirs)
        torch.set_rng_state(state["random"].cpu())
        if self.on_gpu and state["random_gpu"] is not None:
            torch.cuda.set_rng_state(state["random_gpu"].cpu(), self.device)
