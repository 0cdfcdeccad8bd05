"""Every tensor is where its partners are. No accelerator is needed: tensors here say that they are
on a device of their own while their numbers stay on the CPU, refuse to mix with the CPU's as CUDA's
do, and refuse float64 as Apple's MPS does."""

import dataclasses
from collections import Counter

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from cntlora_core import config
from cntlora_core.calibration.calibrate import calibrate
from cntlora_core.config import CalibrationConfig, TrainConfig
from cntlora_core.data.class_images import class_images, class_noised
from cntlora_core.data.dataset import read_subject
from cntlora_core.devices import pick_device
from cntlora_core.errors import SettingError
from cntlora_core.lora.adapter import attached_lora
from cntlora_core.model.conditioning import encode_prompts
from cntlora_core.model.loader import MINI_SD_FOLDER, load_checkpoint
from cntlora_core.model.sampling import sample
from cntlora_core.run.runs import run_training
from cntlora_core.training.prior_loss import BasePrediction
from cntlora_core.training.validation import validation_loss

CPU, DEVICE = torch.device("cpu"), torch.device("meta")  # autograd knows `meta` as a device
# What makes the host wait until the device has done all that was asked of it.
WAITS = (
    "aten::_local_scalar_dense",
    "aten::_linalg_check_errors",
    "aten::equal",
    "aten::is_nonzero",
    "aten::masked_select",
    "aten::nonzero",
)
INDEXING = ("aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_")


class OnDevice(torch.Tensor):
    """A tensor of the pretended device; `host` has its numbers."""

    @staticmethod
    def __new__(cls, host, requires_grad=False):
        made = torch.Tensor._make_wrapper_subclass(
            cls,
            host.size(),
            strides=host.stride(),
            storage_offset=host.storage_offset(),
            dtype=host.dtype,
            device=DEVICE,
            requires_grad=requires_grad,
        )
        made.host = host
        return made

    def __init__(self, host, requires_grad=False):
        pass

    def __repr__(self):
        return f"OnDevice({tuple(self.shape)}, {self.dtype})"

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if func is torch.Tensor.backward:  # its hooks need this function too
            return torch.autograd.backward(*args)
        if func == torch.Tensor.data.__set__:
            args[0].host = args[1].host
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return dispatched(func, args, kwargs or {})


class PretendedDevice(TorchDispatchMode):
    """`waits` counts what makes the host wait, copies to it included."""

    def __init__(self):
        super().__init__()
        self.waits = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name, out = func._schema.name, dispatched(func, args, kwargs or {})
        there = [isinstance(a, OnDevice) for a in (*args, *args[:1]) if torch.is_tensor(a)]
        to_host = name == "aten::_to_copy" and there[0] and not isinstance(out, OnDevice)
        to_host |= name == "aten::copy_" and there[1] and not there[0]
        if to_host or (name in WAITS and any(there)):
            self.waits[name] += 1
        return out


def each(values, change):
    """`change` of every tensor in nested lists and tuples."""
    if isinstance(values, (list, tuple)):
        return type(values)(each(value, change) for value in values)
    return change(values) if isinstance(values, torch.Tensor) else values


def refuse_float64(name, dtype):
    if dtype == torch.float64:
        raise TypeError(f"{name}: the device has no float64")


def dispatched(func, args, kwargs):
    name, device = func._schema.name, kwargs.get("device")
    to_device = device is not None and torch.device(device).type == DEVICE.type
    here, there = [], {}

    def to_host(tensor):
        if not isinstance(tensor, OnDevice):
            here.append(tensor)
            return tensor
        there[id(tensor.host)] = tensor
        return tensor.host

    def to_device_again(tensor):  # what an operation in place returns is what it was given
        refuse_float64(name, tensor.dtype)
        return there[id(tensor)] if id(tensor) in there else OnDevice(tensor)

    host_args = each(args, to_host)
    host_kwargs = {key: each(value, to_host) for key, value in kwargs.items()}
    if device is not None:
        host_kwargs["device"] = CPU
    if name == "aten::copy_":
        func(*host_args, **host_kwargs)
        return args[0]
    if (
        name == "aten::_to_copy"
    ):  # a copy between devices that changes the type does so at its start
        if there or to_device:
            refuse_float64(name, kwargs.get("dtype") or args[0].dtype)
        copy = func(*host_args, **host_kwargs)
        return OnDevice(copy) if to_device or (device is None and there) else copy
    if not there and not to_device:
        return func(*args, **kwargs)
    if kwargs.get("generator") is not None:
        raise RuntimeError(f"{name}: expected a generator of the device, found one of the CPU")
    for tensor in here:
        if tensor.ndim and (name not in INDEXING or tensor.is_floating_point()):
            raise RuntimeError(f"{name}: expected all tensors on one device")
    return each(func(*host_args, **host_kwargs), to_device_again)


