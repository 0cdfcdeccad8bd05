"""Train the text encoder and the UNet together on cached latents; save the averaged weights as a
diffusers pipeline (fp16).

    python benchmarks/mini_sd/train_unet.py --phase 1 --steps 2848 --output DIR/phase1
    python benchmarks/mini_sd/train_unet.py --phase 2 --steps 7685 --init DIR/phase1 --output
    DIR/model

`--width 0.5` gives the UNet half the channels: a second size of model, for what should carry over
between sizes. With `--vae cntlora_core/mini_sd/model/vae --tokenizer
cntlora_core/mini_sd/model/tokenizer` it reads the embedded model's latents and words.

Phase 1 weights the loss by min-SNR-5; phase 2 divides the loss of each of 32 timestep strata by its
running mean, so that every noise level counts alike, and draws rarely the categories of least
interest.
"""

from __future__ import annotations

import random
import shutil
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from common import BUILD, EMA, SIZE, arguments, learning_rate, load, record, report_due, start
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DDPMScheduler,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from safetensors.torch import load_file
from torch import Tensor, nn
from train_vae import encode
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

BATCH, WARM_UP, WEIGHT_DECAY, EMA_DECAY = 32, 200, 0.01, 0.999
GAMMA, EMPTY_CAPTIONS, HIDDEN = 5.0, 0.10, 128


@dataclass(frozen=True)
class Phase:
    """Peak learning rates, and the sampling weights of skin tones and of the `RARE` categories (all
    others: 1)."""

    lr: float
    text_lr: float
    skin_tones: float
    rare: float
    min_snr: bool


PHASES = {
    1: Phase(lr=1e-3, text_lr=5e-4, skin_tones=0.05, rare=1.0, min_snr=True),
    2: Phase(lr=1e-3, text_lr=1e-3, skin_tones=0.03, rare=0.4, min_snr=False),
}
RARE = ("Symbols", "People & Body", "Flags")
UNET = {
    "sample_size": SIZE // 4,
    "in_channels": 4,
    "out_channels": 4,
    "block_out_channels": (64, 96, 96),
    "layers_per_block": 1,
    "norm_num_groups": 16,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "cross_attention_dim": HIDDEN,
    "attention_head_dim": 2,  # as in SD 1.5 this is the number of heads
}
TEXT = {
    "hidden_size": HIDDEN,
    "intermediate_size": 4 * HIDDEN,
    "projection_dim": HIDDEN,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 32,
    "hidden_act": "quick_gelu",
}
SCHEDULE = {
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "prediction_type": "epsilon",
    "clip_sample": False,
}


def caption(row: dict, rng: random.Random) -> str:
    """One of several ways to say what a drawing shows; a tenth of all captions are empty, for
    guidance."""
    if rng.random() < EMPTY_CAPTIONS:
        return ""
    text = row["name"] if rng.random() < 0.8 else row["short"]
    text += f", {row['skin']} skin tone" if row["skin"] else ""
    text = f"a {text}" if rng.random() < 0.2 else text
    form = rng.random()
    if form < 0.60:
        return f"{text} emoji, {row['vendor']} style"
    if form < 0.75:
        return f"{text}, {row['vendor']} style"
    return f"{text} emoji" if form < 0.85 else text


class Losses:
    """Weights of the per-sample losses: min-SNR, or one over the running mean of each stratum."""

    def __init__(self, min_snr: bool, alphas_cumprod: Tensor) -> None:
        snr = alphas_cumprod / (1 - alphas_cumprod)
        self.min_snr = (snr.clamp(max=GAMMA) / snr).float() if min_snr else None
        self.mean: Tensor | None = None
        self.steps = 0

    def weigh(self, losses: Tensor, t: Tensor) -> Tensor:
        """`losses` `[32]` in the order of the strata -> the scalar to descend."""
        if self.min_snr is not None:
            return (losses * self.min_snr[t]).mean()
        seen = losses.detach()
        self.steps += 1
        self.mean = (
            seen.clone() if self.mean is None else self.mean.lerp(seen, max(0.01, 1 / self.steps))
        )
        return (losses * 0.1 / self.mean).mean()


