"""Reduced precision of the frozen model, on the CPU: adapters stay fp32, the loss falls as it does in fp32."""

import pytest
import torch

from cntlora_core.calibration import calibrate
from cntlora_core.checkpoint import MINI_SD_FOLDER, load_checkpoint
from cntlora_core.config import CalibrationConfig, TrainConfig
from cntlora_core.runs import personalise, read_subject, validation_loss


def test_the_scale_of_fp16_gradients_is_gone_from_what_is_measured():
    """The slope of the loss was 1024 times too steep in fp16, and the step with it."""
    steps = []
    for dtype in (torch.float32, torch.float16):
        model = load_checkpoint("mini-sd", dtype=dtype)
        subject = read_subject(model, MINI_SD_FOLDER / "subject", "a sks cat face emoji")
        steps.append(calibrate(model, subject, CalibrationConfig(effort="quick")).report.step_size)
    assert steps[1] == pytest.approx(steps[0], rel=0.1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_calibrating_and_training_in_half_precision(dtype):
    model = load_checkpoint("mini-sd", dtype=dtype)
    subject = read_subject(model, MINI_SD_FOLDER / "subject", "a sks cat face emoji")
    assert subject.mean[0].dtype == torch.float32
    validate = validation_loss(model, subject, 8)
    base = validate()
    training = TrainConfig(steps=6, lr=3e-3, validate_every=6)
    run = personalise(model, subject, CalibrationConfig(effort="quick"), training, validate=validate)
    assert run.validations[0][1] < 0.97 * base
    assert run.validations[-1][1] < run.validations[0][1]
    assert all(f.up.dtype == torch.float32 and torch.isfinite(f.up).all() for f in run.lora.values())
