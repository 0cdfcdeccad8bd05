"""Which pictures a node reads, and when: what validates was never fitted, nothing is encoded
twice."""

import pytest
import torch
from PIL import Image

FOLDER = "example: cat faces (embedded)"
SUBJECT = {"trigger": "sks", "class_name": "cat face emoji", "resolution": 0}
TRAIN = {
    "learning_rate": 3e-3,
    "seed": 0,
    "batch_size": 2,
    "validate_every": 0,
    "weight_decay": 0.01,
    "gradient_checkpointing": False,
    "sample_prompt": "",
}


@pytest.fixture(scope="module")
def pictures(pack):
    return pack.run(pack.SubjectImages, folder=FOLDER, **SUBJECT).values[0]


CALIBRATE = {
    "init": "target",
    "rank": 2,
    "rank_rule": "data",
    "seed": 0,
    "effort": "quick",
    "batch_size": 2,
    "targets": "auto",
    "preservation": 1.0,
    "gradient_checkpointing": False,
}


def test_what_validates_was_neither_calibrated_nor_trained_on(pack, model, pictures, monkeypatch):
    seen = {}

    def calibrate(model, subject, config, **options):
        seen["calibrated"] = subject.names
        return continued(gaussian(model, config))

    def train(model, subject, *args, **options):
        seen["trained"] = subject.names
        raise pack.host.Cancelled

    def validation(model, subject, batch_size, before_each):
        seen["validated"] = subject.names
        return lambda: 1.0

    from cntlora_pack.cntlora_core.calibration.calibrate import calibrate as real
    from cntlora_pack.cntlora_core.calibration.calibrate import continued
    from cntlora_pack.cntlora_core.run import runs

    def gaussian(model, config):
        plain = pack.train.CalibrationConfig(init="gaussian", rank=config.rank)
        return real(model, None, plain).lora

    monkeypatch.setattr(runs, "calibrate", calibrate)
    monkeypatch.setattr(runs, "train", train)
    monkeypatch.setattr(pack.train_inputs, "validation_loss", validation)
    options = TRAIN | {"validate_every": 1}
    for hold_out in (True, False):
        subject = pack.run(pack.SubjectImages, folder=FOLDER, hold_out=hold_out, **SUBJECT).values[
            0
        ]
        start = pack.run(pack.CalibrateLoRA, sd_model=model, subject=subject, **CALIBRATE).values[0]
        with pytest.raises(pack.host.Cancelled):
            pack.run(
                pack.TrainLoRA,
                sd_model=model,
                subject=subject,
                lora_init=start,
                steps=1,
                sample_every=0,
                **options,
            )
        assert seen["calibrated"] == seen["trained"]
        assert bool(set(seen["validated"]) & set(seen["calibrated"])) != hold_out


def test_a_picture_is_held_out_only_where_it_validates(pack, model, pictures, monkeypatch):
    seen = {}

    def train(model, subject, *args, **options):
        seen["trained"] = subject.names
        raise pack.host.Cancelled

    from cntlora_pack.cntlora_core.run import runs

    monkeypatch.setattr(runs, "train", train)
    others = pack.run(pack.SubjectImages, folder=FOLDER, **SUBJECT).values[0]

    def trained(**options):
        settings = {"sd_model": model, "subject": pictures, "steps": 1, "sample_every": 0}
        with pytest.raises(pack.host.Cancelled):
            pack.run(pack.TrainLoRA, **TRAIN | settings | options)
        return len(seen["trained"])

    every = len(pictures.pictures)
    assert trained(validate_every=1) == every - 1
    assert trained(validate_every=1, validation=others) == every
    assert trained(validate_every=0) == every


def test_pictures_are_encoded_once_beside_their_model(pack, folder, model, monkeypatch):
    calls = []
    real = pack.types.encode_subject

    def counted(model, pictures, *args, **options):
        calls.append(len(pictures))
        return real(model, pictures, *args, **options)

    monkeypatch.setattr(pack.types, "encode_subject", counted)

    def encoded():
        subject = pack.run(pack.SubjectImages, folder=folder.name, **SUBJECT).values[0]
        return subject.encode_all(model, lambda event: None)

    first, again = encoded(), encoded()
    assert calls == [1]
    assert torch.equal(first.mean[0], again.mean[0])
    assert first.names == again.names
    Image.new("RGB", (64, 64), "blue").save(folder / "a.png")
    assert not torch.equal(encoded().mean[0], first.mean[0])
    (folder / "a.txt").write_text("another caption")
    encoded()
    assert calls == [1, 1, 1]