def build(
    tokenizer_folder: Path, vae_folder: Path, init: Path | None = None, width: float = 1.0
) -> StableDiffusionPipeline:
    """fp32, with fresh weights unless `init` is a saved pipeline; `width` times the embedded UNet's
    channels."""
    tokenizer = CLIPTokenizer.from_pretrained(tokenizer_folder, local_files_only=True)
    if init:
        unet = UNet2DConditionModel.from_pretrained(
            init, subfolder="unet", torch_dtype=torch.float32, local_files_only=True
        )
        text = CLIPTextModel.from_pretrained(
            init, subfolder="text_encoder", torch_dtype=torch.float32, local_files_only=True
        )
    else:
        ids = {f"{k}_token_id": getattr(tokenizer, f"{k}_token_id") for k in ("bos", "eos", "pad")}
        channels = tuple(round(c * width) for c in UNET["block_out_channels"])
        unet = UNet2DConditionModel(**(UNET | {"block_out_channels": channels}))
        text = CLIPTextModel(CLIPTextConfig(vocab_size=len(tokenizer), **ids, **TEXT))
    return StableDiffusionPipeline(
        vae=AutoencoderKL.from_pretrained(vae_folder, local_files_only=True),
        text_encoder=text.train(),
        tokenizer=tokenizer,
        unet=unet.train(),
        scheduler=DDIMScheduler(set_alpha_to_one=False, steps_offset=1, **SCHEDULE),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def parameter_groups(pipe: StableDiffusionPipeline, phase: Phase) -> list[dict]:
    groups: list[dict] = []
    for module, lr in ((pipe.unet, phase.lr), (pipe.text_encoder, phase.text_lr)):
        matrices = [p for p in module.parameters() if p.ndim > 1]
        others = [p for p in module.parameters() if p.ndim <= 1]
        groups += [{"params": matrices, "peak": lr, "weight_decay": WEIGHT_DECAY}]
        groups += [{"params": others, "peak": lr, "weight_decay": 0.0}]
    return groups


def step_losses(
    pipe: StableDiffusionPipeline,
    latents: Tensor,
    captions: list[str],
    t: Tensor,
    alphas_cumprod: Tensor,
    noise: Tensor,
) -> Tensor:
    """Epsilon-MSE of every sample `[n]`, for scaled latents and noise `[n, 4, 16, 16]` and
    timesteps `[n]`."""
    ids = pipe.tokenizer(
        captions, padding="max_length", truncation=True, return_tensors="pt"
    ).input_ids
    level = alphas_cumprod[t].view(-1, 1, 1, 1)
    noisy = level.sqrt() * latents + (1 - level).sqrt() * noise
    with torch.autocast("cpu", torch.bfloat16):
        predicted = pipe.unet(noisy, t, pipe.text_encoder(ids)[0], return_dict=False)[0]
    return (predicted.float() - noise).square().mean((1, 2, 3))


def stratified_timesteps(n: int, generator: torch.Generator) -> Tensor:
    """One in each of n equal strata, in order: less noise in the gradient, the same expectation.
    `[n]`."""
    return (
        ((torch.arange(n) + torch.rand(n, generator=generator)) * (1000 / n)).long().clamp(max=999)
    )


def train(
    pipe: StableDiffusionPipeline,
    latents: Tensor,
    rows: list[dict],
    phase: Phase,
    *,
    steps: int,
    seed: int = 0,
) -> float:
    """Train the pipeline's UNet and text encoder in place, up to their averaged weights.

    `latents` `[n, 2, 4, 16, 16]`: mean and standard deviation. Returns the mean epsilon-MSE of the
    last 250 steps.
    """
    weights = [
        phase.skin_tones if r["skin"] else phase.rare if r["category"] in RARE else 1.0
        for r in rows
    ]
    chances = torch.tensor(weights, dtype=torch.float64)
    alphas_cumprod = DDPMScheduler(**SCHEDULE).alphas_cumprod
    losses = Losses(phase.min_snr, alphas_cumprod)
    modules = nn.ModuleDict({"unet": pipe.unet, "text": pipe.text_encoder})
    ema = EMA(modules, EMA_DECAY)
    optimizer = torch.optim.AdamW(parameter_groups(pipe, phase), betas=(0.9, 0.99))
    rng, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    started, seen, last = time.monotonic(), [], float("nan")
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps, WARM_UP, group["peak"])
        index = torch.multinomial(chances, BATCH, generator=generator)
        mean, std = latents[index].float().unbind(1)
        x = mean + std * torch.randn(mean.shape, generator=generator)
        t = stratified_timesteps(BATCH, generator)
        noise = torch.randn(x.shape, generator=generator)
        each = step_losses(
            pipe, x, [caption(rows[i], rng) for i in index.tolist()], t, alphas_cumprod, noise
        )
        losses.weigh(each, t).backward()
        nn.utils.clip_grad_norm_(modules.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        ema.update()
        seen.append(each.detach().mean().item())
        if report_due(step, steps):
            last, seen = sum(seen) / len(seen), []
            print(
                f"{time.monotonic() - started:.0f} s, step {step + 1}: epsilon-MSE {last:.4f}",
                flush=True,
            )
    ema.swap()
    return last


def save(pipe: StableDiffusionPipeline, tokenizer_folder: Path, folder: Path) -> None:
    """fp16 weights, and the classic tokenizer files beside the new one."""
    for part in (pipe.unet, pipe.text_encoder, pipe.vae):
        part.half()
    pipe.save_pretrained(folder, safe_serialization=True)
    for name in ("vocab.json", "merges.txt"):
        shutil.copy(tokenizer_folder / name, folder / "tokenizer" / name)


def read_latents(vae_folder: Path, images: np.ndarray) -> Tensor:
    """Those that train_vae.py left beside the VAE, or made now. Scaled, `[n, 2, 4, 16, 16]`."""
    if (file := vae_folder / "latents.safetensors").is_file():
        return load_file(file)["latents"]
    vae = AutoencoderKL.from_pretrained(
        vae_folder, torch_dtype=torch.float32, local_files_only=True
    )
    return encode(vae.eval(), images) * vae.config.scaling_factor


def main() -> None:
    parser = arguments(__doc__, BUILD / "model", steps=2848)
    parser.add_argument(
        "--width", type=float, default=1.0, help="of the UNet, where none is given by --init"
    )
    parser.add_argument("--phase", type=int, choices=tuple(PHASES), default=1)
    parser.add_argument("--init", type=Path, help="a saved pipeline to go on from")
    parser.add_argument("--tokenizer", type=Path, default=BUILD / "tokenizer")
    parser.add_argument("--vae", type=Path, default=BUILD / "vae", help="made by train_vae.py")
    args = parser.parse_args()
    start(args)
    images, rows = load(args.data, "pretrain")
    latents = read_latents(args.vae, images)
    pipe = build(args.tokenizer, args.vae, args.init, args.width)
    loss = train(pipe, latents, rows, PHASES[args.phase], steps=args.steps, seed=args.seed)
    save(pipe, args.tokenizer, args.output)
    record(args.output, args, epsilon_mse=round(loss, 4))


if __name__ == "__main__":
    main()
