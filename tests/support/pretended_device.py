"""A GPU that is not there: tensors say that they are on CUDA, on Apple's MPS or on Intel's XPU,
while their numbers stay on the CPU. They refuse to mix with the CPU's as real ones do; they refuse
float64, the factorisations that MPS lacks, and on CUDA those that it makes one by one.

    with pretended("mps") as device:
        load_checkpoint("mini-sd", device="mps")
    device.waits.total()

C++ is told of a meta device with a number, which autograd knows without a driver.
"""

from collections import Counter
from contextlib import contextmanager
from unittest.mock import patch

import torch
from torch.overrides import TorchFunctionMode
from torch.utils import checkpoint
from torch.utils._python_dispatch import TorchDispatchMode

CPU = torch.device("cpu")
NUMBER = {"cuda": 1, "mps": 2, "xpu": 3}
KIND = {number: kind for kind, number in NUMBER.items()}
IS_KIND = {getattr(torch.Tensor, f"is_{kind}").__get__: kind for kind in ("cpu", "meta", *NUMBER)}
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
# Of many matrices CUDA makes these one at a time, with a wait of the host for each.
ONE_BY_ONE = (
    "aten::_linalg_eigh",
    "aten::_linalg_svd",
    "aten::cholesky_inverse",
    "aten::linalg_qr",
)
FACTORISING = (
    *ONE_BY_ONE,
    "aten::_linalg_solve_ex",
    "aten::linalg_cholesky_ex",
    "aten::linalg_solve_triangular",
)


def kind_of(device):
    """The kind that is pretended where C++ says `device`; None of real ones."""
    device = torch.device(device)
    return KIND.get(device.index) if device.type == "meta" else None


class OnDevice(torch.Tensor):
    """A tensor of a pretended device; `host` has its numbers."""

    @staticmethod
    def __new__(cls, host, kind, requires_grad=False):
        made = torch.Tensor._make_wrapper_subclass(
            cls,
            host.size(),
            strides=host.stride(),
            storage_offset=host.storage_offset(),
            dtype=host.dtype,
            device=torch.device("meta", NUMBER[kind]),
            requires_grad=requires_grad,
        )
        made.host, made.kind = host, kind
        return made

    def __init__(self, host, kind, requires_grad=False):
        pass

    def __repr__(self):
        return f"OnDevice({tuple(self.shape)}, {self.dtype}, {self.kind})"

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if func == torch.Tensor.device.__get__:
            return torch.device(args[0].kind, 0)
        if func in IS_KIND:
            return args[0].kind == IS_KIND[func]
        if func is torch.Tensor.backward:  # its hooks need this function too
            return torch.autograd.backward(*args)
        if func == torch.Tensor.data.__set__:
            args[0].host = args[1].host
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return _dispatched(func, args, kwargs or {})


@contextmanager
def pretended(kind):
    """A device of this kind is there while the block runs."""
    checks = checkpoint._allowed_determinism_checks_to_fns
    # which compares devices, and sees C++'s name of it in one pass and ours in the other
    shape_alone = {"default": lambda x: {"shape": x.shape, "dtype": x.dtype}}
    card = {
        "mem_get_info": lambda device: (16e9, 24e9),
        "memory_allocated": lambda device: 0,
        "memory_reserved": lambda device: 0,
    }
    with (
        _Operations() as device,
        _Names(kind),
        patch.dict(checks, shape_alone),
        patch.multiple(torch.cuda, **card),
    ):
        yield device


class _Names(TorchFunctionMode):
    """What the program calls by the device's kind is the meta device with its number to C++."""

    def __init__(self, kind):
        super().__init__()
        self.kind = kind

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is torch.Tensor.backward:
            with self:  # hooks name devices too
                return torch.autograd.backward(*args)
        if func is not torch.device:
            named = getattr(func, "__name__", "") == "to"
            args = tuple(self._told(a, named) for a in args)
            kwargs = {key: self._told(a, key == "device") for key, a in kwargs.items()}
        return func(*args, **kwargs)

    def _told(self, value, named):
        if isinstance(value, torch.device) or (named and isinstance(value, str)):
            device = torch.device(value)
            return torch.device("meta", NUMBER[self.kind]) if device.type == self.kind else device
        return value


class _Operations(TorchDispatchMode):
    """`waits` counts what makes the host wait, copies to it included; `uploads` copies from it,
    for which it waits too."""

    def __init__(self):
        super().__init__()
        self.waits, self.uploads = Counter(), Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name, out = func._schema.name, _dispatched(func, args, kwargs or {})
        there = [isinstance(a, OnDevice) for a in (*args, *args[:1]) if torch.is_tensor(a)]
        to_host = name == "aten::_to_copy" and there[0] and not isinstance(out, OnDevice)
        to_host |= name == "aten::copy_" and there[1] and not there[0]
        if to_host or (name in WAITS and any(there)):
            self.waits[name] += 1
        uploaded = name == "aten::_to_copy" and not there[0] and isinstance(out, OnDevice)
        if uploaded or (name == "aten::copy_" and there[0] and not there[1]):
            self.uploads[name] += 1
        return out


def _dispatched(func, args, kwargs):
    name = func._schema.name
    device = kwargs.get("device")
    target = None if device is None else kind_of(device)
    here, there = [], {}

    def to_host(tensor):
        if not isinstance(tensor, OnDevice):
            here.append(tensor)
            return tensor
        there[id(tensor.host)] = tensor
        return tensor.host

    host_args = _each(args, to_host)
    host_kwargs = {key: _each(value, to_host) for key, value in kwargs.items()}
    if not there and target is None:
        return func(*args, **kwargs)
    kind = target or next(iter(there.values())).kind
    if device is not None:
        host_kwargs["device"] = CPU

    def to_device_again(tensor):  # what an operation in place returns is what it was given
        _refuse_float64(name, tensor.dtype)
        return there[id(tensor)] if id(tensor) in there else OnDevice(tensor, kind)

    if name == "aten::copy_":
        func(*host_args, **host_kwargs)
        return args[0]
    if name == "aten::_to_copy":  # between devices it changes the type at its start
        _refuse_float64(name, kwargs.get("dtype") or args[0].dtype)
        here.clear()
    if device is not None and target is None:
        return func(*host_args, **host_kwargs)
    if kwargs.get("generator") is not None:
        raise RuntimeError(f"{name}: expected a generator of the device, found one of the CPU")
    if kind != "cuda" and name in FACTORISING:
        raise NotImplementedError(f"{name}: {kind} has none")
    if kind == "cuda" and name in ONE_BY_ONE:
        raise NotImplementedError(f"{name}: {kind} makes one at a time")
    for tensor in here:
        if tensor.ndim and (name not in INDEXING or tensor.is_floating_point()):
            raise RuntimeError(f"{name}: expected all tensors on one device")
    return _each(func(*host_args, **host_kwargs), to_device_again)


def _each(values, change):
    """`change` of every tensor in nested lists and tuples."""
    if isinstance(values, (list, tuple)):
        return type(values)(_each(value, change) for value in values)
    return change(values) if isinstance(values, torch.Tensor) else values


def _refuse_float64(name, dtype):
    if dtype == torch.float64:
        raise TypeError(f"{name}: the device has no float64")
