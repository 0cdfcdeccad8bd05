"""Where the command line keeps what a run made, and how it says so."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import CNTLoRAError, Interrupted
from ..events import Observer
from ..files import DISK, Disk, user_folders

if TYPE_CHECKING:
    from ..run.outcome import RunResult
    from ..training.resume import RunSnapshots


@dataclass
class Keeper:
    """Saves a run, also one that ended early. `story`: what `save_run` tells of it. `observer` must
    not raise: what is being kept is not stopped."""

    output: Path
    story: dict[str, Any]
    trains: bool
    overwrite: bool
    checkpoints: RunSnapshots | None
    observer: Observer
    disk: Disk = DISK
    saved: Path | None = field(default=None, init=False)
    run: RunResult | None = field(default=None, init=False)

    def keep(self, run: RunResult) -> None:
        """Save it, unless no step was finished. Raises OutputError when no place takes it."""
        from ..run.saving import save_run

        self.run = run
        if run.steps or not self.trains:
            self.saved = save_run(
                self.output,
                run.lora,
                **self.story,
                training=run.training,
                steps=run.kept_step,
                overwrite=self.overwrite,
                elsewhere=user_folders(),
                disk=self.disk,
                observer=self.observer,
            )

    def finish(self, run: RunResult) -> dict[str, Any]:
        """All is saved: what the command prints."""
        if self.checkpoints:
            self.checkpoints.remove()
        return {
            "lora": str(self.saved),
            "steps": run.steps,
            "kept": run.kept_step,
            "loss": run.kept_loss,
            "strength": round(run.strength, 3),
        }

    def locate(self, error: CNTLoRAError) -> None:
        """Add to an error where the work is, and how to go on."""
        if self.saved and self.run:
            error.add_sentence(f"What was trained is in '{self.saved}' ({_steps(self.run)}).")
        elif isinstance(error, Interrupted):
            error.add_sentence("No step was finished.")
        unfinished = isinstance(error, Interrupted) or not self.saved
        if unfinished and self.checkpoints and self.checkpoints.ours:
            where = self.checkpoints.path
            error.add_sentence(f"The same command with --resume goes on from '{where}'.")


def _steps(run: RunResult) -> str:
    if run.kept_step == run.steps:
        return f"{run.steps} steps"
    return f"{run.steps} steps, with the weights of step {run.kept_step}, the best validation"
