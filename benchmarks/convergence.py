"""Which start reaches the best loss at what cost: CNTLoRA's beside PEFT's, each at its best learning rate.

    python benchmarks/convergence.py --output results.jsonl                     # quick: the embedded subject, 2 seeds
    python benchmarks/convergence.py --subjects DIR --output results.jsonl --seeds 0 1 2 --methods all

`--subjects` holds a folder for each subject with `train/` and `heldout/` (benchmarks/mini_sd/subjects.py makes them). Every run is a
line of the results file; runs that are there are not made again. Cost is in training steps: a forward pass counts 1/3,
a backward pass 2/3, calibration included. The baseline is the better of PEFT's default and gaussian within the steps given.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

from peer_starts import METHODS, PeerStart, peer_start, without
from tqdm import tqdm

from cntlora_core.calibration import calibrate
from cntlora_core.checkpoint import MINI_SD, MINI_SD_FOLDER, StableDiffusion, load_checkpoint
from cntlora_core.config import CalibrationConfig, TrainConfig
from cntlora_core.lora import attached, parameter_count
from cntlora_core.report import loss_chart
from cntlora_core.runs import read_subject, validation_loss
from cntlora_core.subject import Subject
from cntlora_core.train import train
from cntlora_core.train_state import start_state

OURS = {
    f"{init} {rule}": CalibrationConfig(init=init, rank_rule=rule)
    for init in ("target", "domain")
    for rule in ("data", "uniform")
}
QUICK = ["target data", "default", "gaussian"]
RATES = {"target": (1.5e-3, 3e-3, 6e-3), "peft": (3e-3, 6e-3, 1e-2)}
BATCH = 4


def start(model: StableDiffusion, subject: Subject, method: str, rank: int, seed: int) -> PeerStart:
    if method in METHODS:
        return peer_start(model, subject, method, rank, seed)
    config = OURS[method]
    made = calibrate(model, subject, CalibrationConfig(config.init, rank, config.rank_rule, seed=seed))
    return PeerStart(made.lora, {}, made.report.forward_passes, made.report.backward_passes)


def run(
    model: StableDiffusion, subject: Subject, held_out: Subject, method: str, lr: float, seed: int, args: Any
) -> dict[str, Any]:
    began = time.perf_counter()
    begin = start(model, subject, method, args.rank, seed)
    validate = validation_loss(model, held_out, 8)
    config = TrainConfig(steps=args.steps, lr=lr, seed=seed, validate_every=args.every, keep_best=False)
    with without(model, begin.residuals), attached(model.unet, begin.lora, trainable=True) as adapters:
        state = start_state(model, adapters, config)
        train(model, subject, state, config, validate=validate)
    return {
        "cost": (begin.forward + 2 * begin.backward) / 3 / BATCH,
        "parameters": parameter_count(begin.lora),
        "curve": state.validations,
        "seconds": round(time.perf_counter() - began, 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--subjects", type=Path)
    parser.add_argument("--only", nargs="+", help="names under --subjects")
    parser.add_argument("--methods", nargs="+", default=QUICK, help=f"{', '.join([*OURS, *METHODS])}, or all")
    parser.add_argument("--rates", nargs="+", type=float, help="instead of the methods' own")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1])
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--every", type=int, default=10)
    parser.add_argument("--rank", type=int, default=4)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--figure", type=Path, help="curves of the first subject, .png")
    args = parser.parse_args()
    methods = [*OURS, *METHODS] if args.methods == ["all"] else args.methods
    model = load_checkpoint(MINI_SD)
    done = {json.dumps(row["key"]): row for row in _rows(args.output)}
    jobs = [
        (subject, method, lr, seed)
        for subject in _subjects(args)
        for seed in args.seeds
        for method in methods
        for lr in args.rates or RATES[method.split()[0] if method in OURS and "target" in method else "peft"]
    ]
    for (name, folder, prompt), method, lr, seed in tqdm(jobs):
        key = [name, method, lr, seed, args.steps, args.rank]
        if json.dumps(key) in done:
            continue
        subject = read_subject(model, folder[0], prompt)
        held_out = read_subject(model, folder[1], prompt)
        base = validation_loss(model, held_out, 8)()
        row = {"key": key, "base": base, **run(model, subject, held_out, method, lr, seed, args)}
        done[json.dumps(key)] = row
        with args.output.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
    report(list(done.values()), args.figure)


def _rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.is_file() else []


def _subjects(args: argparse.Namespace) -> list[tuple[str, tuple[Path, Path], str]]:
    if args.subjects is None:
        return [("cat_faces", (MINI_SD_FOLDER / "subject", MINI_SD_FOLDER / "heldout"), "a sks cat face emoji")]
    names = args.only or sorted(p.name for p in args.subjects.iterdir() if (p / "train").is_dir())
    folders = [(args.subjects / n / "train", args.subjects / n / "heldout") for n in names]
    return [(n, f, f"a sks {n.replace('_', ' ').rstrip('s')} emoji") for n, f in zip(names, folders, strict=True)]


def mean_curve(rows: list[dict[str, Any]]) -> list[tuple[int, float]]:
    """Mean over seeds of held-out loss, relative to the base model's."""
    steps = [step for step, _ in rows[0]["curve"]]
    return [(s, statistics.mean(r["curve"][i][1] / r["base"] for r in rows)) for i, s in enumerate(steps)]


