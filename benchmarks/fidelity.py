"""What the loss does not tell: whether a LoRA draws its subject, still draws the rest, and how much
it has forgotten.

    python benchmarks/fidelity.py lora.safetensors
    python benchmarks/fidelity.py lora.safetensors --subject subjects/hearts \\
        --data mini-sd-build/data

The first is of the embedded subject. Prints one JSON object for a LoRA of the embedded model: its
scores, the base model's, and those of the subject's training pictures. `--subject` is a folder with
`train/` and `heldout/` (benchmarks/mini_sd/subjects.py makes them), `--data` what
benchmarks/mini_sd/prepare_data.py made: without it forgetting is left out. The functions measure
the model as it stands.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from subject_folders import prompts_of
from torch import Tensor

from cntlora_core.data.batches import NoisedSet, fixed_noised, mean_loss
from cntlora_core.data.class_images import class_noised
from cntlora_core.data.dataset import encode_subject
from cntlora_core.data.images import Picture, find_pictures
from cntlora_core.defaults import MINI_SD
from cntlora_core.lora.adapter import attached_lora
from cntlora_core.lora.file import load_lora
from cntlora_core.lora.targets import ALL, find_projections
from cntlora_core.model.loader import MINI_SD_FOLDER, StableDiffusion, load_checkpoint
from cntlora_core.model.sampling import decode, sample_latents

sys.path.append(
    str(Path(__file__).parent / "mini_sd")
)  # its scripts import each other by bare names
from common import SIZE, load
from train_encoder import VENDORS, Encoder, embed, find_pairs, load_encoder

ENCODER = Path(__file__).parent / "mini_sd" / "encoder.safetensors"
STEPS, GUIDANCE = 12, 4.0  # of DDIM: 25 steps draw the same things; guidance as in the previews
SUBJECT_SEEDS, CLASS_SEEDS, UNRELATED_SEEDS = range(16), range(100, 108), range(200, 202)
# What the embedded model draws well, and the class of subject to which it is not unrelated.
UNRELATED = {
    "a grinning face emoji": "smiley face",
    "a red heart emoji": "heart",
    "blue heart emoji": "heart",
    "an automobile emoji": "car",
    "a taxi emoji": "car",
    "a bus emoji": "car",
    "a dog face emoji": "animal face",
    "a bear face emoji": "animal face",
    "a fox face emoji": "animal face",
    "an evergreen tree emoji": "tree",
    "a house building emoji": "building",
    "a clock face one oclock emoji": "clock",
}
EMBEDDED, BATCH = ("a sks cat face emoji", "a cat face emoji"), 16
MEASURED, PRIOR = (
    48,
    32,
)  # pictures of the pre-training domain: to measure forgetting with, and for C_p


@dataclass(frozen=True)
class Reference:
    """What every LoRA of a subject is measured against.

    `train` and `held_out` are features of the subject's pictures `[n, f]`; `asked` are the class
    prompt (8 times) and the unrelated ones (each twice), `seeds` theirs, and `drawn` `[len(asked),
    f]` what the base model makes of them.
    """

    encoder: Encoder
    prompt: str
    train: Tensor
    held_out: Tensor
    asked: tuple[str, ...]
    seeds: tuple[int, ...]
    drawn: Tensor


def reference(
    model: StableDiffusion,
    train: Sequence[Image.Image],
    held_out: Sequence[Image.Image],
    prompt: str,
    class_prompt: str,
) -> Reference:
    """Call it with nothing attached: the base model draws the prompts (5 s)."""
    encoder = load_encoder(ENCODER)
    unrelated = [p for p, kind in UNRELATED.items() if kind not in class_prompt]
    asked = [(class_prompt, s) for s in CLASS_SEEDS] + [
        (p, s) for p in unrelated for s in UNRELATED_SEEDS
    ]
    prompts, seeds = zip(*asked, strict=True)
    return Reference(
        encoder=encoder,
        prompt=prompt,
        train=features(encoder, train),
        held_out=features(encoder, held_out),
        asked=prompts,
        seeds=seeds,
        drawn=draw(model, encoder, prompts, seeds),
    )


def halves_of(subject: Path | None) -> tuple[tuple[Path, Path], tuple[str, str]]:
    """The folders of training and of held-out pictures, and the two prompts; of the embedded
    subject when None."""
    if subject is None:
        return (MINI_SD_FOLDER / "subject", MINI_SD_FOLDER / "heldout"), EMBEDDED
    return (subject / "train", subject / "heldout"), prompts_of(subject)


def subject_reference(
    model: StableDiffusion, folders: tuple[Path, Path], prompts: tuple[str, str]
) -> Reference:
    """Of pictures in folders; as `reference`."""
    train, held_out = ([p.image for p in find_pictures(f)] for f in folders)
    return reference(model, train, held_out, *prompts)


def features(encoder: Encoder, pictures: Sequence[Image.Image]) -> Tensor:
    """Pictures of any size -> features of length one, `[n, f]`."""
    small = [p.convert("RGB").resize((SIZE, SIZE), Image.Resampling.LANCZOS) for p in pictures]
    return embed(encoder, np.stack([np.asarray(p) for p in small]))


def draw(
    model: StableDiffusion, encoder: Encoder, prompts: Sequence[str], seeds: Sequence[int]
) -> Tensor:
    """Features `[n, f]` of what the model draws; equal seeds start from equal noise, whatever is
    attached."""
    return features(
        encoder,
        decode(model, sample_latents(model, prompts, seeds, steps=STEPS, guidance=GUIDANCE)),
    )


def subject_fidelity(model: StableDiffusion, to: Reference) -> dict[str, float]:
    return subject_scores(
        draw(model, to.encoder, [to.prompt] * len(SUBJECT_SEEDS), SUBJECT_SEEDS), to
    )


def prompt_fidelity(model: StableDiffusion, to: Reference) -> dict[str, float]:
    return prompt_scores(draw(model, to.encoder, to.asked, to.seeds), to)


def subject_scores(x: Tensor, to: Reference) -> dict[str, float]:
    """How like the subject are drawings of its prompt, features `x` `[n, f]`: cosines, averaged
    over the drawings.

    `subject`: mean over the held-out pictures. `subject_nearest`: the nearest of them. `copying`:
    the nearest training picture. `variety`: 1 - mean likeness of two drawings. Over three subjects,
    two starts and steps 0 to 800 the first two order the LoRAs alike (rank correlation 0.9). Read
    `subject`: both tell the start from step 20 (paired t 1.8 to 6.7, nearest 2.7 to 7.0), but the
    nearest misses what steps 20 to 60 do for gaussian hearts and cars (-0.3; mean 1.1 and 2.5), and
    it rises when all drawings become one. Neither shows every overfit: cars from `target` look best
    after 800 steps, their held-out loss then worse than the base model's.
    """
    likeness = x @ to.held_out.T
    others = x @ x.T
    return {
        "subject": float(likeness.mean()),
        "subject_nearest": float(likeness.amax(1).mean()),
        "copying": float((x @ to.train.T).amax(1).mean()),
        "variety": float(1 - (others.sum() - others.trace()) / (len(x) * (len(x) - 1))),
    }


def prompt_scores(x: Tensor, to: Reference) -> dict[str, float]:
    """How like the base model's drawings from the same noise are those of the model, features `x`
    `[len(asked), f]`.

    `class` and `unrelated`: mean cosines of the pairs, 1 for the base model. Of two drawings of one
    unrelated prompt it is 0.8, of two prompts 0.04. `leak`: likeness of what the class prompt draws
    to the held-out pictures; above the base model's own, the class became the subject, below it
    fell apart. Pixels and latents order LoRAs of cat faces as `unrelated` does.
    """
    kept = (x * to.drawn).sum(1)
    n = len(CLASS_SEEDS)
    return {
        "class": float(kept[:n].mean()),
        "unrelated": float(kept[n:].mean()),
        "leak": float((x[:n] @ to.held_out.T).mean()),
    }


# --- forgetting -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Domain:
    """The pre-training domain: fixed triples to measure forgetting with, and the base model's loss
    on them."""

    triples: NoisedSet
    base: float


def domain(model: StableDiffusion, data: Path) -> Domain:
    """Call it with nothing attached."""
    triples = fixed_noised(encode_subject(model, domain_pictures(data)[0], ""), len(model.schedule))
    return Domain(triples, mean_loss(model, triples, BATCH))


def forgetting(model: StableDiffusion, of: Domain) -> float:
    """Denoising loss on 48 pictures of the pre-training domain with their own captions, relative to
    the base model's: 1 is nothing forgotten."""
    return mean_loss(model, of.triples, BATCH) / of.base


