"""The LoRA file: kohya's key names, one alpha per module, written atomically and read back before
it counts.

Per projection: `<name>.lora_down.weight` `[r, d]`, `<name>.lora_up.weight` `[m, r]`, `<name>.alpha`
(scalar fp32), and the update is alpha / r * up @ down; of a convolution `[r, channels, 3, 3]` and
`[m, r, 1, 1]`, as LoCon files have them. No other tensors: a loader would call them unknown keys.

All modules carry one and the same alpha, and `up` holds the rest of the scale. With equal ranks
alpha = r, scale 1. With variable ranks one alpha per rank would be the obvious form, but diffusers
(0.42.1) loses the alphas of attention modules when they differ and applies the most common one to
all; a common alpha is read rightly by every loader.
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as serialize
from torch import Tensor

from ..errors import LoRAFileError, OutputError
from ..events import Notice, Observer, ignore
from ..files import DISK, Disk, atomic_write, check_output
from ..model.ldm_names import unet_name
from .adapter import Factors, LoRA
from .other_names import alphas, in_our_names, without_mids
from .targets import CONVOLUTION, KERNEL, Projection

SDXL_UP = frozenset({0, 1})  # its up blocks with attention
_SUFFIXES = ("lora_down.weight", "lora_up.weight", "alpha")


def kohya_name(name: str, family: str) -> str:
    """The module's name in the file: diffusers' path for SD 1 and 2, the original (sgm) path for
    SDXL."""
    if family == "sdxl":
        name = unet_name(name, attention_up_blocks=SDXL_UP)
    return "lora_unet_" + name.replace(".", "_")


def common_alpha(lora: Mapping[str, Factors]) -> int:
    """The alpha of every module in the file: the mean rank, rounded; the rank itself where all are
    equal."""
    return max(1, round(sum(f.rank for f in lora.values()) / max(1, len(lora))))


def to_state_dict(
    lora: Mapping[str, Factors], family: str, dtype: torch.dtype = torch.float32
) -> dict[str, Tensor]:
    """The tensors of the file, on the CPU. Raises LoRAFileError when a factor is not finite or
    overflows `dtype`."""
    state: dict[str, Tensor] = {}
    alpha = common_alpha(lora)
    for name, factors in lora.items():
        key = kohya_name(name, family)
        scaled_up = factors.up * (factors.rank / alpha)
        down, up = (t.detach().cpu().to(dtype).contiguous() for t in (factors.down, scaled_up))
        if CONVOLUTION.search(name):  # as its weight lies, and B as one of 1 x 1
            down, up = down.view(len(down), -1, *KERNEL), up[..., None, None]
        if not (torch.isfinite(down).all() and torch.isfinite(up).all()):
            raise LoRAFileError(
                f"The LoRA's weights of '{name}' are not finite in {dtype}: nothing was written."
            )
        state[f"{key}.lora_down.weight"], state[f"{key}.lora_up.weight"] = down, up
        state[f"{key}.alpha"] = torch.tensor(float(alpha))
    return state


def from_state_dict(
    state: Mapping[str, Tensor],
    projections: Sequence[Projection],
    family: str,
    *,
    shared: bool = False,
    called: str = "the LoRA",
    observer: Observer = ignore,
) -> LoRA:
    """Factors by projection name, alpha folded into `up`. `shared`: leave out tensors of other
    layers, and tell. Raises LoRAFileError for keys, shapes or values that do not fit."""
    lora: LoRA = {}
    known: set[str] = set()
    for p in projections:
        key = kohya_name(p.name, family)
        down, up, alpha = (state.get(f"{key}.{suffix}") for suffix in _SUFFIXES)
        if down is None and up is None:
            continue
        if down is None or up is None:
            raise LoRAFileError(f"The LoRA has only one half of '{key}'.")
        kernel = KERNEL if p.convolution else (1, 1)
        down, up = _flat(down, kernel), _flat(up, (1, 1))
        lora[p.name] = _factors_of(key, p, down, up, alpha)
        known.update(f"{key}.{suffix}" for suffix in _SUFFIXES)
    foreign = sorted(set(state) - known)
    if foreign and not (shared and lora and _plain(foreign)):
        raise LoRAFileError(
            f"{len(foreign)} of {len(state)} tensors do not belong to this model's attention, "
            f"feed-forward or 3 x 3 convolution layers, e.g. '{foreign[0]}'. "
            f"{_next_step(foreign, bool(lora))}"
        )
    if foreign:
        text = (
            f"{len(foreign)} of {len(state)} tensors of {called} are of layers that CNTLoRA does "
            f"not train, e.g. '{foreign[0]}': they are left out, and what they did is lost."
        )
        observer(Notice(text))
    return lora


def _flat(half: Tensor, kernel: tuple[int, int]) -> Tensor:
    """As a matrix, where it is one or a convolution of that `kernel`."""
    return half.flatten(1) if tuple(half.shape[2:]) == kernel else half


def _factors_of(
    key: str, projection: Projection, down: Tensor, up: Tensor, alpha: Tensor | None
) -> Factors:
    rank = down.shape[0] if down.ndim == 2 else 0
    fits = (rank, projection.in_features), (projection.out_features, rank)
    if (tuple(down.shape), tuple(up.shape)) != fits:
        raise LoRAFileError(
            f"'{key}' has shapes {tuple(down.shape)} and {tuple(up.shape)}; this model's layer is "
            f"{projection.in_features} -> {projection.out_features}. The LoRA was made for another "
            "model."
        )
    if not rank:
        raise LoRAFileError(f"'{key}' has rank 0, so nothing can be trained there: mend the file.")
    if alpha is not None and alpha.numel() != 1:
        raise LoRAFileError(
            f"'{key}.alpha' holds {alpha.numel()} values, where a LoRA has one: mend the file."
        )
    for name, tensor in ((_SUFFIXES[0], down), (_SUFFIXES[1], up), (_SUFFIXES[2], alpha)):
        if tensor is not None and not torch.isfinite(tensor.float()).all():
            raise LoRAFileError(
                f"'{key}.{name}' holds NaN or infinite values: the file is damaged, or its "
                "training exploded. Take an earlier one."
            )
    scale = 1.0 if alpha is None else float(alpha.reshape(())) / rank
    return Factors(up.float() * scale, down.float())


# Parts of key names -> what such a file is. These are no sums of W and up @ down.
OTHER_KINDS = {
    "dora_scale": "a DoRA",
    "lora_magnitude": "a DoRA",
    "hada_": "a LoHa",
    "lokr_": "a LoKr",
    "oft_": "an OFT",
}


def _plain(keys: Sequence[str]) -> bool:
    return not any(part in key for part in OTHER_KINDS for key in keys)


def _next_step(foreign: Sequence[str], any_known: bool) -> str:
    for part, kind in OTHER_KINDS.items():
        if any(part in key for key in foreign):
            return (
                f"It is {kind}, which is no plain LoRA: merge it into the checkpoint and train on "
                "that, or train a new LoRA."
            )
    if any_known:
        return (
            "To train on without them turn on continue_shared (--continue-shared); what they did "
            "is then lost."
        )
    return "The LoRA was made for another model or by another trainer: choose another."


def save_lora(
    path: str | os.PathLike[str],
    lora: Mapping[str, Factors],
    family: str,
    metadata: Mapping[str, str],
    *,
    dtype: torch.dtype = torch.float32,
    overwrite: bool = False,
    disk: Disk = DISK,
) -> Path:
    """Write, read back, then rename into place; a failure leaves neither a partial file nor a
    changed old one.

    Equal weights and metadata give equal bytes. Raises LoRAFileError for weights that are not
    finite in `dtype`, and OutputError.
    """
    target = check_output(path, overwrite=overwrite)
    state = to_state_dict(lora, family, dtype)
    payload = _canonical(serialize(state, metadata=dict(metadata)))
    return atomic_write(
        target,
        payload,
        overwrite=overwrite,
        verify=lambda written: _verify(written, state),
        disk=disk,
    )


def overflows(lora: Mapping[str, Factors], dtype: torch.dtype) -> bool:
    """Whether finite weights are not so in `dtype`."""
    alpha = common_alpha(lora)
    return any(
        bool((torch.isfinite(t) & ~torch.isfinite(t.to(dtype))).any())
        for f in lora.values()
        for t in (f.down, f.up * (f.rank / alpha))
    )


def _canonical(payload: bytes) -> bytes:
    """The same file with its metadata in alphabetical order (the library writes it in random
    order), and the data's SHA-256 as `sshs_model_hash`."""
    (length,) = struct.unpack("<Q", payload[:8])
    header, data = json.loads(payload[8 : 8 + length]), payload[8 + length :]
    metadata = header.pop("__metadata__", {}) | {
        "sshs_model_hash": hashlib.sha256(data).hexdigest()
    }
    ordered = {"__metadata__": dict(sorted(metadata.items())), **header}
    text = json.dumps(ordered, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)  # the format aligns the data to 8 bytes
    return struct.pack("<Q", len(text)) + text + data


