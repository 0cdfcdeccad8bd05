"""Every tensor is where its partners are, on whichever device. No accelerator is needed: the
devices are pretended (tests/support/pretended_device.py). `pytest -m gpu` takes a real one."""

import contextlib
import dataclasses
import functools
import tempfile
import weakref
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
import torch
from pretended_device import NUMBER, pretended

from cntlora_core import config, devices
from cntlora_core.config import CalibrationConfig, TrainConfig
from cntlora_core.data.class_images import class_images, class_noised
from cntlora_core.data.dataset import read_subject
from cntlora_core.devices import DTYPES, first_that_fits, halved, memory_sufficing, pick_device
from cntlora_core.errors import OutOfMemory, SettingError
from cntlora_core.lora.adapter import attached_lora
from cntlora_core.lora.file import load_lora
from cntlora_core.lora.targets import ALL, find_projections
from cntlora_core.model.conditioning import encode_prompts
from cntlora_core.model.loader import MINI_SD_FOLDER, load_checkpoint
from cntlora_core.model.sampling import sample
from cntlora_core.run.runs import run_calibration, run_training
from cntlora_core.run.saving import save_run
from cntlora_core.training.prior_loss import BasePrediction
from cntlora_core.training.validation import validation_loss

EVERY_OPTION = TrainConfig(
    steps=1,
    batch_size=1,
    accumulation=2,
    learning_rate=1e-3,
    noise_offset=0.05,
    min_snr_gamma=5.0,
    caption_dropout=0.5,
    validate_every=1,
)


def loaded(device, precision):
    """The model there, and a picture that it encoded."""
    dtype = DTYPES.get(precision, torch.float32)
    model = load_checkpoint("mini-sd", device=device, dtype=dtype, eight_bits=precision == "int8")
    subject = read_subject(model, MINI_SD_FOLDER / "heldout", "a sks cat face emoji")
    return model, subject.only([0])


def whole_path(folder, device, precision, trainings):
    """Load, encode, draw, calibrate, train, save, draw from the file. Losses and the picture."""
    model, subject = loaded(device, precision)
    drawn = class_images(model, "a cat", count=1, steps=1)
    calibration = CalibrationConfig(batch_size=1, targets="attention+ff+conv")
    start = run_calibration(model, subject, calibration, preserve=class_noised(model, drawn))
    losses = [start.report.base_loss, start.report.loss]
    for training in trainings:
        run = run_training(
            model,
            subject,
            calibration,
            training,
            start=start,
            prior=BasePrediction(encode_prompts(model, ["a cat"])),
            validate=validation_loss(model, subject, 8),
        )
        losses += [loss for _, loss in run.validations]
    file = save_run(
        folder / f"{device}.safetensors",
        run.lora,
        model,
        subject,
        steps=run.steps,
        calibration=calibration,
    )
    lora, _ = load_lora(file, find_projections(model.unet, ALL), model.family)
    with attached_lora(model.unet, lora):
        (picture,) = sample(model, ["a sks cat"], [0], steps=1)
    return losses, np.asarray(picture, float)


@functools.cache
def on_the_cpu(precision, trainings):
    with tempfile.TemporaryDirectory() as folder:
        return whole_path(Path(folder), "cpu", precision, trainings)


def compare(folder, kind, precision, *trainings, device=pretended, rel=3e-4):
    """With the same path on the CPU."""
    expected, same = on_the_cpu(precision, trainings)
    with device(kind):
        losses, picture = whole_path(folder, kind, precision, trainings)
    assert losses == pytest.approx(expected, rel=rel if precision == "fp32" else 2e-2)
    assert losses[-1] != losses[-2]
    assert np.abs(picture - same).max() <= (2 if precision == "fp32" else 8)


@pytest.fixture
def brief(monkeypatch):
    """One batch of a sweep, one of the steps after it."""
    monkeypatch.setitem(config.EFFORTS, "balanced", (1, 1))


def test_the_whole_path_keeps_to_its_device(brief, tmp_path):
    recomputing = dataclasses.replace(EVERY_OPTION, gradient_checkpointing=True)
    compare(tmp_path, "mps", "fp32", recomputing)


