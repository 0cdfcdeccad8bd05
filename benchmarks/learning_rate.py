"""Learning rates of the starts, each swept on its own: python benchmarks/learning_rate.py --steps
100 --seeds 0 1

Trains the embedded model on a subject (the sample one, or --subject DIR --heldout DIR --prompt
TEXT) from every start at every rate, and prints the held-out loss relative to the base model: at
step 0, at the end, and the best on the way. Mean over seeds.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import get_args

import torch
from subject_folders import PROMPT_ALONE

from cntlora_core.config import CalibrationConfig, Init, TrainConfig
from cntlora_core.data.dataset import read_subject
from cntlora_core.defaults import MINI_SD
from cntlora_core.model.loader import MINI_SD_FOLDER, load_checkpoint
from cntlora_core.run.runs import run_training
from cntlora_core.training.validation import validation_loss

RATES = (1.5e-3, 3e-3, 6e-3, 1e-2, 2e-2)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--inits", nargs="+", choices=get_args(Init), default=["target", "gaussian"]
    )
    parser.add_argument("--rates", nargs="+", type=float, default=RATES)
    parser.add_argument("--rank-rule", default="data")
    parser.add_argument("--rank", type=int, default=4)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1])
    parser.add_argument("--subject", type=Path, default=MINI_SD_FOLDER / "subject")
    parser.add_argument("--heldout", type=Path, default=MINI_SD_FOLDER / "heldout")
    parser.add_argument("--prompt", default="a sks cat face emoji")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    model = load_checkpoint(MINI_SD)
    subject = read_subject(model, args.subject, args.prompt, PROMPT_ALONE)
    validate = validation_loss(
        model, read_subject(model, args.heldout, args.prompt, PROMPT_ALONE), 8
    )
    base = validate()
    for init in args.inits:
        for rate in args.rates:
            curves = []
            for seed in args.seeds:
                calibration = CalibrationConfig(
                    init=init, rank=args.rank, rank_rule=args.rank_rule, seed=seed
                )
                training = TrainConfig(
                    steps=args.steps,
                    learning_rate=rate,
                    seed=seed,
                    optimizer="adamw",  # natural steps have no rate
                    patience=0,
                )
                run = run_training(model, subject, calibration, training, validate=validate)
                curves.append([loss / base for _, loss in run.validations])
            row = {
                "init": init,
                "lr": rate,
                "step0": statistics.mean(c[0] for c in curves),
                "final": statistics.mean(c[-1] for c in curves),
                "best": statistics.mean(min(c) for c in curves),
            }
            print(
                json.dumps({k: round(v, 5) if isinstance(v, float) else v for k, v in row.items()}),
                flush=True,
            )


if __name__ == "__main__":
    main()
