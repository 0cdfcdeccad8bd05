"""A training on disk: written while it runs, read to go on to the bit-identical end."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as serialize
from torch import Tensor

from ..calibration.constraints import Metric
from ..calibration.moments import Moments
from ..calibration.natural import NaturalStart
from ..data.importance import Importance
from ..errors import OutputError, SettingError
from ..events import Notice, Observer
from ..files import DISK, Disk, atomic_write, remove_written
from ..lora.adapter import Factors, LoRA
from ..lora.targets import Projection
from .state import Kept, TrainState

VERSION = 6
SUFFIX = ".state.safetensors"
DIGEST = re.compile(r"[0-9a-f]{16,}")


def state_path(output: Path) -> Path:
    """Where the checkpoint of a LoRA file lies: beside it, `cat.safetensors` ->
    `cat.state.safetensors`."""
    return output.with_name(output.stem + SUFFIX)


@dataclass
class RunSnapshots:
    """Where and how often a run is written. `identity`: what it was made from and with; a run goes
    on only from a file of the same.

    `every`: steps, 0 for only when the run is stopped. `resume`: go on from `path` where it exists.
    `overwrite`: start afresh where another run's is. Somebody else's file is never touched.
    """

    path: Path
    identity: Mapping[str, Any]
    every: int = 0
    resume: bool = False
    overwrite: bool = False
    disk: Disk = DISK
    ours: bool = field(default=False, init=False)  # this run has written or read the file
    replaces: bool = field(default=False, init=False)  # what lies there is another run's, given up
    told: bool = field(default=False, init=False)  # that it could not be written on the way
    failure: str = field(default="", init=False)  # why it could not be written at the end

    def due(self, step: int) -> bool:
        return bool(self.every) and step % self.every == 0

    def write(self, state: TrainState) -> None:
        """Atomic: a process killed at any moment leaves this file or the one before. Raises
        OutputError."""
        tensors, story = _pack(state)
        story["identity"] = dict(self.identity)
        payload = serialize(tensors, metadata={"cntlora.state": json.dumps(story)})
        atomic_write(self.path, payload, disk=self.disk)
        self.ours = True

    def try_to_write(self, state: TrainState, observer: Observer) -> None:
        """Write while training goes on: a failure is told, once."""
        try:
            self.write(state)
        except OutputError as error:
            if not self.told:
                self.told = True
                observer(Notice(f"{error} Training goes on without this checkpoint."))

    def check(self) -> None:
        """Before any work: what lies at `path` may be replaced. Raises OutputError."""
        if not os.path.lexists(self.path):
            return
        try:
            step = _read_story(self.path)["step"]
        except (SafetensorError, OSError, KeyError, ValueError, TypeError) as error:
            raise OutputError(
                f"'{self.path}' has the name of this run's checkpoint and is none: move it away, "
                "or choose another output name."
            ) from error
        if not (self.resume or self.overwrite):
            raise OutputError(
                f"'{self.path}' is the checkpoint of a run of {step} steps: go on with --resume, "
                "or start afresh with --overwrite."
            )
        self.replaces = not self.resume

    def read(self) -> SavedState | None:
        """The file to go on from; None when there is none or none is wanted. Raises SettingError
        when it is of another run."""
        if not self.resume or not self.path.is_file():
            return None
        try:
            story = _read_story(self.path)
            with safe_open(self.path, framework="pt") as file:
                # Copies: in the file's buffer they are not aligned, and vectorised arithmetic then
                # rounds otherwise.
                tensors = {key: file.get_tensor(key).clone() for key in file.keys()}  # noqa: SIM118
            if story["version"] != VERSION:
                raise SettingError(
                    f"'{self.path}' was written by another version of CNTLoRA: start afresh."
                )
            saved = SavedState(tensors, story)
            lora = saved.lora
        except (SafetensorError, OSError, KeyError, json.JSONDecodeError) as error:
            raise SettingError(
                f"'{self.path}' is not a readable checkpoint ({error}): move it away to start "
                "afresh."
            ) from error
        if not lora:
            raise SettingError(f"'{self.path}' holds no adapters: delete it to start afresh.")
        for name, value in json.loads(json.dumps(dict(self.identity))).items():
            if story["identity"].get(name) != value:
                differs = _difference(name, story["identity"].get(name), value)
                raise SettingError(
                    f"'{self.path}' is of another run: {differs}. Use the same settings, or start "
                    "afresh."
                )
        self.ours = True
        return saved

    def check_steps(self, saved: SavedState, steps: int) -> None:
        """Raises SettingError where the run has made more than are asked for: what it was after
        those is gone."""
        if saved.story["step"] > steps:
            raise SettingError(
                f"'{self.path}' has made {saved.story['step']} steps already, and steps is "
                f"{steps}: give as many at least, or start afresh."
            )

    def remove(self) -> None:
        """A run that ended needs no checkpoint, and one that it took the place of none either."""
        if self.ours or self.replaces:
            remove_written(self.path)


def _read_story(path: Path) -> dict[str, Any]:
    with safe_open(path, framework="pt") as file:
        story: dict[str, Any] = json.loads((file.metadata() or {})["cntlora.state"])
    return story


def _difference(name: str, before: Any, now: Any) -> str:
    """Two values of a run's identity; digests tell nobody anything."""
    if any(isinstance(x, list) or DIGEST.fullmatch(str(x)) for x in (before, now)):
        return f"{name}: not the same as then"
    return f"its {name} is {before!r}, now it is {now!r}"


