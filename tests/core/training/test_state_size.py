"""The space that a checkpoint will need, against the files that runs write."""

import pytest

from cntlora_core.config import CalibrationConfig, TrainConfig
from cntlora_core.run.runs import run_training
from cntlora_core.training.resume import RunSnapshots
from cntlora_core.training.state_size import parameters_of, state_bytes


class Largest(RunSnapshots):
    size = 0

    def write(self, state):
        super().write(state)
        self.size = max(self.size, self.path.stat().st_size)


@pytest.mark.parametrize(
    ("init", "optimizer", "rule"),
    [("target", "natural", "data"), ("gaussian", "adamw", "uniform")],
)
def test_a_checkpoint_takes_what_was_said(mini_sd, subject, tmp_path, init, optimizer, rule):
    calibration = CalibrationConfig(init=init, effort="quick", rank=4, batch_size=1, rank_rule=rule)
    training = TrainConfig(
        steps=6, learning_rate=1e-3, batch_size=1, optimizer=optimizer, validate_every=6
    )
    said = state_bytes(mini_sd, calibration, training)
    files = Largest(tmp_path / "x.state.safetensors", {}, every=5)
    losses = iter(range(9, 0, -1))
    run = run_training(
        mini_sd, subject, calibration, training, validate=lambda: next(losses), checkpoints=files
    )
    own = state_bytes(mini_sd, calibration, training, run.lora)
    assert 0.6 * own < files.size <= own <= said  # which layers get a rank is not known before
    count = parameters_of(mini_sd, calibration, run.lora)
    assert count == pytest.approx(parameters_of(mini_sd, calibration), rel=0.05)
