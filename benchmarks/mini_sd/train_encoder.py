"""Train a small picture encoder that puts different drawings of one emoji near each other.

    python benchmarks/mini_sd/train_encoder.py --steps 1100 --data DIR --output encoder.safetensors

It measures on 64 px emoji what DINO measures on photographs: how alike the subjects of two pictures
are. It learns from pairs of Twitter's and Google's drawings of one emoji; Fluent 3D is kept out of
the training, and only the retrieval at the end reads it. `--unseen 0.1` leaves a tenth of the emoji
out of the training too (for choosing settings without looking at Fluent 3D).
"""

from __future__ import annotations

import json
import time
from collections import defaultdict
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from common import (
    BUILD,
    SIZE,
    arguments,
    learning_rate,
    load,
    move,
    report_due,
    shade,
    start,
    to_tensor,
)
from safetensors import safe_open
from safetensors.torch import save_file
from subjects import SUBJECTS, choose
from torch import Tensor, nn
from torch.nn import functional as F

PAIRS, PEAK_LR, WARM_UP, WEIGHT_DECAY, TEMPERATURE = 128, 2e-3, 50, 0.05, 0.07
CHANNELS, FEATURES = (24, 48, 96, 192), 128
VENDORS = ("twitter", "google")


class Block(nn.Module):
    """Two 3x3 convolutions beside a 1x1 one; halves the sides."""

    def __init__(self, into: int, out: int) -> None:
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(into, out, 3, 2, 1, bias=False), nn.BatchNorm2d(out)
        self.conv2, self.norm2 = nn.Conv2d(out, out, 3, 1, 1, bias=False), nn.BatchNorm2d(out)
        self.skip = nn.Conv2d(into, out, 1, 2, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x))))) + self.skip(x))


class Encoder(nn.Module):
    """Pictures `[n, 3, 64, 64]` in [-1, 1] -> features `[n, 128]` of length one: their products are
    cosines."""

    def __init__(self) -> None:
        super().__init__()
        first = CHANNELS[0]
        self.stem, self.norm = nn.Conv2d(3, first, 5, 2, 2, bias=False), nn.BatchNorm2d(first)
        self.blocks = nn.Sequential(*(Block(a, b) for a, b in pairwise(CHANNELS)))
        self.head = nn.Linear(CHANNELS[-1], FEATURES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks(F.relu(self.norm(self.stem(x))))
        return F.normalize(self.head(x.mean((2, 3))).float(), dim=1)


def load_encoder(file: Path) -> Encoder:
    """The encoder that `save` wrote, fp32, for use."""
    encoder = Encoder()
    with safe_open(file, "pt") as stored:
        state = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118 (not a dict)
    encoder.load_state_dict(
        {name: v.float() if v.is_floating_point() else v for name, v in state.items()}
    )
    return encoder.eval()


def save(encoder: Encoder, file: Path, about: dict) -> None:
    """fp16; `about` goes into the metadata."""
    state = {
        name: v.half() if v.is_floating_point() else v for name, v in encoder.state_dict().items()
    }
    file.parent.mkdir(parents=True, exist_ok=True)
    save_file({k: v.contiguous() for k, v in state.items()}, file, {"about": json.dumps(about)})


@torch.no_grad()
def embed(encoder: Encoder, images: np.ndarray) -> Tensor:
    """uint8 `[n, 64, 64, 3]` -> features `[n, 128]`."""
    return torch.cat([encoder(to_tensor(images[i : i + 256])) for i in range(0, len(images), 256)])


def augment(x: Tensor) -> Tensor:
    """What differs between vendors and not between emoji: place and size, light and shading, tint,
    sharpness. No flips and no exchange of colours: they tell some emoji apart."""
    n = len(x)
    zoom, turn = 0.85 + 0.35 * torch.rand(n), (torch.rand(n) - 0.5) * 0.4
    x = shade(move(x, zoom, turn, (torch.rand(n, 2) - 0.5) * 0.2))
    gain, gamma = 0.8 + 0.4 * torch.rand(n, 3, 1, 1), (torch.rand(n, 1, 1, 1) - 0.5).exp()
    drawn = (1 - x).amax(1, keepdim=True) > 0.05  # the paper stays white
    x = torch.where(drawn, (((x + 1) / 2).pow(gamma) * gain * 2 - 1).clamp(-1, 1), x)
    grey = torch.rand(n, 1, 1, 1) < 0.1
    x = torch.where(grey, x.mean(1, keepdim=True).expand_as(x), x)
    soft = F.avg_pool2d(F.pad(x, (1, 1, 1, 1), mode="replicate"), 3, 1)
    return torch.where(torch.rand(n, 1, 1, 1) < 0.3, soft, x)


def contrast(a: Tensor, b: Tensor) -> Tensor:
    """Each row of `a` shall be nearest to the same row of `b`, and the other way round. `[n, 128]`
    each."""
    logits = a @ b.T / TEMPERATURE
    right = torch.arange(len(a))
    return (F.cross_entropy(logits, right) + F.cross_entropy(logits.T, right)) / 2


def find_pairs(rows: list[dict]) -> Tensor:
    """Indices of Twitter's and Google's drawing of every emoji that both have, `[n, 2]`; skin tones
    left out."""
    found: dict[str, dict[str, int]] = defaultdict(dict)
    for i, row in enumerate(rows):
        if not row["skin"]:
            found[row["unified"]][row["vendor"]] = i
    return torch.tensor([[f[v] for v in VENDORS] for f in found.values() if len(f) == len(VENDORS)])


def train(images: np.ndarray, pairs: Tensor, *, steps: int, seed: int = 0) -> Encoder:
    """`images` uint8 `[n, 64, 64, 3]`, `pairs` of their indices `[m, 2]`."""
    pixels = to_tensor(images)
    encoder = Encoder().to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(
        encoder.parameters(), weight_decay=WEIGHT_DECAY, betas=(0.9, 0.98)
    )
    generator = torch.Generator().manual_seed(seed)
    started, n = time.monotonic(), min(PAIRS, len(pairs))
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps, WARM_UP, PEAK_LR)
        chosen = pairs[torch.randperm(len(pairs), generator=generator)[:n]]
        x = augment(pixels[chosen.T.reshape(-1)]).contiguous(memory_format=torch.channels_last)
        with torch.autocast("cpu", torch.bfloat16):
            features = encoder(x)
        loss = contrast(features[:n], features[n:])
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        if report_due(step, steps):
            print(
                f"{time.monotonic() - started:.0f} s, step {step + 1}: loss {loss.item():.4f}",
                flush=True,
            )
    return encoder.eval()