def _verify(path: Path, state: Mapping[str, Tensor]) -> None:
    with safe_open(path, framework="pt") as file:
        same = set(file.keys()) == set(state) and all(
            torch.equal(file.get_tensor(k), v) for k, v in state.items()
        )
    if not same:
        raise OutputError(
            f"'{path.parent}' gave back other bytes than were written: check the disk."
        )


def read_lora(path: str | os.PathLike[str]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of a LoRA file. Raises LoRAFileError when it is missing or not a
    safetensors file."""
    if not Path(path).is_file():
        raise LoRAFileError(f"The LoRA file '{path}' does not exist.")
    try:
        with safe_open(path, framework="pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}, dict(file.metadata() or {})  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise LoRAFileError(f"'{path}' is not a readable safetensors file ({error}).") from error


def load_lora(
    path: str | os.PathLike[str],
    projections: Sequence[Projection],
    family: str,
    *,
    shared: bool = False,
    observer: Observer = ignore,
) -> tuple[LoRA, dict[str, str]]:
    """A LoRA file, ours or another trainer's, as factors for this model, and its metadata.
    `shared`: only the layers that CNTLoRA trains; what is left out is told."""
    state, metadata = read_lora(path)
    names = {p.name: kohya_name(p.name, family) for p in projections}
    state = in_our_names(without_mids(state), names, alphas(Path(path), metadata))
    try:
        called = f"'{Path(path).name}'"
        lora = from_state_dict(
            state, projections, family, shared=shared, called=called, observer=observer
        )
    except LoRAFileError as error:
        raise LoRAFileError(f"{called}: {error}") from error
    if not lora:
        raise LoRAFileError(
            f"'{path}' holds no LoRA for the UNet's attention, feed-forward or convolution layers."
        )
    return lora, metadata
