"""Tensors of a file on disk, one at a time: headers first, weights only when asked for."""

from __future__ import annotations

import json
import os
import pickle
import struct
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..errors import CheckpointError

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
MAX_HEADER = 100_000_000  # bytes, the format's own limit
# Numbers that are converted at once: whole tensors given back would leave holes in the memory.
PIECE = 1 << 16
STARTS = (
    (b"<", "a web page saved under a model's name"),
    (b"version https://git-lfs", "a Git LFS pointer: the real file was not downloaded"),
    (b"GGUF", "a GGUF file, which is quantised and cannot be trained"),
    (b"PK\x03\x04", "a pickled checkpoint or zip archive under another ending"),
    (b"\x80\x02", "a pickled checkpoint under another ending"),
    (b"{", "a JSON file"),
)


class TensorSource(Protocol):
    """A file of named tensors."""

    path: Path
    shapes: dict[str, tuple[int, ...]]
    dtypes: dict[str, torch.dtype]
    metadata: dict[str, str]

    def read(self, name: str, dtype: torch.dtype | None = None) -> Tensor:
        """The tensor on the CPU, in `dtype` or the file's own."""
        ...


class SafetensorsFile:
    """A .safetensors file. A tensor wanted as it is stored is mapped: no copy, and nothing is read
    before it is used. One that must be converted is read plainly, because the pages of a map would
    stay in memory beside the copy.

    Raises CheckpointError for a file that is none, or not whole."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self.size = self.path.stat().st_size
        with self.path.open("rb") as file:
            start = file.read(64)
            self._refuse_foreign(start)
            (length,) = struct.unpack("<Q", start[:8])
            if not 2 <= length <= min(MAX_HEADER, self.size - 8):
                raise CheckpointError(
                    f"'{self.path.name}' is not a safetensors file, or it is cut off: its header "
                    "is damaged."
                )
            file.seek(8)
            self._parse(file.read(length))
        self.data = 8 + length
        needed = self.data + max(
            (entry["data_offsets"][1] for entry in self.header.values()), default=0
        )
        if self.size < needed:
            raise CheckpointError(
                f"'{self.path.name}' is cut off: {self.size:,} of {needed:,} bytes. Download it "
                "again."
            )
        try:
            self.mapped = safe_open(self.path, framework="pt")
        except SafetensorError as error:
            raise CheckpointError(
                f"'{self.path.name}' is not a safetensors file: {error}."
            ) from error

    def _refuse_foreign(self, start: bytes) -> None:
        if len(start) < 10:
            raise CheckpointError(
                f"'{self.path.name}' is empty ({self.size} bytes). Download it again."
            )
        for magic, what in STARTS:
            if start.lstrip(b"\xef\xbb\xbf \r\n\t").startswith(magic) and start[8:9] != b"{":
                raise CheckpointError(f"'{self.path.name}' is {what}.")

    def _parse(self, raw: bytes) -> None:
        try:
            header = json.loads(raw)
            metadata = header.pop("__metadata__", None) or {}
            self.metadata = {k: v for k, v in metadata.items() if isinstance(v, str)}
            self.header: dict[str, dict] = header
            self.shapes = {name: tuple(entry["shape"]) for name, entry in header.items()}
            stored = {name: str(entry["dtype"]) for name, entry in header.items()}
            for entry in header.values():
                start, end = entry["data_offsets"]
                if any(type(n) is not int for n in (start, end, *entry["shape"])):
                    raise ValueError("no numbers")
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise CheckpointError(
                f"'{self.path.name}' is not a safetensors file: its header is damaged."
            ) from error
        for name, dtype in stored.items():
            if dtype not in DTYPES:
                raise CheckpointError(
                    f"'{self.path.name}' keeps '{name}' as {dtype}: a model quantised that far is "
                    "not trained. Use the file in fp16, bf16 or fp8."
                )
        self.dtypes = {name: DTYPES[dtype] for name, dtype in stored.items()}

    def read(self, name: str, dtype: torch.dtype | None = None) -> Tensor:
        entry = self.header[name]
        if dtype in (None, DTYPES[entry["dtype"]]):
            return self.mapped.get_tensor(name)
        tensor, kept = torch.empty(entry["shape"], dtype=dtype), DTYPES[entry["dtype"]]
        buffer = torch.empty(PIECE * kept.itemsize, dtype=torch.uint8)
        with self.path.open("rb") as file:
            file.seek(self.data + entry["data_offsets"][0])
            for part in tensor.view(-1).split(PIECE):
                raw = buffer[: part.numel() * kept.itemsize]
                file.readinto(raw.numpy().data)
                part.copy_(raw.view(kept))
        return tensor


class TensorFiles:
    """Files in .safetensors that hold a part each, as one."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self.path = paths[0]
        files = [SafetensorsFile(path) for path in paths]
        self.holding = {name: file for file in files for name in file.shapes}
        self.shapes = {name: file.shapes[name] for name, file in self.holding.items()}
        self.dtypes = {name: file.dtypes[name] for name, file in self.holding.items()}
        self.metadata: dict[str, str] = {}

    def read(self, name: str, dtype: torch.dtype | None = None) -> Tensor:
        return self.holding[name].read(name, dtype)


