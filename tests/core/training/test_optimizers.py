"""Optimisers of other packages: missing ones are told before any work, and the rate that is
reported is the one that acts."""

import sys
from types import ModuleType
from typing import ClassVar

import pytest
import torch

from cntlora_core.cli.main import main
from cntlora_core.config import CalibrationConfig, TrainConfig
from cntlora_core.errors import SettingError
from cntlora_core.events import Step
from cntlora_core.run.runs import run_training
from cntlora_core.training.optimizers import PACKAGES, optional_optimizer


class Prodigy(torch.optim.SGD):
    """Only what is asked of it: its estimate `d` in the parameter groups."""

    def __init__(self, parameters, lr, weight_decay):
        super().__init__(parameters, lr=lr, weight_decay=weight_decay)
        self.param_groups[0]["d"] = 0.25


@pytest.mark.parametrize("name", list(PACKAGES))
def test_a_missing_package_is_a_sentence(monkeypatch, name):
    module = PACKAGES[name][0]
    monkeypatch.setitem(sys.modules, module.split(".")[0], None)
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(SettingError, match=f"needs the package {module.split('.')[0]}"):
        optional_optimizer(name)
    assert optional_optimizer("adamw") is None


def test_it_is_told_before_the_model_is_loaded(monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(sys.modules, "prodigyopt", None)
    from cntlora_core.model.loader import MINI_SD_FOLDER

    given = ["--checkpoint", "nowhere", "--images", str(MINI_SD_FOLDER / "subject")]
    given += ["--prompt", "a cat", "--output", str(tmp_path / "x.safetensors")]
    assert main(["train", *given, "--optimizer", "prodigy"]) == 1
    assert "needs the package prodigyopt" in capsys.readouterr().err
    assert main(["train", *given, "--continue-from", str(tmp_path / "none.safetensors")]) == 1
    assert "none.safetensors' does not exist" in capsys.readouterr().err


def test_the_rate_reported_is_the_effective_one(mini_sd, subject, monkeypatch):
    package = ModuleType("prodigyopt")
    package.Prodigy = Prodigy
    monkeypatch.setitem(sys.modules, "prodigyopt", package)
    config = TrainConfig(
        steps=1, learning_rate=1.0, optimizer="prodigy", batch_size=1, validate_every=0
    )
    events = []
    plain = CalibrationConfig(init="gaussian", rank=1)
    run_training(mini_sd, subject, plain, config, observer=events.append)
    assert [e.lr for e in events if isinstance(e, Step)] == [0.25]


class Turning(torch.optim.SGD):
    """Steps at other weights than it gives out, as schedule-free optimisers do."""

    said: ClassVar[list[str]] = []

    def __init__(self, parameters, lr, weight_decay):
        super().__init__(parameters, lr=lr, weight_decay=weight_decay)

    def train(self):
        self.said.append("train")

    def eval(self):
        self.said.append("eval")


def test_a_schedule_free_optimiser_is_turned_for_every_step(mini_sd, subject, monkeypatch):
    package = ModuleType("schedulefree")
    package.AdamWScheduleFree = Turning
    monkeypatch.setitem(sys.modules, "schedulefree", package)
    config = TrainConfig(
        steps=2, learning_rate=1e-3, optimizer="schedulefree", batch_size=1, validate_every=0
    )
    run_training(mini_sd, subject, CalibrationConfig(init="gaussian", rank=1), config)
    assert Turning.said == ["train", "eval"] * 2