def on_device(model, device):
    """The model there, and a picture that it encoded."""
    nn.Module.to(model.unet, device)
    model = dataclasses.replace(model, device=device)
    subject = read_subject(model, MINI_SD_FOLDER / "heldout", "a sks cat face emoji")
    return model, subject.only([0])


def whole_path(model, device):
    """Encode, draw, calibrate, validate, train with every option, draw. Losses and pictures."""
    model, subject = on_device(model, device)
    drawn = class_images(model, "a cat", count=1, steps=1)
    config = CalibrationConfig(batch_size=1)
    start = calibrate(model, subject, config, prior=class_noised(model, drawn))
    training = TrainConfig(
        steps=1,
        batch_size=1,
        learning_rate=1e-3,
        noise_offset=0.05,
        min_snr_gamma=5.0,
        caption_dropout=0.5,
        validate_every=1,
    )
    run = run_training(
        model,
        subject,
        config,
        training,
        start=start,
        prior=BasePrediction(encode_prompts(model, ["a cat"])),
        validate=validation_loss(model, subject, 8),
    )
    with attached_lora(model.unet, run.lora):
        (picture,) = sample(model, ["a sks cat"], [0], steps=1)
    losses = [start.report.base_loss, start.report.loss, *(loss for _, loss in run.validations)]
    return losses, picture


def test_the_whole_path_keeps_to_its_device(monkeypatch):
    monkeypatch.setitem(config.EFFORTS, "balanced", (1, 1))  # batches of sweep and refinement
    expected, same = whole_path(load_checkpoint("mini-sd"), CPU)
    model = load_checkpoint("mini-sd")  # what loading does on `meta` is not pretended
    with PretendedDevice():
        losses, picture = whole_path(model, DEVICE)
    assert losses == pytest.approx(expected, rel=1e-4)
    assert losses[-1] != losses[-2]
    assert np.abs(np.asarray(picture, float) - np.asarray(same, float)).max() <= 2


def test_a_training_step_waits_for_the_device_once():
    """Each wait empties the queue of a GPU, which then idles until it is filled again."""
    model = load_checkpoint("mini-sd")
    with PretendedDevice() as device:
        model, subject = on_device(model, DEVICE)
        every_option = TrainConfig(
            steps=2,
            learning_rate=1e-3,
            batch_size=1,
            accumulation=2,
            noise_offset=0.05,
            min_snr_gamma=5.0,
            caption_dropout=0.5,
            validate_every=0,
        )
        waits = []
        run_training(
            model,
            subject,
            CalibrationConfig(init="gaussian"),
            every_option,
            prior=BasePrediction(encode_prompts(model, ["a cat"])),
            observer=lambda event: waits.append(device.waits.total()),
        )
    assert waits[-1] - waits[-2] == 1


def test_the_pretended_device_refuses_what_real_ones_refuse():
    with PretendedDevice():
        x = torch.ones(2, device=DEVICE)
        assert (x + 1).sum().item() == 4
        with pytest.raises(RuntimeError, match="one device"):
            x + torch.ones(2)
        with pytest.raises(RuntimeError, match="generator"):
            torch.rand(2, device=DEVICE, generator=torch.Generator())
        with pytest.raises(TypeError, match="float64"):
            x.double()
        with pytest.raises(TypeError, match="float64"):
            x.to(CPU, torch.float64)


def test_a_device_that_is_not_there_is_named():
    assert pick_device("cpu") == CPU
    with pytest.raises(SettingError, match="'nonsense' is not available here"):
        pick_device("nonsense")