def cost_to(curve: list[tuple[int, float]], goal: float, extra: float) -> float:
    """Steps, calibration included, at which the curve first reaches `goal`; infinite when it does not."""
    before: tuple[int, float] | None = None
    for step, loss in curve:
        if loss <= goal:
            if before is None:
                return extra + step
            share = (before[1] - goal) / (before[1] - loss)
            return extra + before[0] + share * (step - before[0])
        before = (step, loss)
    return float("inf")


def report(rows: list[dict[str, Any]], figure: Path | None) -> None:
    """One table of all subjects, and a line of medians for each method."""
    print("| subject | method | lr | interior | step 0 | best | at step | cost to the baseline's best |")
    print("|---|---|---|---|---|---|---|---|")
    shares: dict[str, list[float]] = {}
    starts: dict[str, list[float]] = {}
    for subject in dict.fromkeys(row["key"][0] for row in rows):
        chosen = {m: _best_rate([r for r in rows if r["key"][:2] == [subject, m]]) for m in _methods(rows, subject)}
        ordinary = [min(c[1], key=lambda p: p[1]) for m, c in chosen.items() if m in ("default", "gaussian")]
        at, goal = min(ordinary, key=lambda p: p[1]) if ordinary else (0, 0.0)
        for method, (lr, curve, extra, interior) in chosen.items():
            step, best = min(curve, key=lambda p: p[1])
            cost = cost_to(curve, goal, extra)
            if at:
                shares.setdefault(method, []).append(cost / at)
            starts.setdefault(method, []).append(curve[0][1])
            print(
                f"| {subject} | {method} | {lr:g} | {'yes' if interior else 'no'} | {curve[0][1]:.3f} | {best:.3f} | {step} "
                f"| {cost:.0f} of {at} ({cost / at if at else 0:.2f}) |"
            )
        if figure and subject == rows[0]["key"][0]:
            loss_chart({m: c[1] for m, c in chosen.items()}, title=f"{subject}: held-out loss", base=1.0).save(figure)
    print("\n| method | median share of the baseline's cost | median step 0 |\n|---|---|---|")
    for method, values in sorted(shares.items(), key=lambda item: statistics.median(item[1])):
        print(f"| {method} | {statistics.median(values):.2f} | {statistics.median(starts[method]):.3f} |")


def _methods(rows: list[dict[str, Any]], subject: str) -> list[str]:
    return list(dict.fromkeys(row["key"][1] for row in rows if row["key"][0] == subject))


def _best_rate(rows: list[dict[str, Any]]) -> tuple[float, list[tuple[int, float]], float, bool]:
    """The learning rate whose mean curve goes lowest, that curve, the start's cost, and whether rates on both sides were tried."""
    rates = sorted({row["key"][2] for row in rows})
    curves = {lr: mean_curve([r for r in rows if r["key"][2] == lr]) for lr in rates}
    best = min(rates, key=lambda lr: min(loss for _, loss in curves[lr]))
    extra = statistics.mean(r["cost"] for r in rows if r["key"][2] == best)
    return best, curves[best], extra, best not in (rates[0], rates[-1])


if __name__ == "__main__":
    main()
