"""What comes of a run, also of one that ends early."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from ..calibration.calibrate import Calibration
from ..config import TrainConfig
from ..errors import CNTLoRAError, OutputError
from ..events import Event, Observer
from ..lora.adapter import LoRA
from ..training.resume import RunSnapshots
from ..training.state import TrainState


@dataclass(frozen=True)
class RunResult:
    """A run as far as it went: the LoRA as calibrated, and as trained (the best weights, or the
    last; of step `kept_step`), at the `strength` that the pictures which validate speak for.

    `base_loss` is the untouched model's, None without a validation; `steps` were made, with the
    settings `training`: those asked for, fitted to the memory and the start; None: not trained.
    `losses` are of every step, also of the run that this one went on from.
    """

    start: Calibration
    lora: LoRA
    kept_step: int
    steps: int
    base_loss: float | None
    validations: list[tuple[int, float]]
    training: TrainConfig | None = None
    losses: list[float] = field(default_factory=list)
    strength: float = 1.0

    @property
    def kept_loss(self) -> float | None:
        """The validation loss of the weights that were kept."""
        return dict(self.validations).get(self.kept_step)


@dataclass
class Ongoing:
    """A training while it is made: its checkpoints, and what is kept when it ends early."""

    start: Calibration
    state: TrainState
    training: TrainConfig
    base_loss: float | None
    checkpoints: RunSnapshots | None
    observer: Observer
    validate: Callable[[], float] | None = None
    left: BaseException | None = None

    def watch(self, event: Event) -> None:
        """The observer; an exception of it leaves the run between two steps."""
        try:
            self.observer(event)
        except BaseException as error:
            self.left = error
            raise

    def validated(self) -> float:
        """The validation loss; an exception there leaves the run between two steps too."""
        assert self.validate
        try:
            return self.validate()
        except BaseException as error:
            self.left = error
            raise

    def save(self, state: TrainState) -> None:
        if self.checkpoints and self.checkpoints.due(state.step):
            self.checkpoints.try_to_write(state, self.watch)

    def result(self, best: bool) -> RunResult:
        state = self.state
        kept = state.worth(best and self.training.keep_best)
        return RunResult(
            self.start,
            kept.lora,
            kept.step,
            state.step,
            self.base_loss,
            state.validations,
            self.training,
            state.losses,
            kept.strength,
        )

    @contextmanager
    def kept(self, on_stop: Callable[[RunResult], None] | None) -> Iterator[None]:
        """Around the training: an exception goes on when its work is kept."""
        try:
            yield
        except BaseException as error:
            self._keep(error, on_stop)
            raise

    def _keep(self, error: BaseException, on_stop: Callable[[RunResult], None] | None) -> None:
        """The LoRA first, then the checkpoint; what fails there is told with `error`."""
        self.state.abandon_step()
        try:
            if on_stop:
                on_stop(self.result(best=self.state.judged))
        finally:
            # Any other exception leaves half a step, and the checkpoint before it stays.
            if self.checkpoints and error is self.left:
                try:
                    self.checkpoints.write(self.state)
                except OutputError as failure:
                    self.checkpoints.failure = str(failure)
                    if isinstance(error, CNTLoRAError):
                        error.add_sentence(str(failure))
