"""The graph's nodes on devices that are pretended, inside ComfyUI's inference mode."""

import sys

import pytest
import torch
from pretended_device import pretended

FOLDER = "example: cat faces (embedded)"


@pytest.mark.pretended
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16", "int8"])
@pytest.mark.parametrize("kind", ["cuda", "mps", "xpu"])
def test_every_node_in_inference_mode(pack, monkeypatch, kind, precision):
    """Load, encode, calibrate, train, save, draw: twice, since what was moved back to the host in
    inference mode could not be trained again."""
    management = sys.modules["comfy.model_management"]
    monkeypatch.setattr(management, "get_torch_device", lambda: torch.device(kind))
    monkeypatch.setattr(management, "is_device_cpu", lambda device: False)
    efforts = sys.modules["cntlora_pack.cntlora_core.config"].EFFORTS
    monkeypatch.setitem(efforts, "balanced", (1, 1))
    real = pack.sampler.sample
    monkeypatch.setattr(pack.sampler, "sample", lambda *a, **k: real(*a, **k | {"steps": 1}))
    words = {"trigger": "sks", "class_name": "cat", "resolution": 64}
    with pretended(kind):
        model = pack.run(
            pack.LoadCheckpoint, checkpoint="mini-sd (embedded)", precision=precision
        ).values[0]
        subject = pack.run(pack.SubjectImages, folder=FOLDER, **words).values[0]
        inputs = {"sd_model": model, "subject": subject}
        for _ in range(2):
            start = pack.run(pack.CalibrateLoRA, **inputs).values[0]
            trained = pack.run(
                pack.TrainLoRA,
                **inputs,
                lora_init=start,
                steps=1,
                batch_size=1,
                validate_every=1,
                sample_every=1,
            ).values
        (preview, *_) = pack.run(
            pack.PreviewLoRA, sd_model=model, lora=trained[0], prompt="a sks cat", count=1, steps=1
        ).values
    assert all(torch.isfinite(v).all() for v in trained[0].values())
    assert torch.isfinite(preview).all()
