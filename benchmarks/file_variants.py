"""What mergers, converters and trainers make of a checkpoint's names and numbers, on small files;
file_kinds.py loads them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from huggingface_hub import save_torch_state_dict
from make_checkpoint import small_config, write
from safetensors.torch import load_file, save_file
from torch import Tensor

from cntlora_core.model import loader, single_file
from cntlora_core.model.ldm_names import UNET_PREFIX, vae_places
from cntlora_core.model.loader import MINI_SD_FOLDER, load_checkpoint

State = dict[str, Tensor]
VOCABULARY = 2008  # the miniature's, whose tokenizer goes with folders
FP8 = {torch.float8_e4m3fn: 448.0, torch.float8_e5m2: 57344.0}  # largest numbers


class Workshop:
    """Makes files in a folder from one small checkpoint of each family, `width` times as wide as
    need be."""

    def __init__(self, folder: Path, width: int = 1) -> None:
        self.folder, self.width = folder, width
        self.bases: dict[str, State] = {}
        self.configs: dict[str, dict] = {}
        self.made = 0

    def config(self, family: str) -> dict:
        if family not in self.configs:
            config = self.configs[family] = small_config(family)
            for part in (config["unet"], config["vae"]):
                part["block_out_channels"] = [w * self.width for w in part["block_out_channels"]]
            for text in config["text_encoders"]:  # as wide as ever: the family is told by it
                text.update(vocab_size=VOCABULARY, num_hidden_layers=1 + self.width // 2)
        return json.loads(json.dumps(self.configs[family]))

    @contextmanager
    def known(self) -> Iterator[None]:
        """These sizes are the families' own while the block runs. The vocabulary takes longer to
        load than the rest, and has tests of its own."""
        with (
            mock.patch.object(single_file, "config_of", self.config),
            mock.patch.object(loader, "load_tokenizers", return_value=()),
        ):
            yield

    def base(self, family: str) -> State:
        if family not in self.bases:
            path = self.folder / f"base-{family}.safetensors"
            write(path, family, dtype="fp16", config=self.config(family))
            self.bases[family] = load_file(path)
        return dict(self.bases[family])

    def path(self, name: str) -> Path:
        """A fresh place, so that equal names do not meet."""
        self.made += 1
        place = self.folder / str(self.made)
        place.mkdir()
        return place / name

    def clear(self) -> None:
        """Without what was made so far."""
        for place in self.folder.iterdir():
            if place.is_dir():
                shutil.rmtree(place)

    def save(self, state: State, name: str = "model", metadata: dict | None = None) -> Path:
        path = self.path(f"{name}.safetensors")
        save_file({k: v.contiguous() for k, v in state.items()}, path, metadata)
        return path

    def pickle(self, state: State) -> Path:
        path = self.path("model.ckpt")
        torch.save({"state_dict": state, "global_step": 1}, path)
        return path

    def folder_of(self, change: Callable[[Path], None] = lambda folder: None) -> Path:
        """The embedded miniature as a diffusers folder, changed. Where more width is asked for, it
        has SD 1's parts."""
        copy = shutil.copytree(MINI_SD_FOLDER / "model", self.path("folder"))
        if self.width > 1:
            with self.known():
                model = load_checkpoint(self.save(self.base("sd1")), dtype=torch.float16)
            model.unet.save_pretrained(copy / "unet")
            model.pictures.vae.save_pretrained(copy / "vae")
            model.prompts.encoders[0].save_pretrained(copy / "text_encoder")
        change(copy)
        return copy

    def scheduler(self, **keys: Any) -> Path:
        def change(folder: Path) -> None:
            path = folder / "scheduler" / "scheduler_config.json"
            path.write_text(json.dumps(json.loads(path.read_text()) | keys))

        return self.folder_of(change)


def cast(state: State, dtype: torch.dtype, only: str = "") -> State:
    """Norms and biases stay where the dtype has 8 bits."""
    least = 2 if dtype in FP8 else 0
    return {
        k: v.to(dtype) if v.ndim >= least and k.startswith(only) else v for k, v in state.items()
    }


def scaled(state: State, ending: str, dtype: torch.dtype = torch.float8_e4m3fn) -> State:
    """Linear layers of the UNet in 8 bits of full range, each with its scale."""
    out: State = {}
    for name, value in state.items():
        linear = name.startswith(UNET_PREFIX) and name.endswith(".weight") and value.ndim == 2
        if not linear:
            out[name] = value
            continue
        scale = value.float().abs().max() / FP8[dtype]
        out[name] = (value.float() / scale).to(dtype)
        out[name.removesuffix("weight") + ending] = scale
    return out


def renamed(state: State, change: Callable[[str], str | None]) -> State:
    return {new: v for k, v in state.items() if (new := change(k)) is not None}


def averaged(name: str) -> str:
    bare = name.removeprefix("model.")
    return f"model_ema.{bare.replace('.', '')}" if name.startswith(UNET_PREFIX) else name


def mixed_attention(name: str) -> str:
    if ".mid.attn_1." not in name:
        return name
    for old, new in ((".q.", ".to_q."), (".k.", ".to_k."), (".v.", ".to_v.")):
        name = name.replace(old, new)
    return name.replace(".proj_out.", ".to_out.0.")


def part(state: State, prefix: str) -> State:
    return {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}


def without(state: State, prefix: str) -> State:
    return {k: v for k, v in state.items() if not k.startswith(prefix)}


def diffusers_vae(shop: Workshop) -> Path:
    from diffusers import AutoencoderKL

    config, base = shop.config("sd1")["vae"], shop.base("sd1")
    with torch.device("meta"):
        wanted = AutoencoderKL.from_config(config).state_dict()
    levels = len(config["block_out_channels"])
    state = {k: base[vae_places(k, levels)[0][0]].reshape(v.shape) for k, v in wanted.items()}
    return shop.save(state, "vae")


def in_fp32(folder: Path) -> None:
    for path in folder.rglob("*.safetensors"):
        save_file(cast(load_file(path), torch.float32), path, {"format": "pt"})


def variant(folder: Path) -> None:
    for path in folder.rglob("*.safetensors"):
        path.rename(path.with_name(path.name.replace(".safetensors", ".fp16.safetensors")))


def sharded(folder: Path) -> None:
    whole = folder / "unet" / "diffusion_pytorch_model.safetensors"
    size, state = whole.stat().st_size, load_file(whole)
    whole.unlink()
    pattern = "diffusion_pytorch_model{suffix}.safetensors"
    save_torch_state_dict(
        state, folder / "unet", filename_pattern=pattern, max_shard_size=size // 3
    )


def pickled(folder: Path) -> None:
    (folder / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    (folder / "unet" / "diffusion_pytorch_model.bin").write_bytes(b"\x80\x02}q\x00.")


def empty_tokenizer(folder: Path) -> None:
    shutil.rmtree(folder / "tokenizer")
    (folder / "tokenizer").mkdir()


def shallow(state: State, layers: int) -> State:
    deep = [f"input_blocks.7.1.transformer_blocks.{n}." for n in range(layers, 10)]
    return {k: v for k, v in state.items() if not any(d in k for d in deep)}


def fewer_blocks(state: State, blocks: int) -> State:
    """The UNet without its input blocks from number `blocks` on."""
    start = f"{UNET_PREFIX}input_blocks."
    return {
        k: v
        for k, v in state.items()
        if not k.startswith(start) or int(k.removeprefix(start).split(".")[0]) < blocks
    }
