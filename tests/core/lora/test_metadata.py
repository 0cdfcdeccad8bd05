"""What a LoRA file says of itself: what was done, in the words that readers look for."""

import json

import pytest
import torch

from cntlora_core.config import CalibrationConfig, TrainConfig
from cntlora_core.lora.adapter import Factors
from cntlora_core.lora.metadata import Source, Taught, describe

LORA = {"a.to_q": Factors(torch.ones(5, 2), torch.ones(2, 6))} | {
    "b.to_q": Factors(torch.ones(5, 3), torch.ones(3, 6))
}
TAUGHT = Taught(
    "sks", (("a sks cat, sitting", 1), ("a sks cat, indoors", 1), ("a dog", 10)), 768, "d"
)


def about(family="sd2-v", prediction="v", **more):
    return describe(
        LORA,
        **{
            "family": family,
            "prediction": prediction,
            "title": "cat",
            "model_name": "sd21",
            "taught": TAUGHT,
            "steps": 10,
            "calibration": CalibrationConfig(),
            "training": TrainConfig(learning_rate=1e-3),
        }
        | more,
    )


def test_readers_find_what_they_look_for():
    metadata = about()
    assert all(isinstance(v, str) for v in metadata.values())
    assert metadata["ss_v2"] == "True"
    assert metadata["ss_network_dim"] == "Dynamic"
    assert metadata["modelspec.architecture"] == "stable-diffusion-v2-768-v/lora"
    assert metadata["modelspec.trigger_phrase"] == "sks"
    assert json.loads(metadata["cntlora.ranks"]) == {"a.to_q": 2, "b.to_q": 3}


def test_tags_are_those_of_the_captions_by_repeats():
    metadata = about()
    assert json.loads(metadata["ss_tag_frequency"]) == {
        "1_sks": {"a sks cat": 2, "sitting": 1, "indoors": 1},
        "10_sks": {"a dog": 1},
    }
    (dataset,) = json.loads(metadata["ss_datasets"])
    counts = {s["num_repeats"]: s["img_count"] for s in dataset["subsets"]}
    assert counts == {1: 2, 10: 1}
    assert metadata["ss_num_train_images"] == "12"  # kohya counts repeats


@pytest.mark.parametrize(
    ("settings", "optimizer", "scheduler"),
    [
        ({}, "torch.optim.adamw.AdamW(weight_decay=0.01)", "constant"),
        (
            {"optimizer": "prodigy", "schedule": "cosine", "weight_decay": 0.0},
            "prodigyopt.prodigy.Prodigy(weight_decay=0.0)",
            "cosine",
        ),
        ({"warmup": 5}, "torch.optim.adamw.AdamW(weight_decay=0.01)", "constant_with_warmup"),
    ],
)
def test_optimizer_and_schedule_are_those_of_the_run(settings, optimizer, scheduler):
    metadata = about(training=TrainConfig(learning_rate=1e-3, **settings))
    assert metadata["ss_optimizer"] == optimizer
    assert metadata["ss_lr_scheduler"] == scheduler


def test_what_was_only_calibrated_tells_of_no_training():
    metadata = about(training=None, steps=0)
    assert not {"ss_optimizer", "ss_lr_scheduler", "ss_learning_rate", "cntlora.training"} & set(
        metadata
    )


@pytest.mark.parametrize(
    ("prediction", "word", "is_v", "zero"),
    [
        ("epsilon", "epsilon", "False", "False"),
        ("v", "v", "True", "False"),
        ("v + zero terminal SNR", "v", "True", "True"),
    ],
)
def test_the_prediction_type_is_the_schedules_not_the_familys(prediction, word, is_v, zero):
    metadata = about(family="sdxl", prediction=prediction)
    assert metadata["modelspec.prediction_type"] == word
    assert metadata["ss_v_parameterization"] == is_v
    assert metadata["ss_zero_terminal_snr"] == zero


def test_a_continued_lora_names_its_source(tmp_path):
    (tmp_path / "first.safetensors").write_bytes(b"abc")
    metadata = about(source=Source.of(tmp_path / "first.safetensors"))
    named = json.loads(metadata["cntlora.continued_from"])
    assert named["file"] == "first.safetensors"
    assert named["sha256"].startswith("ba7816bf")
    assert metadata["cntlora.init"] == "continued"
    assert "cntlora.calibration" not in metadata
    assert metadata["cntlora.origin"] == "target"  # of the calibration that it began with


@pytest.mark.parametrize("epoch", ["", "soon", "999999999999999999"])
def test_a_date_that_is_none_is_todays(monkeypatch, epoch):
    monkeypatch.setenv("SOURCE_DATE_EPOCH", epoch)
    assert about()["modelspec.date"] > "2020"


def test_the_date_can_be_set(monkeypatch):
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "86400")
    assert about()["modelspec.date"] == "1970-01-02"


def test_how_prompts_were_read_is_in_kohyas_words():
    read = about(clip_skip=2, max_tokens=225)
    assert (read["ss_clip_skip"], read["ss_max_token_length"]) == ("2", "225")
    read = about(max_tokens=75)
    assert (read["ss_clip_skip"], read["ss_max_token_length"]) == ("None", "None")
