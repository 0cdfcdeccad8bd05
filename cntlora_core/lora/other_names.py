"""LoRA files of other trainers: the names of PEFT, of diffusers now and before, and of kohya's
scripts for SDXL by diffusers' paths, as the names that our file has.

Facts from their code: PEFT writes `<path>.lora_A.weight`, in a file of its own behind
`base_model.model.`, in diffusers' behind `unet.`; diffusers wrote `.lora.down.weight`, and before
that `.processor.to_q_lora.down.weight`. The update is alpha / r B A with alpha in a JSON, and B A
where there is none.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import LoRAFileError

HALVES = {
    "lora_A.weight": "lora_down.weight",
    "lora_B.weight": "lora_up.weight",
    "lora_A.default.weight": "lora_down.weight",
    "lora_B.default.weight": "lora_up.weight",
    "lora.down.weight": "lora_down.weight",
    "lora.up.weight": "lora_up.weight",
    "lora_down.weight": "lora_down.weight",
    "lora_up.weight": "lora_up.weight",
    "alpha": "alpha",
}
PREFIXES = ("base_model.model.unet.", "base_model.model.", "unet.", "lora_unet_")
MID = ".lora_mid.weight"
MOST_JSON = 1_000_000  # bytes
MOST_STARS = 3


def without_mids(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same LoRA where LyCORIS has parted a convolution's A into one of 1 x 1 and a small one,
    `lora_mid` `[r, r, h, w]` (Tucker): A is their product. What does not fit stays."""
    plain = dict(state)
    for key, mid in state.items():
        name = key.removesuffix(MID)
        down = state.get(f"{name}.lora_down.weight")
        if name == key or down is None or mid.ndim != 4 or down.shape[:1] != mid.shape[1:2]:
            continue
        flat = down.flatten(1).float()
        if flat.shape == down.shape[:2]:
            plain[f"{name}.lora_down.weight"] = torch.einsum("pqhw,qc->pchw", mid.float(), flat)
            del plain[key]
    return plain


def in_our_names(
    state: Mapping[str, Tensor],
    names: Mapping[str, str],
    alpha_of: Callable[[str, int], float | None] = lambda path, rank: None,
) -> dict[str, Tensor]:
    """The same tensors; those of the layers in `names` (path in diffusers' UNet -> name in our
    file) are called as ours are. `alpha_of` a path and a rank gives what the file's JSON says."""
    known = {path.replace(".", "_"): (path, ours) for path, ours in names.items()}
    renamed: dict[str, Tensor] = {}
    for key, tensor in state.items():
        path, half = _parts(key)
        if half is None or path.replace(".", "_") not in known:
            renamed[key] = tensor
            continue
        path, ours = known[path.replace(".", "_")]
        renamed[f"{ours}.{half}"] = tensor
        rank = len(tensor) if tensor.ndim else 0
        if half == "lora_down.weight" and (alpha := alpha_of(path, rank)) is not None:
            renamed.setdefault(f"{ours}.alpha", torch.tensor(alpha))
    return renamed


def _parts(key: str) -> tuple[str, str | None]:
    """The layer of a key, by its path in diffusers' UNet, and which half it is; (key, None) of
    others."""
    key = key.replace("_lora.down.", ".lora.down.").replace("_lora.up.", ".lora.up.")
    for ending, half in HALVES.items():
        if not key.endswith(f".{ending}"):
            continue
        path = key[: -len(ending) - 1]
        prefix = next((p for p in PREFIXES if path.startswith(p)), "")
        path = path[len(prefix) :]
        if ".processor." in path:
            path = path.replace(".processor.", ".")
            path += ".0" * path.endswith(".to_out")
        return path, half
    return key, None


def alphas(path: Path, metadata: Mapping[str, str]) -> Callable[[str, int], float | None]:
    """What a file's own JSON says of alpha: diffusers' metadata, or PEFT's adapter_config.json
    beside it. Of a rank-stabilised LoRA, which is scaled by alpha / rank^1/2 (Kalajdzievski 2023),
    the alpha that gives the same by rank. Raises LoRAFileError for a pattern of layers that is not
    understood."""
    said = _read(metadata.get("lora_adapter_metadata", ""))
    config = {k.removeprefix("unet."): v for k, v in said.items() if not k.startswith("text_")}
    beside = path.with_name("adapter_config.json")
    if not config and path.name == "adapter_model.safetensors" and beside.is_file():
        with beside.open("rb") as file:
            config = _read(file.read(MOST_JSON).decode("utf-8", "replace"))
    patterns = config.get("alpha_pattern")
    patterns = patterns if isinstance(patterns, dict) else {}
    known = [(_pattern(name, path.name), alpha) for name, alpha in patterns.items()]

    def alpha_of(layer: str, rank: int) -> float | None:
        found = [alpha for pattern, alpha in known if pattern.match(layer)]
        value = (found or [config.get("lora_alpha")])[0]
        if not isinstance(value, (int, float)):
            return None
        return float(value) * (rank**0.5 if config.get("use_rslora") else 1.0)

    return alpha_of


def _pattern(name: str, file: str) -> re.Pattern[str]:
    """What PEFT matches layers with: the end of a path, with ^ all of it, with .* anything between.
    No more than that, for a stranger's regular expression may never end."""
    plain = name.removeprefix("^").removesuffix("$").replace("\\.", ".")
    if not re.fullmatch(r"[\w.*]+", plain) or name.count("*") > MOST_STARS:
        raise LoRAFileError(
            f"'{file}' says its alphas by the pattern '{name}', which is not understood: save it "
            "in kohya's names."
        )
    between = ".*".join(map(re.escape, plain.split(".*")))
    start = "" if name.startswith("^") else r"(.*\.)?"
    return re.compile(f"{start}{between}$")


def _read(text: str) -> dict[str, Any]:
    try:
        said = json.loads(text)
    except (ValueError, RecursionError):
        return {}
    return said if isinstance(said, dict) else {}
