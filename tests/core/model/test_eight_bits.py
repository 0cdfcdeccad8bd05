"""Frozen weights in 8 bits."""

import pytest
import torch
from torch import nn

from cntlora_core.calibration.calibrate import calibrate
from cntlora_core.config import CalibrationConfig, TrainConfig
from cntlora_core.data.batches import fixed_noised, mean_loss
from cntlora_core.model import eight_bits
from cntlora_core.model.eight_bits import LEVELS, Conv8, Linear8, store_in_eight_bits
from cntlora_core.model.loader import load_checkpoint
from cntlora_core.run.runs import run_training


@pytest.mark.parametrize(
    ("layer", "kind", "shape"),
    [
        (nn.Linear(512, 256), Linear8, (3, 512)),
        (nn.Conv2d(128, 64, 3, stride=2, padding=1), Conv8, (2, 128, 8, 8)),
        (nn.Linear(512, 256, bias=False).to(torch.bfloat16), Linear8, (3, 512)),
    ],
    ids=["linear", "convolution", "bf16"],
)
def test_each_channel_keeps_half_a_level(layer, kind, shape):
    network = nn.Sequential(layer, nn.Linear(4, 4)).requires_grad_(False)
    before = layer.weight.clone()
    store_in_eight_bits(network)
    stored = network[0]
    assert isinstance(stored, kind)
    assert type(network[1]) is nn.Linear  # nothing to gain
    level = before.float().flatten(1).abs().amax(1) / LEVELS
    off = (stored.weight.float() - before.float()).abs().flatten(1).amax(1)
    rounding = 0.01 if before.dtype == torch.float32 else 1.0  # bf16 has as few digits
    assert (off <= level * (0.5 + rounding)).all()
    assert stored.weight.dtype == before.dtype
    assert sum(b.nbytes for b in stored.buffers()) < 1.1 * before.numel()
    x = torch.randn(shape).to(before.dtype)
    torch.testing.assert_close(stored(x), type(layer).forward(stored, x))
    assert "weight" not in dict(stored.named_parameters())


def test_a_model_in_8_bits_calibrates_and_trains(subject, monkeypatch):
    """The loss of the miniature moves by less than 0.2 %; what is learnt is learnt on it."""
    monkeypatch.setattr(eight_bits, "SMALLEST", 0)  # its layers are small
    plain, stored = load_checkpoint("mini-sd"), load_checkpoint("mini-sd", eight_bits=True)
    losses = [mean_loss(m, fixed_noised(subject.only([0]), 1000), 8) for m in (plain, stored)]
    assert losses[1] != losses[0]
    assert losses[1] == pytest.approx(losses[0], rel=2e-3)
    config = CalibrationConfig(effort="quick", batch_size=1)
    start = calibrate(stored, subject, config)
    assert start.report.loss < start.report.base_loss
    training = TrainConfig(
        steps=1, learning_rate=1e-3, batch_size=1, validate_every=0, gradient_checkpointing=True
    )
    run = run_training(stored, subject, config, training, start=start)
    assert all(torch.isfinite(f.up).all() for f in run.lora.values())