@dataclass(frozen=True)
class SavedState:
    """A checkpoint that was read."""

    tensors: dict[str, Tensor]
    story: dict[str, Any]

    @property
    def lora(self) -> LoRA:
        return self._factors("lora")

    @property
    def importance(self) -> Importance | None:
        density = self.story["importance"]
        return Importance(tuple(density)) if density else None

    def natural(self, metric: Metric, projections: Sequence[Projection]) -> NaturalStart | None:
        """Of a run that made natural-gradient steps."""
        (settings,) = self.story["optimizer"]["param_groups"]
        if "made" not in settings:
            return None
        prefix = "optimizer.0."
        tensors = {k.removeprefix(prefix): v for k, v in self.tensors.items() if prefix in k}
        moments = Moments.from_tensors(tensors, "metric.", torch.device("cpu"))
        trained = [p for p in projections if p.name in self.lora]
        return NaturalStart(trained, metric, moments, settings["step"], settings["made"])

    def restore(self, state: TrainState) -> None:
        """Bring a fresh state, whose adapters have this file's ranks, to where the run was."""
        story, tensors = self.story, self.tensors
        state.adapters.load(self.lora)
        state.generator.set_state(tensors["generator"])
        state.drawn = tensors["generator"]
        state.step, state.rate = story["step"], story["rate"]
        state.losses = tensors["losses"].tolist()
        state.validations = [(int(step), loss) for step, loss in story["validations"]]
        state.looked = state.step if state.step or state.validations else -1
        if story.get("validating"):  # it was left in the middle of that: it is made now
            state.looked = state.step - 1
        if story["best"]:
            step, loss, strength = story["best"]
            state.best = Kept(step, self._factors("best"), strength, loss)
        if state.strength:
            state.strength.value = story["strength"]
        with torch.no_grad():
            state.live.copy_(tensors["live"])
            state.average.value.copy_(state.flat)
        state.average.count = story["averaged"]
        state.give_out()
        held = story["optimizer"]
        for key, tensor in tensors.items():
            if key.startswith("optimizer."):
                _, number, name = key.split(".", 2)
                held["state"].setdefault(number, {})[name] = tensor
        state.optimizer.load_state_dict(
            {
                "param_groups": held["param_groups"],
                "state": {int(n): values for n, values in held["state"].items()},
            }
        )
        if story["scaler"]:
            state.scaler.load_state_dict(story["scaler"])

    def _factors(self, part: str) -> LoRA:
        names = self.story[
            "names"
        ]  # in the adapters' order, which the optimiser's numbers follow; the file sorts its keys
        return {
            n: Factors(self.tensors[f"{part}.up.{n}"], self.tensors[f"{part}.down.{n}"])
            for n in names
        }


def _pack(state: TrainState) -> tuple[dict[str, Tensor], dict[str, Any]]:
    tensors = {
        "generator": state.generator.get_state(),
        "losses": torch.tensor(state.losses, dtype=torch.float64),
    }
    for part, lora in (
        ("lora", state.adapters.split(state.average.value)),
        ("best", state.best.lora if state.best else {}),
    ):
        for name, factors in lora.items():
            tensors |= {f"{part}.up.{name}": factors.up, f"{part}.down.{name}": factors.down}
    tensors["live"] = state.live
    optimizer = state.optimizer.state_dict()
    plain: dict[str, dict[str, Any]] = {}
    for n, values in optimizer["state"].items():
        for name, value in values.items():
            if isinstance(value, Tensor):
                tensors[f"optimizer.{n}.{name}"] = value
            else:
                plain.setdefault(str(n), {})[name] = value
    story = {
        "version": VERSION,
        "names": list(state.adapters.shapes),
        "step": state.step,
        "importance": state.importance and list(state.importance.density),
        "rate": state.rate,
        "averaged": state.average.count,
        "validations": state.validations,
        "validating": state.validating,
        "best": [state.best.step, state.best.loss, state.best.strength] if state.best else None,
        "strength": state.strength.value if state.strength else 1.0,
        "optimizer": {"param_groups": optimizer["param_groups"], "state": plain},
        "scaler": state.scaler.state_dict(),
    }
    return {key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}, story
