"""Which start reaches the best loss at what cost: CNTLoRA's beside PEFT's, each at its best
learning rate.

    python benchmarks/convergence.py --output quick.jsonl
    python benchmarks/convergence.py --output results.jsonl --methods all --seeds 0 1 2 \\
        --tune subjects/{cat_faces,hearts,animal_faces} --test subjects/{clocks,birds}

The first is of the embedded subject. A subject is a folder with `train/` and `heldout/`
(benchmarks/mini_sd/subjects.py makes them). Every method's learning rate is chosen on the `--tune`
subjects with the first seed, from a grid of factors of 2 that grows until the best is inside it,
and then kept: for their other seeds and for the `--test` subjects. Every run is a line of the
results file, and no run is made twice; several processes with different `--methods` may share the
file. Every run has `--cost` training steps to spend, calibration included: a forward and a backward
pass of a batch are a step, and a forward pass alone is half of one.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

from convergence_report import report
from peer_starts import METHODS, without
from starts import ALL, BATCH, OURS, Stopwatch, make_start, steps_worth
from subject_folders import PROMPT_ALONE, prompts_of
from tqdm import tqdm

from cntlora_core.config import TrainConfig
from cntlora_core.data.dataset import read_subject
from cntlora_core.data.encoded import EncodedImages
from cntlora_core.defaults import MINI_SD
from cntlora_core.events import Event, Validation
from cntlora_core.lora.adapter import attached_lora, parameter_count
from cntlora_core.model.loader import MINI_SD_FOLDER, StableDiffusion, load_checkpoint
from cntlora_core.training.loop import train
from cntlora_core.training.state import start_state
from cntlora_core.training.validation import validation_loss

QUICK = ["target balanced", "default", "gaussian"]
FIRST_RATES = {"ours": (1.5e-3, 3e-3, 6e-3), "peft": (3e-3, 6e-3, 1.2e-2)}
Row = dict[str, Any]


def run(
    model: StableDiffusion,
    subject: EncodedImages,
    held_out: EncodedImages,
    method: str,
    lr: float,
    seed: int,
    args: Any,
) -> Row:
    watch = Stopwatch(validation_loss(model, held_out, 16))
    base = watch.validate()
    begin, curve = make_start(model, subject, method, args.rank, seed, watch)
    cost = steps_worth(begin.forward, begin.backward)
    config = TrainConfig(
        steps=max(1, round(args.cost - cost)),
        learning_rate=lr,
        batch_size=BATCH,
        seed=seed,
        validate_every=args.every,
        keep_best=False,
        patience=0,
    )

    def note(event: Event) -> None:
        if isinstance(event, Validation):
            curve.append((cost + event.step, event.loss, watch.seconds()))

    with (
        without(model, begin.residuals),
        attached_lora(model.unet, begin.lora, trainable=True) as adapters,
    ):
        train(
            model,
            subject,
            start_state(model, adapters, config),
            config,
            validate=watch.validate,
            observer=note,
        )
    return {
        "start": cost,
        "step0": next(loss for c, loss, _ in curve if c >= cost) / base,
        "parameters": parameter_count(begin.lora),
        "curve": [(c, loss / base, round(seconds, 2)) for c, loss, seconds in curve],
    }


class Results:
    """The results file: runs that are there are not made again."""

    def __init__(self, args: Any) -> None:
        self.args, self.model = args, load_checkpoint(args.model)
        self.rows: dict[str, Row] = {}
        self.read()

    def read(self) -> None:
        if self.args.output.is_file():
            for line in self.args.output.read_text(encoding="utf-8").splitlines():
                row = json.loads(line)
                self.rows[json.dumps(row["key"])] = row

    def get(self, folder: Path, method: str, lr: float, seed: int) -> Row:
        key = [folder.name, method, lr, seed, self.args.cost, self.args.rank]
        if (done := self.rows.get(json.dumps(key))) is not None:
            return done
        train_folder, held_folder, prompt = _subject(folder)
        subject, held_out = (
            read_subject(self.model, part, prompt, PROMPT_ALONE)
            for part in (train_folder, held_folder)
        )
        row = {"key": key, **run(self.model, subject, held_out, method, lr, seed, self.args)}
        self.rows[json.dumps(key)] = row
        with self.args.output.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        return row

    def best_rate(self, method: str) -> float:
        """The rate with the lowest mean of the tuning subjects' best losses; the grid grows until
        it is inside."""
        rates = list(FIRST_RATES["ours" if method in OURS else "peft"])

        def best_loss(lr: float) -> float:
            rows = [self.get(folder, method, lr, self.args.seeds[0]) for folder in self.args.tune]
            return statistics.mean(min(loss for _, loss, _ in row["curve"]) for row in rows)

        while True:
            best = min(rates, key=best_loss)
            if best == min(rates) and len(rates) < 7:
                rates.append(best / 2)
            elif best == max(rates) and len(rates) < 7:
                rates.append(best * 2)
            else:
                return best


def _subject(folder: Path) -> tuple[Path, Path, str]:
    if not (folder / "train").is_dir():
        return folder, folder.parent / "heldout", "a sks cat face emoji"  # the embedded one
    prompt, _ = prompts_of(folder)
    return folder / "train", folder / "heldout", prompt


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--tune", nargs="+", type=Path, default=[MINI_SD_FOLDER / "subject"], metavar="DIR"
    )
    parser.add_argument("--test", nargs="+", type=Path, default=[], metavar="DIR")
    parser.add_argument("--methods", nargs="+", default=QUICK, help=f"{', '.join(ALL)}; or all")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1])
    parser.add_argument("--cost", type=int, default=120, help="training steps to spend")
    parser.add_argument("--every", type=int, default=10)
    parser.add_argument("--rank", type=int, default=4)
    parser.add_argument(
        "--model",
        default=MINI_SD,
        help="another checkpoint; its results belong into a file of their own",
    )
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--figure", type=Path, help="curves of the first tuning subject, .png")
    parser.add_argument("--report", action="store_true", help="only say what the file holds")
    args = parser.parse_args()
    methods = ALL if args.methods == ["all"] else args.methods
    if unknown := set(methods) - set(ALL):
        parser.error(f"unknown methods {', '.join(sorted(unknown))}: known are {', '.join(ALL)}")
    results = Results(args)
    if not args.report:
        for method in tqdm(methods):
            lr = results.best_rate(method)
            for folder in [*args.tune, *args.test]:
                for seed in args.seeds:
                    results.get(folder, method, lr, seed)
    results.read()
    rows = [r for r in results.rows.values() if r["key"][4:] == [args.cost, args.rank]]
    names = ([f.name for f in args.tune], [f.name for f in args.test])
    print(
        report(
            rows,
            *names,
            baselines=("default", "gaussian"),
            peers=tuple(METHODS),
            figure=args.figure,
        )
    )


if __name__ == "__main__":
    main()
