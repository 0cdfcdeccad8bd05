"""Train the text encoder and the UNet together on cached latents; save the averaged weights as a
diffusers pipeline (fp16).

    python benchmarks/mini_sd/train_unet.py --steps 20000 --output DIR/model

`--size half` gives the UNet half the channels, `--size sd1` attention as wide as SD 1.5's two outer
levels have it, with as many heads and as long words, `--size sdxl` as SDXL's two: for what should
carry over between sizes. With `--vae cntlora_core/mini_sd/model/vae` they read the embedded model's
latents.

The loss of each of 32 timestep strata is divided by its running mean, so that every noise level
counts alike. Categories of least interest are drawn rarely.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import (
    BUILD,
    SIZE,
    arguments,
    cumulative,
    draw,
    load_drawings,
    move,
    record,
    shade,
    start,
    to_tensor,
)
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DDPMScheduler,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from torch import Tensor, nn
from train_vae import encode
from training import Plan, Training, add_arguments, bf16, plan
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

BATCH, WARM_UP, WEIGHT_DECAY, EMA_DECAY = 256, 500, 0.01, 0.9995
UNET_LR, TEXT_LR = 1.5e-3, 1e-3
STRATA, HIDDEN = 32, 128
EMBEDDED = Path(__file__).resolve().parents[2] / "cntlora_core" / "mini_sd" / "model"
RARE = ("Symbols", "People & Body", "Flags")
SKIN_TONE_WEIGHT, RARE_WEIGHT = 0.03, 0.4
# Drawings that mean the same in a mirror.
FLIPPED = ("Smileys & Emotion", "Animals & Nature", "Food & Drink")
# Captions are every combination of a name, an article and a form, drawn by these chances; a tenth
# of all captions are empty, for guidance.
EMPTY_CAPTIONS = 0.10
NAMES = {"name": 0.8, "short": 0.2}
ARTICLES = {"": 0.8, "a ": 0.2}
FORMS = {
    "{} emoji, {vendor} style": 0.60,
    "{}, {vendor} style": 0.15,
    "{} emoji": 0.10,
    "{}": 0.15,
}
NO_STYLE = {form: chance if "vendor" not in form else 0.0 for form, chance in FORMS.items()}
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


@dataclass(frozen=True)
class Size:
    """What differs from `UNET` and `TEXT`, and how it is trained: the share of the learning
    rates."""

    unet: dict[str, Any] = field(default_factory=dict)
    text: dict[str, Any] = field(default_factory=dict)
    rate: float = 1.0
    warm_up: int = WARM_UP
    ema_decay: float = EMA_DECAY


WIDE_WORDS = {
    "hidden_size": 768, "intermediate_size": 3072, "projection_dim": 768,
    "num_hidden_layers": 2, "num_attention_heads": 12,
}  # fmt: skip
WIDEST_WORDS = {
    "hidden_size": 2048, "intermediate_size": 8192, "projection_dim": 2048,
    "num_hidden_layers": 2, "num_attention_heads": 32,
}  # fmt: skip
SIZES = {
    "embedded": Size(),
    "half": Size({"block_out_channels": (32, 48, 48)}),
    # SD 1.5's first level has most places; here a narrow one stands before it, for a CPU's sake.
    "sd1": Size(
        {
            "block_out_channels": (64, 320, 640),
            "norm_num_groups": 32,
            "cross_attention_dim": 768,
            "attention_head_dim": 8,
        },
        WIDE_WORDS,
        rate=0.3,  # as widths go, and for some hundred steps of 32 pictures
        warm_up=30,
        ema_decay=0.98,
    ),
    # Two layers to a transformer, where SDXL has 2 and 10.
    "sdxl": Size(
        {
            "block_out_channels": (64, 640, 1280),
            "norm_num_groups": 32,
            "cross_attention_dim": 2048,
            "attention_head_dim": (1, 10, 20),
            "transformer_layers_per_block": (1, 2, 2),
            "use_linear_projection": True,
        },
        WIDEST_WORDS,
        rate=0.15,
        warm_up=200,
        ema_decay=0.995,
    ),
}
SCHEDULE = {
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "prediction_type": "epsilon",
    "clip_sample": False,
}


def captions(row: dict) -> list[str]:
    """All ways to say what a drawing shows, in the order of `chances`; the last is empty."""
    skin = f", {row['skin']} skin tone" if row["skin"] else ""
    return [
        form.format(article + row[name] + skin, vendor=row["vendor"])
        for name, article, form in product(NAMES, ARTICLES, FORMS)
    ] + [""]


def chances(forms: dict[str, float]) -> list[float]:
    """Of each of `captions`."""
    said = [a * b * c for a, b, c in product(NAMES.values(), ARTICLES.values(), forms.values())]
    return [(1 - EMPTY_CAPTIONS) * c / sum(said) for c in said] + [EMPTY_CAPTIONS]


def tokenise(tokenizer: CLIPTokenizer, rows: list[dict]) -> Tensor:
    """Every caption of every drawing, `[rows, captions, tokens]`."""
    texts = [text for row in rows for text in captions(row)]
    ids = tokenizer(texts, padding="max_length", truncation=True, return_tensors="pt").input_ids
    return ids.view(len(rows), -1, ids.shape[1])


def shaded_copies(copies: int) -> int:
    """The last third of the copies is shaded, and no caption says that a vendor drew those."""
    return copies // 3


def vary(x: Tensor, mirror: Tensor) -> Tensor:
    """Drawings a little otherwise: moved by whole pixels, which keeps them sharp, or half of them
    zoomed, turned and tinted. Those of `mirror` `[n]` may be flipped."""
    n, device = len(x), x.device
    flip, still, zoom, turn = torch.rand(4, n, device=device).unbind()
    x = torch.where((mirror & (flip < 0.5)).view(-1, 1, 1, 1), x.flip(-1), x)
    whole = (still < 0.5).float()
    zoom = 1 + (1 - whole) * (0.3 * zoom - 0.05)
    shift = torch.randint(-2, 3, (n, 2), device=device) * (2 / SIZE)
    x = move(x, zoom, (1 - whole) * (turn - 0.5) * 0.3, shift, mode="bicubic")
    tint = 1 + (1 - whole).view(-1, 1, 1, 1) * 0.16 * (torch.rand(n, 3, 1, 1, device=device) - 0.5)
    drawn = (1 - x).amax(1, keepdim=True) > 0.05  # the paper stays white
    return torch.where(drawn, ((x + 1) * tint - 1).clamp(-1, 1), x)


@torch.no_grad()
def encode_copies(vae: AutoencoderKL, images: np.ndarray, rows: list[dict], copies: int) -> Tensor:
    """Scaled latents of the drawings as they are and of copies - 1 variations.

    `[copies, n, 2, 4, 16, 16]`, fp16: mean and standard deviation.
    """
    device, found = vae.device, []
    pictures = torch.as_tensor(images, device=device)
    mirror = torch.tensor([r["category"] in FLIPPED for r in rows], device=device)
    for copy in range(copies):
        parts = []
        for part, flips in zip(pictures.split(512), mirror.split(512), strict=True):
            x = to_tensor(part)
            x = vary(x, flips) if copy else x
            if copy >= copies - shaded_copies(copies):
                x = shade(x, 0.5, 1.25, share=1.0)
            parts.append((encode(vae, x) * vae.config.scaling_factor).half())
        found.append(torch.cat(parts))
    return torch.stack(found)


class Losses:
    """Per-sample losses over the running mean of their timestep stratum."""

    def __init__(self, device: torch.device | str) -> None:
        self.mean = torch.zeros(STRATA, device=device)
        self.steps = torch.zeros((), device=device)

    def weigh(self, losses: Tensor) -> Tensor:
        """`losses` `[n]` in the order of the strata, equally many of each -> the scalar to
        descend."""
        losses = losses.view(STRATA, -1).mean(1)
        with torch.no_grad():
            self.steps += 1
            self.mean += (losses - self.mean) * (1 / self.steps).clamp(min=0.01)
        # A copy, for the next step changes the mean in place.
        return (losses * 0.1 / self.mean.clone()).mean()


def build(
    tokenizer_folder: Path, vae_folder: Path, init: Path | None = None, size: Size = Size()
) -> StableDiffusionPipeline:
    """fp32, with fresh weights of this size unless `init` is a saved pipeline."""
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
        unet = UNet2DConditionModel(**(UNET | size.unet))
        text = CLIPTextModel(CLIPTextConfig(vocab_size=len(tokenizer), **ids, **(TEXT | size.text)))
    return StableDiffusionPipeline(
        vae=AutoencoderKL.from_pretrained(
            vae_folder, torch_dtype=torch.float32, local_files_only=True
        ),
        text_encoder=text.train(),
        tokenizer=tokenizer,
        unet=unet.train(),
        scheduler=DDIMScheduler(set_alpha_to_one=False, steps_offset=1, **SCHEDULE),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def parameter_groups(pipe: StableDiffusionPipeline, rate: float) -> list[dict]:
    groups: list[dict] = []
    for module, lr in ((pipe.unet, rate * UNET_LR), (pipe.text_encoder, rate * TEXT_LR)):
        matrices = [p for p in module.parameters() if p.ndim > 1]
        others = [p for p in module.parameters() if p.ndim <= 1]
        groups += [{"params": matrices, "peak": lr, "weight_decay": WEIGHT_DECAY}]
        groups += [{"params": others, "peak": lr, "weight_decay": 0.0}]
    return groups


def step_losses(
    pipe: StableDiffusionPipeline,
    latents: Tensor,
    ids: Tensor,
    t: Tensor,
    alphas_cumprod: Tensor,
    noise: Tensor,
) -> Tensor:
    """Epsilon-MSE of every sample `[n]`, for scaled latents and noise `[n, 4, 16, 16]`, tokens
    `[n, 32]` and timesteps `[n]`."""
    level = alphas_cumprod[t].view(-1, 1, 1, 1)
    noisy = level.sqrt() * latents + (1 - level).sqrt() * noise
    length = ids.shape[1]
    # transformers makes the causal mask otherwise while a graph is captured than before: give it.
    causal = torch.ones(1, 1, length, length, dtype=torch.bool, device=ids.device).tril()
    with bf16(noisy.device):
        text = pipe.text_encoder(ids, attention_mask=causal)[0]
        predicted = pipe.unet(noisy, t, text, return_dict=False)[0]
    return (predicted.float() - noise).square().mean((1, 2, 3))


def stratified_timesteps(n: int, device: torch.device | str) -> Tensor:
    """One in each of n equal strata, in order: less noise in the gradient, the same expectation.
    `[n]`."""
    places = torch.arange(n, device=device) + torch.rand(n, device=device)
    return (places * (1000 / n)).long().clamp(max=999)


def train(
    pipe: StableDiffusionPipeline,
    latents: Tensor,
    rows: list[dict],
    plan: Plan,
    *,
    batch: int,
    rate: float = 1.0,
) -> float:
    """Train the pipeline's UNet and text encoder in place, up to their averaged weights.

    `latents` `[copies, n, 2, 4, 16, 16]` of `encode_copies`; `batch` is a multiple of 32,
    `rate` the share of the learning rates. Returns the mean epsilon-MSE since the last report.
    """
    if batch % STRATA:
        raise SystemExit(f"--batch-size is {batch}: give a multiple of {STRATA}.")
    device, copies = latents.device, len(latents)
    weights = [
        SKIN_TONE_WEIGHT if r["skin"] else RARE_WEIGHT if r["category"] in RARE else 1.0
        for r in rows
    ]
    shares = cumulative(weights, device)
    ids = tokenise(pipe.tokenizer, rows).to(device)
    forms = torch.stack([cumulative(chances(f), device) for f in (FORMS, NO_STYLE)])
    alphas_cumprod = DDPMScheduler(**SCHEDULE).alphas_cumprod.to(device)
    losses = Losses(device)

    def loss() -> tuple[Tensor, Tensor]:
        index = draw(shares, batch)
        copy = torch.randint(copies, (batch,), device=device)
        shaded = (copy >= copies - shaded_copies(copies)).long()
        chance = torch.rand(batch, 1, dtype=torch.float64, device=device)
        said = torch.searchsorted(forms[shaded], chance, right=True).squeeze(1)
        mean, std = latents[copy, index].float().unbind(1)
        x = mean + std * torch.randn_like(mean)
        t = stratified_timesteps(batch, device)
        noise = torch.randn_like(x)
        each = step_losses(pipe, x, ids[index, said], t, alphas_cumprod, noise)
        return losses.weigh(each), each.mean()

    modules = nn.ModuleDict({"unet": pipe.unet, "text": pipe.text_encoder})
    running = (losses.mean, losses.steps)
    return Training(modules, parameter_groups(pipe, rate), loss, plan, running).run()


def save(pipe: StableDiffusionPipeline, tokenizer_folder: Path, folder: Path) -> None:
    """fp16 weights, and the classic tokenizer files beside the new one."""
    for part in (pipe.unet, pipe.text_encoder, pipe.vae):
        part.half()
    pipe.save_pretrained(folder, safe_serialization=True)
    for name in ("vocab.json", "merges.txt"):
        shutil.copy(tokenizer_folder / name, folder / "tokenizer" / name)


def main() -> None:
    parser = arguments(__doc__, BUILD / "model", steps=20000)
    add_arguments(parser, BATCH)
    parser.add_argument("--size", choices=SIZES, default="embedded", help="where --init is not")
    parser.add_argument("--copies", type=int, default=24, help="variations of every drawing")
    parser.add_argument("--warm-up", type=int, help="steps, not the size's own")
    parser.add_argument("--ema-decay", type=float, help="of the averaged weights, likewise")
    parser.add_argument("--init", type=Path, help="a saved pipeline to start from")
    parser.add_argument("--tokenizer", type=Path, default=EMBEDDED / "tokenizer")
    parser.add_argument("--vae", type=Path, default=BUILD / "vae", help="made by train_vae.py")
    args = parser.parse_args()
    start(args)
    images, rows = load_drawings(args.data)
    size = SIZES[args.size]
    pipe = build(args.tokenizer, args.vae, args.init, size).to(args.device)
    latents = encode_copies(pipe.vae, images, rows, args.copies)
    steps = plan(args, args.warm_up or size.warm_up, args.ema_decay or size.ema_decay)
    loss = train(pipe, latents, rows, steps, batch=args.batch_size, rate=size.rate)
    save(pipe, args.tokenizer, args.output)
    record(args.output, args, epsilon_mse=round(loss, 4))


if __name__ == "__main__":
    main()
