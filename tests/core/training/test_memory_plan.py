"""What a run does about the memory there is."""

import dataclasses
import re
from types import SimpleNamespace

import pytest
import torch

from cntlora_core.calibration import second_moment, sketch
from cntlora_core.calibration.calibrate import continued
from cntlora_core.config import CalibrationConfig, TrainConfig
from cntlora_core.devices import GROWTH, free_memory
from cntlora_core.events import Notice, Status
from cntlora_core.lora.targets import find_projections
from cntlora_core.model.families import config_of
from cntlora_core.model.loader import load_checkpoint
from cntlora_core.model.single_file import empty_unet
from cntlora_core.model.vae_tiles import DECODE_BYTES, ENCODE_BYTES
from cntlora_core.run.runs import run_training
from cntlora_core.training import memory_plan
from cntlora_core.training.memory_estimate import (
    Adapted,
    estimate_training_memory,
    meta_lora,
    unet_calibration_memory,
)
from cntlora_core.training.memory_plan import (
    NEEDS,
    Bytes,
    describe_needs,
    fitted_calibration,
    fitted_training,
    picture_bytes,
    plan_memory,
)

GB = 10**9
ASKED = {"batch_size": 4, "accumulation": 2, "gradient_checkpointing": False}


@pytest.mark.parametrize(
    ("free", "expected"),
    [
        (17, (False, 4, 2)),  # as asked: 1 + 4 * 4 GB
        (16, (True, 4, 2)),
        (5, (True, 4, 2)),  # 1 + 4 * 1 GB
        (4, (True, 2, 4)),
        (2, (True, 1, 8)),
    ],
)
def test_the_first_way_that_fits_is_taken(free, expected):
    plan = plan_memory(free * GB, Bytes(GB, 4 * GB), Bytes(GB, GB), **ASKED)
    assert (plan.gradient_checkpointing, plan.batch_size, plan.accumulation) == expected
    assert plan.fits
    assert "too little" not in str(plan)


def test_copies_of_weights_are_counted_where_they_stay():
    plan = plan_memory(17 * GB, Bytes(2 * GB, 4 * GB), Bytes(GB, GB), **ASKED)
    assert (plan.gradient_checkpointing, plan.needed) == (True, 5 * GB)


def test_what_never_fits_is_tried_as_small_as_can_be_and_said():
    plan = plan_memory(GB, Bytes(GB, 4 * GB), Bytes(GB, GB), **ASKED)
    assert (plan.batch_size, plan.accumulation, plan.fits) == (1, 8, False)
    assert str(plan) == (
        "1.0 GB of memory free: gradient checkpointing on, batch 1 x 8, about 2.0 GB beside the "
        "model. That may be too little: try a lower resolution."
    )


def test_a_calibration_that_does_not_fit_looks_at_a_batch_one_by_one(mini_sd, monkeypatch):
    monkeypatch.setattr(memory_plan, "picture_bytes", lambda model, resolution: (4 * GB, GB))
    asked = CalibrationConfig(batch_size=2)

    def fitted(free):
        monkeypatch.setattr(memory_plan, "free_memory", lambda device: free * GB)
        return fitted_calibration(mini_sd, asked, 64, lambda event: None)

    recomputing = dataclasses.replace(asked, gradient_checkpointing=True)
    assert fitted(20) == (asked, 2)
    assert fitted(5) == (recomputing, 2)
    assert fitted(2) == (recomputing, 1)