NATURAL = dataclasses.replace(EVERY_OPTION, optimizer="natural")
ADAMW = dataclasses.replace(EVERY_OPTION, optimizer="adamw", gradient_checkpointing=True)


@pytest.mark.pretended
@pytest.mark.parametrize("kind", NUMBER)
@pytest.mark.parametrize("precision", [*DTYPES, "int8"])
def test_every_step_on_every_device(brief, tmp_path, precision, kind):
    compare(tmp_path, kind, precision, NATURAL, ADAMW)


@pytest.mark.gpu
@pytest.mark.parametrize("precision", [*DTYPES, "int8"])
def test_every_step_on_a_gpu(brief, tmp_path, precision):
    compare(tmp_path, "cuda", precision, NATURAL, ADAMW, device=contextlib.nullcontext, rel=2e-3)


def test_a_training_step_waits_for_the_device_once():
    """Each wait empties the queue of a GPU, which then idles until it is filled again."""
    with pretended("cuda") as device:
        model, subject = loaded("cuda", "fp32")
        waits = []
        run_training(
            model,
            subject,
            CalibrationConfig(init="gaussian"),
            dataclasses.replace(EVERY_OPTION, steps=2, validate_every=0),
            prior=BasePrediction(encode_prompts(model, ["a cat"])),
            observer=lambda event: waits.append(device.waits.total()),
        )
    assert waits[-1] - waits[-2] == 1


def test_the_pretended_device_refuses_what_real_ones_refuse():
    with pretended("mps"):
        x = torch.ones(2, device="mps")
        assert x.device == torch.device("mps", 0)
        assert (x + 1).sum().item() == 4
        with pytest.raises(RuntimeError, match="one device"):
            x + torch.ones(2)
        with pytest.raises(RuntimeError, match="generator"):
            torch.rand(2, device="mps", generator=torch.Generator())
        with pytest.raises(TypeError, match="float64"):
            x.double()
        with pytest.raises(TypeError, match="float64"):
            x.to("cpu", torch.float64)
        with pytest.raises(NotImplementedError, match="mps has none"):
            torch.linalg.qr(x[:, None])


def test_a_device_that_is_not_there_is_named():
    assert pick_device("cpu") == torch.device("cpu")
    with pytest.raises(SettingError, match="'nonsense' is not available here"):
        pick_device("nonsense")


WAYS = {"large": 3 * 10**9, "middle": 2 * 10**9, "small": 10**9}


def tried_until(fits, error=torch.OutOfMemoryError, free=None):
    """The ways that were tried; those before `fits` raise `error`."""
    tried = []

    def run(way):
        tried.append(way)
        if way != fits:
            raise error
        return way

    with patch.object(devices, "free_memory", lambda device: free):
        assert first_that_fits(WAYS, run, torch.device("cpu")) == fits
    return tried


def test_the_first_way_that_fits_is_taken():
    assert halved(5) == [5, 2, 1]
    assert tried_until("large") == ["large"]
    assert tried_until("small") == list(WAYS)
    assert tried_until("small", free=3 * 10**9) == ["middle", "small"]
    assert tried_until("small", free=0) == ["small"], "whatever the estimate says"


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"),
        RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 8 bytes"),
        RuntimeError("MPS backend out of memory (MPS allocated: 17.6 GB)"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    ],
    ids=["host", "Linux", "Windows", "MPS", "cuBLAS"],
)
def test_want_of_memory_has_many_words(error):
    assert tried_until("middle", error) == ["large", "middle"]
    with (
        pytest.raises(OutOfMemory, match=r"of cpu did not suffice\. Next to try: less\."),
        memory_sufficing(torch.device("cpu"), "less"),
    ):
        raise error


def test_other_errors_are_no_want_of_memory():
    with pytest.raises(RuntimeError, match="shape"):
        tried_until("small", RuntimeError("shape mismatch"))


def test_a_way_that_failed_has_given_its_memory_back():
    """The traceback's frames would keep the tensors that filled it."""
    held = []

    def run(way):
        filling = torch.ones(1)
        alive = [ref() is not None for ref in held]
        held.append(weakref.ref(filling))
        if way != "small":
            raise torch.OutOfMemoryError
        return alive

    assert first_that_fits(WAYS, run, torch.device("cpu")) == [False, False]