class PickledFile:
    """A .ckpt or .pt file, read by torch's restricted unpickler: weights, never code."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        mapped = zipfile.is_zipfile(self.path)  # what torch wrote before was no archive
        try:
            content = torch.load(self.path, map_location="cpu", weights_only=True, mmap=mapped)
        except (
            pickle.UnpicklingError,
            RuntimeError,
            EOFError,
            ValueError,
            AttributeError,
            KeyError,
        ) as error:
            raise CheckpointError(
                f"'{self.path.name}' cannot be read without running code it holds, or it is "
                "damaged. Use a .safetensors file instead."
            ) from error
        state = content.get("state_dict", content) if isinstance(content, dict) else {}
        state = state if isinstance(state, dict) else {}
        self.tensors = {
            k: v for k, v in state.items() if isinstance(k, str) and isinstance(v, Tensor)
        }
        self.shapes = {name: tuple(tensor.shape) for name, tensor in self.tensors.items()}
        self.dtypes = {name: tensor.dtype for name, tensor in self.tensors.items()}
        self.metadata: dict[str, str] = {}

    def read(self, name: str, dtype: torch.dtype | None = None) -> Tensor:
        return self.tensors[name].to(dtype)


# What a file keeps beside an 8-bit weight: the number to multiply it by, in ComfyUI's older and
# newer names.
SCALES = ("scale_weight", "weight_scale")


def read_scaled(source: TensorSource, name: str, dtype: torch.dtype | None) -> Tensor:
    """A tensor on the CPU in `dtype` (None: the file's own), multiplied by its scale where it has
    one: a number, or one for each row."""
    stem = name.removesuffix("weight")
    beside = [f"{stem}{end}" for end in SCALES if f"{stem}{end}" in source.shapes]
    if stem == name or not beside:
        return source.read(name, dtype)
    weight = source.read(name, dtype or torch.float16)  # which holds 8 bits exactly
    if weight.dtype == source.dtypes[name]:  # the file's own memory
        weight = weight.clone()
    scale = source.read(beside[0], torch.float32).reshape(-1, *[1] * (weight.ndim - 1))
    rows = max(1, PIECE // weight[0].numel())
    scales = scale.expand(len(weight), *scale.shape[1:]).split(rows)
    for part, by in zip(weight.split(rows), scales, strict=True):
        part.mul_(by)
    return weight


# Parts of names that only files have whose weights are packed into fewer bits.
PACKED = (".quant_state.", ".absmax", ".weight_scale_2", ".qweight")


def refuse_packed(source: TensorSource) -> None:
    """Raises CheckpointError for weights of other than plain numbers (NF4, NVFP4, int8 ...)."""
    for name in source.shapes:
        form = name.rpartition(".")[2] if any(part in name for part in PACKED) else ""
        if name.endswith(".comfy_quant"):
            raw = bytes(source.read(name).to(torch.uint8).tolist())
            form = "" if b'"float8_e' in raw else raw.decode(errors="replace")
        if form:
            raise CheckpointError(
                f"'{source.path.name}' is quantised ('{name}'): its weights are packed and cannot "
                "be trained on. Use the file in fp16, bf16 or fp8."
            )


def open_tensors(path: str | os.PathLike[str]) -> TensorSource:
    """The file's tensors by its ending. Raises CheckpointError."""
    suffix = Path(path).suffix.lower()
    if not Path(path).is_file():
        raise CheckpointError(f"The file '{path}' does not exist.")
    if suffix == ".safetensors":
        return SafetensorsFile(path)
    if suffix in (".ckpt", ".pt", ".pth"):
        return PickledFile(path)
    raise CheckpointError(
        f"'{Path(path).name}' ends in '{suffix}': a checkpoint is a .safetensors (or .ckpt) file "
        "or a diffusers folder."
    )
