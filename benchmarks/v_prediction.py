"""Does calibration and training work on a v-prediction model with zero terminal SNR? None is small
enough, so the embedded model's UNet is first taught to be one:

    python benchmarks/v_prediction.py --output v-prediction

It goes on from the embedded weights on pictures that the embedded model draws itself, with v
targets on the rescaled schedule. Then the sample subject is learnt twice: as what the model is, and
as epsilon, what an unmarked file used to be taken for. Both LoRAs are measured by the true loss.
Prints one JSON object; `samples.png` shows base, right and wrong.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import time
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from cntlora_core.config import CalibrationConfig, TrainConfig
from cntlora_core.data.batches import fixed_noised, mean_loss
from cntlora_core.data.dataset import read_subject
from cntlora_core.data.encoded import EncodedImages
from cntlora_core.lora.adapter import attached_lora
from cntlora_core.model.conditioning import Conditioning, encode_prompts
from cntlora_core.model.denoising_loss import denoising_loss
from cntlora_core.model.loader import MINI_SD_FOLDER, StableDiffusion, load_checkpoint
from cntlora_core.model.noise_schedule import stratified_timesteps
from cntlora_core.model.prediction import EPSILON, V_ZERO_SNR, scheduler_keys
from cntlora_core.model.sampling import sample, sample_latents
from cntlora_core.report.charts import sample_sheet
from cntlora_core.run.runs import run_training

NAMES = """cat face, dog face, fox face, bear face, rabbit face, tiger face, monkey face, panda face
grinning face, crying face, face with tears of joy, smiling face with sunglasses, red heart
blue heart, green heart, yellow heart, star, fire, sun, cloud, rainbow, evergreen tree, cactus
rose, sunflower, red apple, banana, pizza, hamburger, birthday cake, automobile, taxi, bus, bicycle
airplane, house building, clock face one oclock, soccer ball, basketball, gift"""
PROMPT, SEEDS = "a sks cat face emoji", (0, 1, 2, 3)
EACH, DRAW_STEPS, BATCH, LR = 4, 12, 16, 5e-4


def draw(model: StableDiffusion) -> tuple[Tensor, list[str]]:
    """What the model makes of every name: latents `[n, 4, 16, 16]` and their prompts."""
    prompts = [f"{name} emoji" for name in re.split(r",\s|\n", NAMES) for _ in range(EACH)]
    seeds = range(len(prompts))
    groups = [slice(i, i + 32) for i in range(0, len(prompts), 32)]
    parts = [sample_latents(model, prompts[g], seeds[g], steps=DRAW_STEPS) for g in groups]
    return torch.cat(parts), prompts


def teach(model: StableDiffusion, latents: Tensor, prompts: list[str], steps: int) -> list[float]:
    """Train the whole UNet in place by the model's own loss; returns the mean loss of each
    fifth."""
    words = [*prompts, ""]
    conditioning = encode_prompts(model, words)
    generator = torch.Generator().manual_seed(0)
    parameters = list(model.unet.requires_grad_(True).parameters())
    optimizer = torch.optim.AdamW(parameters, lr=LR, betas=(0.9, 0.99), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    losses = []
    for _ in range(steps):
        rows = torch.randint(len(prompts), (BATCH,), generator=generator)
        empty = torch.rand(BATCH, generator=generator) < 0.1
        seen: Conditioning = conditioning[torch.where(empty, len(prompts), rows)]
        t = stratified_timesteps(BATCH, len(model.schedule), generator)
        noise = torch.randn(latents[rows].shape, generator=generator)
        loss = denoising_loss(model, latents[rows], t, noise, seen).mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        losses.append(float(loss.detach()))
    model.unet.requires_grad_(False)
    fifth = max(1, steps // 5)
    return [
        round(sum(p) / len(p), 4) for i in range(0, steps, fifth) if (p := losses[i : i + fifth])
    ]


def save(model: StableDiffusion, folder: Path) -> None:
    """The embedded folder with the new UNet and a scheduler that says what it is."""
    shutil.copytree(MINI_SD_FOLDER / "model", folder, dirs_exist_ok=True)
    model.unet.save_pretrained(folder / "unet", safe_serialization=True)
    config = model.scheduler_config | scheduler_keys(V_ZERO_SNR)
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(config, indent=1))


def learn(model: StableDiffusion, subject: EncodedImages, steps: int) -> dict[str, dict]:
    """LoRAs at step 0 and trained."""
    start = CalibrationConfig(rank=4)
    training = TrainConfig(steps=steps, learning_rate=3e-3, batch_size=4, validate_every=0)
    run = run_training(model, subject, start, training)
    return {"step 0": run.start.lora, "trained": run.lora}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--teach-steps", type=int, default=300)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    started, folder = time.monotonic(), args.output / "model"
    report: dict = {}
    if not folder.exists():
        model = load_checkpoint("mini-sd", prediction=V_ZERO_SNR)
        latents, prompts = draw(load_checkpoint("mini-sd"))
        report["teaching"] = teach(model, latents, prompts, args.teach_steps)
        save(model, folder)
    model = load_checkpoint(folder)
    assert model.schedule.prediction == V_ZERO_SNR
    subject = read_subject(model, MINI_SD_FOLDER / "subject", PROMPT)
    held_out = fixed_noised(
        read_subject(model, MINI_SD_FOLDER / "heldout", PROMPT), len(model.schedule)
    )
    wrong = load_checkpoint(folder, prediction=EPSILON)
    rows = [("base", sample(model, [PROMPT] * len(SEEDS), SEEDS))]
    report["base"] = mean_loss(model, held_out, 8)
    for name, taken in (("right", model), ("wrong", replace(wrong, unet=model.unet))):
        for stage, lora in learn(taken, subject, args.steps).items():
            with attached_lora(model.unet, lora):
                report[f"{name}: {stage}"] = mean_loss(model, held_out, 8)
                rows.append((f"{name}: {stage}", sample(model, [PROMPT] * len(SEEDS), SEEDS)))
    sample_sheet(rows, title=PROMPT).save(args.output / "samples.png")
    report["seconds"] = round(time.monotonic() - started, 1)
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
