"""ComfyUI's Train LoRA node on the UNet, latents and prompt that we train on; `throughput.py` runs
it."""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path

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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--comfyui", type=Path, required=True)
    parser.add_argument("--model", required=True, help="mini-sd or a single-file checkpoint")
    parser.add_argument("--images", type=Path, required=True)
    parser.add_argument("--resolution", type=int, required=True)
    parser.add_argument("--batch-size", type=int, required=True)
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--gpu", action="store_true", help="let ComfyUI take it")
    args = parser.parse_args()
    sys.argv = [sys.argv[0], *([] if args.gpu else ["--cpu"])]
    sys.path[:0] = [str(args.comfyui)]
    import comfy.options

    comfy.options.enable_args_parsing()
    import torch
    from comfy import model_management, model_patcher, supported_models
    from comfy_extras.nodes_train import TrainLoraNode

    sys.path.append(str(ROOT))
    from cntlora_core.config import DataConfig
    from cntlora_core.data.dataset import read_subject
    from cntlora_core.model.ldm_names import attention_up_blocks, unet_name
    from cntlora_core.model.loader import load_checkpoint

    loaded = load_checkpoint(args.model)
    data = DataConfig(resolution=args.resolution, upscale=True)
    subject = read_subject(loaded, args.images, "a sks cat face emoji", data)
    shape = loaded.unet.config
    config = {
        "image_size": 32,
        "in_channels": 4,
        "out_channels": 4,
        "model_channels": shape.block_out_channels[0],
        "num_res_blocks": [shape.layers_per_block] * len(shape.block_out_channels),
        "channel_mult": [
            Multiple(c / shape.block_out_channels[0]) for c in shape.block_out_channels
        ],
        "transformer_depth": [],
        "transformer_depth_output": [],
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
    down = ["CrossAttn" in kind for kind in shape.down_block_types]
    up = ["CrossAttn" in kind for kind in shape.up_block_types]
    config["transformer_depth"] = [int(on) for on in down for _ in range(shape.layers_per_block)]
    config["transformer_depth_output"] = [
        int(on) for on in reversed(up) for _ in range(shape.layers_per_block + 1)
    ]
    kind = supported_models.SD15(config)
    attentive = attention_up_blocks(shape)
    per_level = shape.layers_per_block + 1
    state = {
        "model.diffusion_model."
        + _renumbered(unet_name(k, attention_up_blocks=attentive), per_level): v
        for k, v in loaded.unet.state_dict().items()
    }
    kind.set_inference_dtype(torch.float32, None)
    model = kind.get_model(state, "model.diffusion_model.")
    model.load_model_weights(state, "model.diffusion_model.")
    patcher = model_patcher.ModelPatcher(
        model, model_management.get_torch_device(), torch.device("cpu")
    )
    latents = {"samples": torch.stack(subject.mean) / loaded.pictures.vae.config.scaling_factor}
    words = [[subject.conditioning.tokens[:1].clone(), {}]]
    del loaded
    arguments = {
        "model": patcher,
        "latents": latents,
        "positive": words,
        "batch_size": args.batch_size,
        "steps": args.steps,
        "grad_accumulation_steps": 1,
        "learning_rate": 1e-4,
        "rank": 4,
        "optimizer": "AdamW",
        "loss_function": "MSE",
        "seed": 0,
        "training_dtype": "fp32",
        "lora_dtype": "fp32",
        "algorithm": "LoRA",
        "gradient_checkpointing": False,
        "existing_lora": "[None]",
    }
    with torch.inference_mode():
        TrainLoraNode().train(**arguments)


if __name__ == "__main__":
    main()