def retrieval(
    queries: Tensor, asked: list[str], gallery: Tensor, held: list[str]
) -> dict[str, float]:
    """Share of the queries whose own emoji comes first, or among the first five, in the gallery.
    Queries without one are left out.

    Features `[n, f]` and `[m, f]` of length one, and the emoji each row shows.
    """
    place = {name: i for i, name in enumerate(held)}
    rows = [i for i, name in enumerate(asked) if name in place]
    likeness = queries[rows] @ gallery.T
    own = likeness[torch.arange(len(rows)), torch.tensor([place[asked[i]] for i in rows])]
    rank = (likeness > own[:, None]).sum(1)
    return {
        "top1": round((rank < 1).float().mean().item(), 3),
        "top5": round((rank < 5).float().mean().item(), 3),
    }


def own_subject(features: Tensor, rows: list[dict]) -> dict[str, str]:
    """Held-out pictures of each subject that are nearer, on average, to its own training pictures
    than to any other subject's.

    `features` `[n, f]` of the Fluent 3D drawings in `rows`.
    """
    parts = {name: choose(rows, subject) for name, subject in SUBJECTS.items()}
    found = {}
    for place, (name, part) in enumerate(parts.items()):
        held_out = features[part["heldout"]]
        likeness = torch.stack(
            [(held_out @ features[p["train"]].T).mean(1) for p in parts.values()], 1
        )
        found[name] = f"{int((likeness.argmax(1) == place).sum())}/{len(held_out)}"
    return found


def flat(images: np.ndarray) -> Tensor:
    """The pixels themselves as features, for comparison: how far one gets without an encoder."""
    return F.normalize(1 - to_tensor(images).flatten(1), dim=1)


def measure(
    encoder: Encoder, images: np.ndarray, pairs: Tensor, rows: list[dict], data: Path
) -> dict[str, dict]:
    """Retrieval in galleries of one vendor: of the other vendor's drawings, and of Fluent 3D's; and
    the subjects told apart."""
    fluent, fluent_rows = load(data, "fluent")
    names = [rows[i]["unified"] for i in pairs[:, 0].tolist()]
    results = {}
    for label, features in (("encoder", lambda x: embed(encoder, x)), ("pixels", flat)):
        twitter, google = (features(images[column.numpy()]) for column in pairs.T)
        queries, asked = features(fluent), [r["unified"] for r in fluent_rows]
        results[label] = {
            "google_in_twitter": retrieval(google, names, twitter, names),
            "fluent_in_twitter": retrieval(queries, asked, twitter, names),
            "fluent_in_google": retrieval(queries, asked, google, names),
            "own_subject": own_subject(queries, fluent_rows),
        }
    return results


def main() -> None:
    parser = arguments(__doc__, BUILD / "encoder.safetensors", steps=1100)
    parser.add_argument(
        "--unseen", type=float, default=0.0, help="share of the emoji kept out of the training"
    )
    args = parser.parse_args()
    start(args)
    images, rows = load(args.data, "pretrain")
    pairs = find_pairs(rows)
    pairs = pairs[torch.randperm(len(pairs), generator=torch.Generator().manual_seed(0))]
    unseen = round(args.unseen * len(pairs))
    encoder = train(images, pairs[unseen:], steps=args.steps, seed=args.seed)
    about = {k: getattr(args, k) for k in ("steps", "seed", "threads", "unseen")} | {"size": SIZE}
    if unseen:
        new, names = pairs[:unseen], [str(i) for i in range(len(pairs))]
        google, twitter = embed(encoder, images[new[:, 1]]), embed(encoder, images[pairs[:, 0]])
        about["retrieval_of_unseen"] = retrieval(google, names[:unseen], twitter, names)
    else:
        about["retrieval"] = measure(encoder, images, pairs, rows, args.data)
    save(encoder, args.output, about)
    print(json.dumps(about, indent=1))


if __name__ == "__main__":
    main()
