"""ComfyUI's Train LoRA node on the UNet, latents and prompt that we train on; `throughput.py` runs
it."""

from __future__ import annotations

import argparse
import inspect
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from comfy.model_patcher import ModelPatcher
    from diffusers import UNet2DConditionModel

ROOT = Path(__file__).resolve().parents[1]


def _renumbered(name: str, per_level: int) -> str:
    """The original layout counts three blocks a level; the mini SD has two."""
    match = re.fullmatch(r"(input|output)_blocks\.(\d+)(\..*)", name)
    if match is None or (match[2] == "0" and match[1] == "input"):
        return name
    first = 1 if match[1] == "input" else 0
    level, block = divmod(int(match[2]) - first, 3)
    return f"{match[1]}_blocks.{first + per_level * level + min(block, per_level - 1)}{match[3]}"


class Multiple(float):
    """The mini SD widens by 1.5; ComfyUI's UNet wants whole channels."""

    def __mul__(self, channels: float) -> int:  # type: ignore[override]
        return int(float(self) * channels)

    __rmul__ = __mul__  # type: ignore[assignment]


def _miniature(unet: UNet2DConditionModel) -> ModelPatcher:
    """The mini SD's UNet, whose shapes ComfyUI's loader does not know."""
    import torch
    from comfy import model_management, model_patcher, supported_models

    from cntlora_core.model.ldm_names import attention_up_blocks, unet_name

    shape = unet.config
    blocks, first = shape.layers_per_block, shape.block_out_channels[0]
    down = ["CrossAttn" in kind for kind in shape.down_block_types]
    up = ["CrossAttn" in kind for kind in reversed(shape.up_block_types)]
    kind = supported_models.SD15(
        {
            "image_size": 32,
            "in_channels": 4,
            "out_channels": 4,
            "model_channels": first,
            "num_res_blocks": [blocks] * len(down),
            "channel_mult": [Multiple(c / first) for c in shape.block_out_channels],
            "transformer_depth": [int(on) for on in down for _ in range(blocks)],
            "transformer_depth_output": [int(on) for on in up for _ in range(blocks + 1)],
            "transformer_depth_middle": 1,
            "context_dim": shape.cross_attention_dim,
            "use_spatial_transformer": True,
            "use_linear_in_transformer": False,
            "adm_in_channels": None,
            "use_temporal_attention": False,
            "legacy": False,
            "num_heads": shape.attention_head_dim,
            "num_head_channels": -1,
            "dtype": torch.float32,
        }
    )
    attentive = attention_up_blocks(shape)
    names = {k: unet_name(k, attention_up_blocks=attentive) for k in unet.state_dict()}
    state = {
        "model.diffusion_model." + _renumbered(names[k], blocks + 1): v
        for k, v in unet.state_dict().items()
    }
    kind.set_inference_dtype(torch.float32, None)

    def build(disable_dynamic: bool = True) -> ModelPatcher:
        model = kind.get_model(state, "model.diffusion_model.")
        model.load_model_weights(dict(state), "model.diffusion_model.")
        return model_patcher.ModelPatcher(
            model, model_management.get_torch_device(), torch.device("cpu")
        )

    patcher = build()
    patcher.cached_patcher_init = (build, ())  # newer nodes train a model loaded anew
    return patcher


def _train(arguments: dict[str, Any]) -> None:
    """By the node's old interface or its newer one, which has more inputs, all of them lists."""
    from comfy_extras.nodes_train import TrainLoraNode

    if not hasattr(TrainLoraNode, "execute"):
        TrainLoraNode().train(**arguments)
        return
    arguments |= {
        "quantized_backward": False,
        "checkpoint_depth": 1,
        "offloading": False,
        "bucket_mode": False,
        "bypass_mode": False,
    }
    known = inspect.signature(TrainLoraNode.execute).parameters
    TrainLoraNode.execute(**{k: [v] for k, v in arguments.items() if k in known})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--comfyui", type=Path, required=True)
    parser.add_argument("--model", required=True, help="mini-sd or a single-file checkpoint")
    parser.add_argument("--images", type=Path, required=True)
    parser.add_argument("--resolution", type=int, required=True)
    parser.add_argument("--batch-size", type=int, required=True)
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--gpu", action="store_true", help="let ComfyUI take it, in bf16")
    args = parser.parse_args()
    sys.argv = [sys.argv[0], *([] if args.gpu else ["--cpu"])]
    sys.path[:0] = [str(args.comfyui)]
    import comfy.options

    comfy.options.enable_args_parsing()
    import comfy.sd
    import torch

    sys.path.append(str(ROOT))
    from cntlora_core.config import DataConfig
    from cntlora_core.data.dataset import read_subject
    from cntlora_core.model.loader import load_checkpoint

    loaded = load_checkpoint(args.model)
    data = DataConfig(resolution=args.resolution, upscale=True)
    subject = read_subject(loaded, args.images, "a sks cat face emoji", data)
    scale = loaded.pictures.vae.config.scaling_factor
    if args.model == "mini-sd":
        patcher = _miniature(loaded.unet)
        del loaded
    else:
        del loaded
        patcher = comfy.sd.load_checkpoint_guess_config(
            args.model, output_vae=False, output_clip=False
        )[0]
    arguments = {
        "model": patcher,
        "latents": {"samples": torch.stack(subject.mean) / scale},
        "positive": [[subject.conditioning.tokens[:1].clone(), {}]],
        "batch_size": args.batch_size,
        "steps": args.steps,
        "grad_accumulation_steps": 1,
        "learning_rate": 1e-4,
        "rank": 4,
        "optimizer": "AdamW",
        "loss_function": "MSE",
        "seed": 0,
        "training_dtype": "bf16" if args.gpu else "fp32",
        "lora_dtype": "fp32",
        "algorithm": "LoRA",
        "gradient_checkpointing": False,
        "existing_lora": "[None]",
    }
    with torch.inference_mode():
        _train(arguments)


if __name__ == "__main__":
    main()
