"""Reduced precision of the frozen model, on the CPU: adapters stay fp32, the loss falls as it does
in fp32."""

import pytest
import torch

from cntlora_core.calibration.measure import measure
from cntlora_core.config import EFFORTS, CalibrationConfig, DataConfig, TrainConfig
from cntlora_core.data.batches import draw_noised
from cntlora_core.data.dataset import read_subject
from cntlora_core.distributed import ALONE
from cntlora_core.events import ignore
from cntlora_core.lora.targets import find_projections
from cntlora_core.model.loader import MINI_SD_FOLDER, load_checkpoint
from cntlora_core.run.runs import run_training
from cntlora_core.training.validation import validation_loss


def test_the_scale_of_fp16_gradients_is_gone_from_what_is_measured():
    """The slope of the loss was 1024 times too steep in fp16, and the step with it."""
    measured = []
    for dtype in (torch.float32, torch.float16):
        model = load_checkpoint("mini-sd", dtype=dtype)
        subject = read_subject(model, MINI_SD_FOLDER / "subject", "a sks cat face emoji")
        triples = draw_noised(subject, 2, len(model.schedule), torch.Generator().manual_seed(0))
        projections = find_projections(model.unet)
        moments = measure(
            model,
            projections,
            triples,
            batch_size=2,
            backward=True,
            width=8,
            gradient_checkpointing=False,
            phase="",
            observer=ignore,
            group=ALONE,
        ).moments
        measured.append(
            torch.stack(
                [
                    sum((up @ down).norm() for up, down in (moments.G([p]) for p in projections)),
                    sum(moments.S(p).diagonal().norm() for p in projections),
                ]
            )
        )
    torch.testing.assert_close(measured[1], measured[0], rtol=0.1, atol=0.0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_calibrating_and_training_in_half_precision(dtype, tmp_path, monkeypatch):
    monkeypatch.setitem(EFFORTS, "quick", (4, 2))
    model = load_checkpoint("mini-sd", dtype=dtype)
    small = DataConfig(resolution=32)
    subject = read_subject(model, MINI_SD_FOLDER / "subject", "a sks cat face emoji", small)
    assert subject.mean[0].dtype == torch.float32
    picture = min((MINI_SD_FOLDER / "subject").glob("*.png"))
    (tmp_path / picture.name).write_bytes(picture.read_bytes())
    validate = validation_loss(
        model, read_subject(model, tmp_path, "a sks cat face emoji", small), 8
    )
    base = validate()
    training = TrainConfig(steps=4, learning_rate=3e-3, validate_every=4)
    run = run_training(
        model, subject, CalibrationConfig(effort="quick"), training, validate=validate
    )
    assert run.validations[0][1] < 0.97 * base
    assert run.validations[-1][1] < run.validations[0][1]
    assert all(
        f.up.dtype == torch.float32 and torch.isfinite(f.up).all() for f in run.lora.values()
    )