@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_a_picture_takes_its_places_share(mini_sd, family):
    class UNet:
        class config:
            block_out_channels = config_of(family)["unet"]["block_out_channels"]

    model = dataclasses.replace(mini_sd, family=family, unet=UNet, dtype=torch.bfloat16)
    places = (512 // model.vae_scale) ** 2
    needs = NEEDS[family]
    assert picture_bytes(model, 512) == (places * needs.plain, places * needs.checkpointed)
    full = dataclasses.replace(model, dtype=torch.float32)
    twice = (2 * places * needs.plain, 2 * places * needs.checkpointed)
    assert picture_bytes(full, 512) == twice


def test_nothing_is_changed_where_nothing_is_known(mini_sd):
    assert picture_bytes(mini_sd, 64) is None  # not of its family's shape
    assert free_memory(torch.device("cpu")) is None
    events, asked = [], TrainConfig()
    assert fitted_training(mini_sd, asked, continued({}), 64, events.append) is asked
    start = CalibrationConfig()
    assert fitted_calibration(mini_sd, start, 64, events.append) == (start, start.batch_size)
    assert not events


def test_a_run_fits_itself_and_says_so(mini_sd, subject, monkeypatch):
    """The pictures of a step stay the same, so the LoRA does too."""
    monkeypatch.setattr(memory_plan, "picture_bytes", lambda model, resolution: (4 * GB, GB))
    plain = CalibrationConfig(init="gaussian", batch_size=2)
    asked = TrainConfig(steps=1, learning_rate=1e-2, batch_size=2, validate_every=0)

    def run(free):
        monkeypatch.setattr(memory_plan, "free_memory", lambda device: free)
        events = []
        result = run_training(mini_sd, subject, plain, asked, observer=events.append)
        told = [e for e in events if isinstance(e, (Notice, Status)) and "GB" in e.text]
        return result.lora, told

    large, told = run(100 * GB)
    assert [type(event) for event in told] == [Status, Status]  # calibration, training
    assert "checkpointing off, batch 2 x 1" in told[1].text
    small, told = run(int(2.5 * GB))
    assert [type(event) for event in told] == [Notice, Notice]
    assert "checkpointing on, batch 1 x 2" in told[1].text
    for name, factors in large.items():
        torch.testing.assert_close(small[name].up, factors.up, rtol=1e-3, atol=1e-4)


def test_several_processes_run_as_the_one_with_least_memory_can(mini_sd, monkeypatch):
    class Group:
        rank, size = 0, 2

        def sum_(self, tensors):
            tensors[0][1:] = 3.5 * GB

    monkeypatch.setattr(memory_plan, "picture_bytes", lambda model, resolution: (4 * GB, GB))
    monkeypatch.setattr(memory_plan, "free_memory", lambda device: 100 * GB)
    asked, told = TrainConfig(steps=1, learning_rate=1e-3, batch_size=2), []
    plan = fitted_training(mini_sd, asked, continued({}), 64, told.append, Group())
    assert plan == dataclasses.replace(asked, gradient_checkpointing=True)
    assert told[0].text.startswith("3.5 GB of memory free")
    assert fitted_calibration(mini_sd, CalibrationConfig(), 64, told.append, Group())[1] == 2


def test_a_timed_calibration_says_how_long_the_training_takes(mini_sd, monkeypatch):
    """A calibration took 24 seconds for 8 passes forward and 2 back, which take twice as long."""
    monkeypatch.setattr(memory_plan, "picture_bytes", lambda model, resolution: (GB, GB))
    monkeypatch.setattr(memory_plan, "free_memory", lambda device: 100 * GB)
    report = dataclasses.replace(
        continued({}).report, forward_passes=8, backward_passes=2, seconds=24.0
    )
    start = dataclasses.replace(continued({}), report=report)
    config, told = TrainConfig(steps=90, batch_size=2, accumulation=2), []
    assert fitted_training(mini_sd, config, start, 64, told.append) == config
    assert told[0].text.endswith(", about 36 min without samples.")  # 90 x 4 x 3 x 2 s
    fitted_training(mini_sd, config, start, 64, told.append, prior=True)
    assert "about 72 min" in told.pop().text
    fitted_training(mini_sd, dataclasses.replace(config, steps=1), start, 64, told.append)
    assert told[1].text.endswith(", about 1 min without samples.")
    fitted_training(mini_sd, config, continued({}), 64, told.append)
    assert told[2].text.endswith("beside the model.")


def test_what_the_metadata_say_is_what_ran(mini_sd, subject, monkeypatch):
    monkeypatch.setattr(memory_plan, "picture_bytes", lambda model, resolution: (4 * GB, GB))
    monkeypatch.setattr(memory_plan, "free_memory", lambda device: int(2.5 * GB))
    asked = TrainConfig(
        steps=1, learning_rate=1e-2, batch_size=2, validate_every=0, optimizer="adamw"
    )
    run = run_training(mini_sd, subject, CalibrationConfig(init="gaussian"), asked)
    assert run.training == dataclasses.replace(
        asked, batch_size=1, accumulation=2, gradient_checkpointing=True
    )


def test_info_says_what_the_families_take():
    needs = describe_needs()
    assert needs["sdxl 1024 px with gradient checkpointing"] == "5.8 GB"
    assert float(needs["sdxl 1024 px"].split()[0]) > 11


@pytest.mark.slow
@pytest.mark.parametrize(("family", "resolution", "most"), [("sd1", 512, 4.0), ("sdxl", 1024, 7.8)])
def test_the_families_train_and_calibrate_on_small_cards(family, resolution, most):
    """Attention and feed-forward of rank 16, one picture at a time."""
    estimate = unet_calibration_memory(
        config_of(family)["unet"],
        Adapted(resolution // 8, 1, 16, "attention+ff", torch.bfloat16, True, "cuda"),
    )
    assert estimate.peak / 1e9 < most


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize(("family", "resolution"), [("sd1", 512), ("sd2-v", 768), ("sdxl", 1024)])
def test_the_table_is_what_shapes_say(family, resolution, checkpointing):
    estimate = estimate_training_memory(
        family,
        resolution=resolution,
        dtype=torch.bfloat16,
        gradient_checkpointing=checkpointing,
    )
    needs = NEEDS[family]
    each = needs.checkpointed if checkpointing else needs.plain
    assert needs.weights == estimate.weights
    assert (resolution // 8) ** 2 * each == pytest.approx(estimate.activations, rel=0.01)


# What the allocator of an H100 or an H200 took at the peak of calibrations (batch 2) and of AdamW
# steps (by batch), the UNet included, GB; rank 4, bf16, when metrics were of rank 32 and sketches
# of 26 directions. The card's memory, GB: on the smallest with gradient checkpointing.
TAKEN = [
    ("sd1", 80, 512, (3.95, 4.17), {1: 2.78, 2: 3.80, 4: 5.73}),
    ("sdxl", 80, 1024, (20.47, 20.62, 21.30), {1: 12.41, 2: 19.20, 4: 32.73}),
    ("sdxl", 5.8, 1024, (), {2: 7.10}),
]


@pytest.mark.parametrize(("family", "gb", "resolution", "calibrations", "steps"), TAKEN)
def test_the_plan_is_what_a_card_was_measured_to_take(
    mini_sd, family, gb, resolution, calibrations, steps, monkeypatch
):
    unet, told = empty_unet(config_of(family)["unet"]), []
    model = dataclasses.replace(
        mini_sd,
        family=family,
        unet=unet,
        dtype=torch.bfloat16,
        pictures=SimpleNamespace(scale=8),
    )
    monkeypatch.setattr(memory_plan, "free_memory", lambda device: gb * GB)
    monkeypatch.setattr(second_moment, "WIDE_RANK", 32)
    monkeypatch.setattr(sketch, "OVERSAMPLING", 18)

    def planned():
        """The allocator knows nothing of the framework's own."""
        beside = float(re.search(r"([\d.]+) GB beside", told[-1].text)[1])
        return beside + (NEEDS[family].weights - GROWTH) / GB

    config = CalibrationConfig(rank=4, targets="attention+ff")
    fitted_calibration(model, config, resolution, told.append)
    for taken in calibrations:
        assert planned() == pytest.approx(taken, rel=0.1)
    attention = find_projections(unet, "attention")
    start = continued(meta_lora(attention, 4))
    for batch, taken in steps.items():
        fitted_training(model, TrainConfig(batch_size=batch), start, resolution, told.append)
        assert planned() == pytest.approx(taken, rel=0.1)


def test_the_vae_is_what_a_card_was_measured_to_hold():
    """GB at the peak, beside the UNet and the VAE: four pictures encoded, one decoded."""
    for side, encoding, decoding in ((512, 3.26, 1.33), (1024, 13.05, 5.27)):
        assert 4 * side**2 * ENCODE_BYTES / GB == pytest.approx(encoding, rel=0.02)
        assert side**2 * DECODE_BYTES / GB == pytest.approx(decoding, rel=0.02)


def test_the_next_thing_to_try_is_a_smaller_precision(mini_sd, monkeypatch):
    monkeypatch.setattr(memory_plan, "picture_bytes", lambda model, resolution: (4 * GB, GB))
    monkeypatch.setattr(memory_plan, "free_memory", lambda device: GB)

    def advice(model):
        told = []
        fitted_calibration(model, CalibrationConfig(), 64, told.append)
        return told[0].text.split("try ")[1]

    half = dataclasses.replace(mini_sd, dtype=torch.bfloat16)
    assert advice(mini_sd) == "precision bf16."
    assert advice(half) == "precision int8."
    assert advice(dataclasses.replace(half, lender=lambda: None)) == "a lower resolution."
    assert advice(load_checkpoint("mini-sd", eight_bits=True)) == "a lower resolution."
