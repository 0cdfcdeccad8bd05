"""Train the text encoder and the UNet together on cached latents; save the averaged weights as a diffusers pipeline.

Two phases made the embedded model: `--phase 1 --steps 2848` from nothing, then `--phase 2 --steps 7685 --init` the result.
Phase 1 weights the loss by min-SNR-5; phase 2 divides the loss of each of 32 timestep strata by its running mean, so that every
noise level counts alike, and draws rarely the categories of least interest.
"""

from __future__ import annotations

import random
import shutil
import time
from pathlib import Path

import torch
from common import EMA, SIZE, arguments, learning_rate, load
from diffusers import AutoencoderKL, DDIMScheduler, DDPMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

BATCH, WEIGHT_DECAY, EMA_DECAY, GAMMA, EMPTY_CAPTIONS, HIDDEN = 32, 0.01, 0.999, 5.0, 0.10, 128
PHASES = {
    1: {"lr": 1e-3, "text_lr": 5e-4, "skin_tones": 0.05, "rare": 1.0},
    2: {"lr": 1e-3, "text_lr": 1e-3, "skin_tones": 0.03, "rare": 0.4},
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
    """One of several ways to say what a drawing shows; a tenth of all captions are empty, for guidance."""
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
    """Weights of the per-sample losses: min-SNR (phase 1), or one over the running mean of each stratum (phase 2)."""

    def __init__(self, phase: int, abar: Tensor) -> None:
        snr = abar / (1 - abar)
        self.min_snr = (snr.clamp(max=GAMMA) / snr).float() if phase == 1 else None
        self.mean: Tensor | None = None
        self.steps = 0

    def weigh(self, losses: Tensor, t: Tensor) -> Tensor:
        """`losses` `[32]` in the order of the strata -> the scalar to descend."""
        if self.min_snr is not None:
            return (losses * self.min_snr[t]).mean()
        seen = losses.detach()
        self.steps += 1
        self.mean = seen.clone() if self.mean is None else self.mean.lerp(seen, max(0.01, 1 / self.steps))
        return (losses * 0.1 / self.mean).mean()


def build(work: Path, init: Path | None) -> StableDiffusionPipeline:
    tokenizer = CLIPTokenizer.from_pretrained(work / "tokenizer")
    ids = {f"{k}_token_id": getattr(tokenizer, f"{k}_token_id") for k in ("bos", "eos", "pad")}
    if init:
        unet = UNet2DConditionModel.from_pretrained(init, subfolder="unet", torch_dtype=torch.float32)
        text = CLIPTextModel.from_pretrained(init, subfolder="text_encoder", torch_dtype=torch.float32)
    else:
        unet = UNet2DConditionModel(**UNET)
        text = CLIPTextModel(CLIPTextConfig(vocab_size=len(tokenizer), **ids, **TEXT))
    return StableDiffusionPipeline(
        vae=AutoencoderKL.from_pretrained(work / "vae"),
        text_encoder=text.train(),
        tokenizer=tokenizer,
        unet=unet.train(),
        scheduler=DDIMScheduler(set_alpha_to_one=False, steps_offset=1, **SCHEDULE),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def parameter_groups(pipe: StableDiffusionPipeline, settings: dict) -> list[dict]:
    groups = []
    for module, lr in ((pipe.unet, settings["lr"]), (pipe.text_encoder, settings["text_lr"])):
        matrices = [p for p in module.parameters() if p.ndim > 1]
        others = [p for p in module.parameters() if p.ndim <= 1]
        groups += [{"params": matrices, "peak": lr, "weight_decay": WEIGHT_DECAY}]
        groups += [{"params": others, "peak": lr, "weight_decay": 0.0}]
    return groups


def step_losses(
    pipe: StableDiffusionPipeline, latents: Tensor, captions: list[str], t: Tensor, abar: Tensor, noise: Tensor
) -> Tensor:
    ids = pipe.tokenizer(captions, padding="max_length", truncation=True, return_tensors="pt").input_ids
    level = abar[t].view(-1, 1, 1, 1)
    noisy = level.sqrt() * latents + (1 - level).sqrt() * noise
    with torch.autocast("cpu", torch.bfloat16):
        predicted = pipe.unet(noisy, t, pipe.text_encoder(ids)[0], return_dict=False)[0]
    return (predicted.float() - noise).square().mean((1, 2, 3))


def save(pipe: StableDiffusionPipeline, work: Path, folder: Path) -> None:
    """fp16 weights, and the classic tokenizer files beside the new one."""
    pipe.to(torch.float16)
    pipe.save_pretrained(folder, safe_serialization=True)
    for name in ("vocab.json", "merges.txt"):
        shutil.copy(work / "tokenizer" / name, folder / "tokenizer" / name)


def main() -> None:
    parser = arguments(__doc__, steps=2848)
    parser.add_argument("--phase", type=int, choices=(1, 2), default=1)
    parser.add_argument("--init", type=Path, help="a saved pipeline to go on from")
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    settings = PHASES[args.phase]
    rows = load(args.data, "pretrain")[1]
    latents = torch.load(args.work / "latents.pt", weights_only=True)
    weights = torch.tensor(
        [settings["skin_tones"] if r["skin"] else settings["rare"] if r["category"] in RARE else 1.0 for r in rows]
    )
    pipe = build(args.work, args.init)
    abar = DDPMScheduler(**SCHEDULE).alphas_cumprod
    losses = Losses(args.phase, abar)
    modules = nn.ModuleDict({"unet": pipe.unet, "text": pipe.text_encoder})
    ema = EMA(modules, EMA_DECAY)
    optimizer = torch.optim.AdamW(parameter_groups(pipe, settings), betas=(0.9, 0.99))
    rng, generator = random.Random(args.seed), torch.Generator().manual_seed(args.seed)
    started = time.monotonic()
    for step in range(args.steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, args.steps, 200, group["peak"])
        index = torch.multinomial(weights, BATCH, generator=generator)
        mean, std = latents[index].float().unbind(1)
        x = mean + std * torch.randn(mean.shape, generator=generator)
        # One timestep in each of 32 equal strata: less noise in the gradient, the same expectation.
        t = ((torch.arange(BATCH) + torch.rand(BATCH, generator=generator)) * (1000 / BATCH)).long().clamp(max=999)
        noise = torch.randn(x.shape, generator=generator)
        each = step_losses(pipe, x, [caption(rows[i], rng) for i in index.tolist()], t, abar, noise)
        losses.weigh(each, t).backward()
        nn.utils.clip_grad_norm_(modules.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        ema.update()
        if (step + 1) % 250 == 0 or step + 1 == args.steps:
            print(
                f"{time.monotonic() - started:.0f} s, step {step + 1}: epsilon-MSE {each.mean().item():.4f}", flush=True
            )
    ema.swap()
    save(pipe, args.work, args.output)


if __name__ == "__main__":
    main()