def prior_triples(model: StableDiffusion, data: Path) -> NoisedSet:
    """32 other pictures of the domain, each once at stratified timesteps: `prior` of calibrate, for
    C_p."""
    return class_noised(model, encode_subject(model, domain_pictures(data)[1], ""))


def domain_pictures(data: Path) -> tuple[list[Picture], list[Picture]]:
    """48 and 32 emoji at equal distances in the data's order, which is Unicode's: of every five,
    three to measure with and two for C_p; the vendors take turns."""
    images, rows = load(data, "pretrain")
    pairs = find_pairs(rows)
    count = MEASURED + PRIOR
    chosen = [int(pairs[n * len(pairs) // count, n % len(VENDORS)]) for n in range(count)]
    pictures = [_picture(images[i], rows[i]) for i in chosen]
    share = 5 * MEASURED // count
    return [p for n, p in enumerate(pictures) if n % 5 < share], [
        p for n, p in enumerate(pictures) if n % 5 >= share
    ]


def _picture(image: np.ndarray, row: dict[str, Any]) -> Picture:
    digest = hashlib.sha256(image.tobytes()).hexdigest()
    caption = f"{row['name']} emoji, {row['vendor']} style"
    return Picture(
        f"{row['unified']} {row['vendor']}", Image.fromarray(image), digest, caption=caption
    )


def measure(model: StableDiffusion, to: Reference, of: Domain | None = None) -> dict[str, float]:
    """All scores of the model as it stands: 48 pictures, 8 s of one thread, and 2.5 s more for
    forgetting."""
    scores = subject_fidelity(model, to) | prompt_fidelity(model, to)
    if of:
        scores["forgetting"] = forgetting(model, of)
    return scores


# --- a file ---------------------------------------------------------------------------------------


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("lora", type=Path)
    parser.add_argument(
        "--subject",
        type=Path,
        help="a folder with train/ and heldout/; the embedded one by default",
    )
    parser.add_argument("--data", type=Path, help="pretrain.npz and pretrain.jsonl, for forgetting")
    args = parser.parse_args()
    torch.set_num_threads(1)  # equal sums everywhere; two beside a busy process were far slower
    model = load_checkpoint(MINI_SD)
    lora, _ = load_lora(args.lora, find_projections(model.unet, ALL), model.family)
    to = subject_reference(model, *halves_of(args.subject))
    of = domain(model, args.data) if args.data else None
    result = {"base": measure(model, to, of), "training_pictures": subject_scores(to.train, to)}
    with attached_lora(model.unet, lora):
        result["lora"] = measure(model, to, of)
    print(
        json.dumps(
            {whose: {name: round(v, 4) for name, v in s.items()} for whose, s in result.items()},
            indent=1,
        )
    )


if __name__ == "__main__":
    main()
