"""What calibration spares, training goes on to spare."""

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from cntlora_core.calibration.calibrate import calibrate, continued
from cntlora_core.calibration.preservation import Preservation
from cntlora_core.calibration.second_moment import Diagonal, LowRank, Rows
from cntlora_core.config import EFFORTS, CalibrationConfig, TrainConfig
from cntlora_core.data.class_images import class_images, class_noised
from cntlora_core.events import Step
from cntlora_core.lora.adapter import Factors, attached_lora
from cntlora_core.run.runs import run_training
from cntlora_core.training.resume import RunSnapshots, state_path

QUICK = CalibrationConfig(effort="quick", targets="attention")


@pytest.fixture(scope="module")
def prior(mini_sd, subject):
    return class_noised(
        mini_sd, class_images(mini_sd, "a cat face emoji", subject.resolution, steps=4)
    )


@given(
    m=st.integers(1, 5),
    d=st.integers(1, 5),
    r=st.integers(1, 3),
    diagonal=st.booleans(),
    seed=st.integers(0, 99),
)
@settings(max_examples=25, deadline=None)
def test_it_is_the_change_of_the_outputs_on_the_prior(m, d, r, diagonal, seed):
    generator = torch.Generator().manual_seed(seed)
    up, down, x = (torch.randn(*shape, generator=generator) for shape in ((m, r), (r, d), (7, d)))
    w, C = torch.rand(m, generator=generator), x.T @ x / 7
    kind = Diagonal if diagonal else LowRank
    net = nn.Sequential(nn.Linear(d, m))
    preservation = Preservation({"0": w}, {"0": kind.of(Rows(x))})
    with attached_lora(net, {"0": Factors(up, down)}, trainable=True) as adapters:
        loss = preservation.loss(adapters)
    D = up @ down
    expected = (w[:, None] * D * (D * C.diagonal() if diagonal else D @ C)).sum() / 2
    torch.testing.assert_close(loss.detach(), expected, rtol=1e-3, atol=1e-4)
    assert loss.requires_grad


def test_one_input_of_several_layers_moves_once():
    C = LowRank.of(Rows(torch.rand(4, 4)))
    preservation = Preservation({"a": torch.rand(3), "b": torch.rand(2)}, {"a": C, "b": C})
    moved = preservation.on(torch.device("meta"))
    assert moved.outputs["a"].is_meta
    assert moved.inputs["a"] is moved.inputs["b"]


@pytest.fixture
def short(monkeypatch):
    """Two batches of each part are enough where nobody looks at how well it fits."""
    monkeypatch.setitem(EFFORTS, "quick", (2, 2))


@pytest.mark.usefixtures("short")
def test_without_a_prior_or_gradients_there_is_none(mini_sd, subject, prior):
    assert calibrate(mini_sd, subject, QUICK).preservation is None
    assert (
        calibrate(
            mini_sd, subject, dataclasses.replace(QUICK, init="domain"), prior=prior
        ).preservation
        is None
    )
    assert (
        calibrate(
            mini_sd, subject, dataclasses.replace(QUICK, preservation=0.0), prior=prior
        ).preservation
        is None
    )


def test_training_keeps_it_small(mini_sd, subject, prior):
    start = calibrate(mini_sd, subject, QUICK, prior=prior)
    assert start.preservation is not None

    def after(begin):
        lora = run_training(
            mini_sd,
            subject,
            QUICK,
            TrainConfig(steps=12, learning_rate=3e-3, validate_every=0),
            start=begin,
        ).lora
        with attached_lora(mini_sd.unet, lora) as adapters:
            return float(start.preservation.loss(adapters))

    assert after(continued(start.lora, start.preservation)) < 0.9 * after(continued(start.lora))


@pytest.mark.usefixtures("short")
def test_a_resumed_run_goes_on_with_it(mini_sd, subject, prior, tmp_path):
    training = TrainConfig(steps=4, learning_rate=3e-3, validate_every=0)
    whole = run_training(mini_sd, subject, QUICK, training, preserve=prior)
    checkpoints = RunSnapshots(state_path(tmp_path / "x.safetensors"), {}, resume=True)

    def cancel(event):
        if isinstance(event, Step) and event.step == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_training(
            mini_sd,
            subject,
            QUICK,
            training,
            preserve=prior,
            checkpoints=checkpoints,
            observer=cancel,
        )
    resumed = run_training(
        mini_sd, subject, QUICK, training, preserve=prior, checkpoints=checkpoints
    )
    for name, factors in whole.lora.items():
        assert torch.equal(factors.up, resumed.lora[name].up)
        assert torch.equal(factors.down, resumed.lora[name].down)
