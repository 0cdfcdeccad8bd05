"""The command line: `python -m cntlora_core demo|train|calibrate|check|sample|inspect|info`."""

from __future__ import annotations

import argparse
import logging
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from ..config import STRENGTHS, DataConfig, ModelConfig, SampleConfig
from ..effects import without_effect_in_sampling
from ..errors import CNTLoRAError, Interrupted
from ..events import Notice, Observer, ignore
from ..files import DISK, Disk
from ..settings import settings_of
from . import check
from .console import Console, print_json, printable
from .options import add_arguments, add_settings, settings_from
from .train import run_train

if TYPE_CHECKING:
    import torch

    from ..lora.adapter import LoRA
    from ..model.loader import StableDiffusion

log = logging.getLogger("cntlora")


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"Error: {message}. See `{self.prog} --help`.\n")


def main(argv: Sequence[str] | None = None, disk: Disk = DISK) -> int:
    """Run one command. Returns the exit status: 0 done, 1 a user's error (one sentence on stderr),
    130 interrupted."""
    args = _parser().parse_args(argv)
    args.disk = disk
    logging.basicConfig(
        level=logging.DEBUG if args.debug else logging.WARNING, format="%(message)s"
    )
    try:
        args.command(args)
    except Interrupted as error:
        return _fail(str(error), args.debug, error.status)
    except CNTLoRAError as error:
        return _fail(str(error), args.debug)
    except KeyboardInterrupt:
        return _fail("Interrupted.", False, 130)
    except OSError as error:
        where = f" '{error.filename}'" if error.filename else ""
        return _fail(
            f"{error.strerror or error}{where}. Check the path and the free space.", args.debug
        )
    return 0


def _fail(message: str, debug: bool, status: int = 1) -> int:
    if debug:
        traceback.print_exc()
    sys.stderr.write(printable(f"Error: {message}\n", sys.stderr))
    return status


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="cntlora",
        description="Personal LoRAs for Stable Diffusion: calibrate in closed form, then train.",
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(name: str, run: object, help: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=help, description=help)
        sub.set_defaults(command=run)
        sub.add_argument("--debug", action="store_true", help="show the traceback of an error")
        return sub

    demo = command(
        "demo", _demo, "calibrate and train on the embedded model and pictures; draws what it did"
    )
    demo.add_argument(
        "--output",
        default="demo-output",
        metavar="DIR",
        help="folder for the results (default: %(default)s)",
    )
    for name, what in (
        ("train", "pictures in, a calibrated and trained LoRA out"),
        ("calibrate", "the LoRA at step 0 alone: calibrated, not trained"),
    ):
        run = command(name, _train, what)
        _model_arguments(run)
        add_arguments(run, training=name == "train")
    check.add_arguments(
        command(
            "check", check.run_check, "look at the pictures before training: sizes, captions, masks"
        )
    )
    _sample_arguments(
        command("sample", _sample, "draw pictures with a checkpoint, with or without a LoRA")
    )
    inspect = command("inspect", _inspect, "ranks, sizes and metadata of a LoRA file")
    inspect.add_argument("file")
    info = command("info", _info, "versions, devices, tokenizer; or what a checkpoint is")
    info.add_argument(
        "--checkpoint",
        metavar="PATH",
        help="say family and prediction, of a single file also dtypes and what is missing, "
        "without reading weights",
    )
    return parser


def _model_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--checkpoint",
        required=True,
        metavar="PATH|mini-sd",
        help="checkpoint file or diffusers folder; mini-sd is the embedded model",
    )
    parser.add_argument(
        "--device", default="auto", help="cpu, cuda, mps, cuda:1 ... (default: the best there is)"
    )
    add_settings(parser, ModelConfig, settings_of(ModelConfig))
    parser.add_argument("--vae", metavar="FILE", help="another VAE than the checkpoint's own")
    parser.add_argument(
        "--text-encoder",
        metavar="FILE",
        action="append",
        default=[],
        help="a text encoder's own file, where a single-file checkpoint has none (SDXL: twice)",
    )


def _sample_arguments(parser: argparse.ArgumentParser) -> None:
    _model_arguments(parser)
    add_settings(parser, DataConfig, ["resolution"])
    parser.add_argument("--prompt", required=True)
    parser.add_argument("--negative", default="", help="what the pictures should not show")
    parser.add_argument("--lora", metavar="FILE", help="a LoRA file made for this model")
    add_settings(parser, SampleConfig, settings_of(SampleConfig))
    parser.add_argument(
        "--output",
        required=True,
        metavar="FILE.png",
        help="one picture with all samples side by side",
    )
    parser.add_argument("--overwrite", action="store_true")


def _load(
    args: argparse.Namespace, device: torch.device | None = None, observer: Observer = ignore
) -> StableDiffusion:
    from ..devices import INT8, computing_dtype, pick_device
    from ..model.loader import load_checkpoint

    device, how = device or pick_device(args.device), settings_from(ModelConfig, args)
    return load_checkpoint(
        args.checkpoint,
        device=device,
        dtype=computing_dtype(how.precision, device),
        eight_bits=how.precision == INT8,
        vae=args.vae,
        text_encoders=args.text_encoder,
        prediction=how.prediction,
        clip_skip=how.clip_skip,
        max_tokens=how.max_tokens,
        observer=observer,
    )


def _train(args: argparse.Namespace) -> None:
    run_train(args, _load, args.disk)


def _demo(args: argparse.Namespace) -> None:
    from .demo import run_demo

    result = run_demo(Path(args.output))
    print_json(result)


def _sample(args: argparse.Namespace) -> None:
    how = settings_from(SampleConfig, args)
    grid = STRENGTHS if how.strength_grid and args.lora else (how.strength,)
    resolution = settings_from(DataConfig, args).resolution
    from ..data.dataset import check_resolution
    from ..files import check_output
    from ..lora.adapter import attached_lora, scaled
    from ..lora.file import load_lora
    from ..lora.targets import ALL, find_projections
    from ..model.sampling import sample
    from ..report.charts import sample_sheet

    output = check_output(args.output, overwrite=args.overwrite, suffix=".png")
    seeds = range(how.seed, how.seed + how.count)
    with Console() as observer:
        for text in without_effect_in_sampling(how, has_lora=bool(args.lora)):
            observer(Notice(text))
        model = _load(args, observer=observer)
        side = check_resolution(model, resolution)
        factors: LoRA = {}
        called, rows = "base", []
        if args.lora:
            projections = find_projections(model.unet, ALL)
            factors, _ = load_lora(
                args.lora, projections, model.family, shared=True, observer=observer
            )
            called = Path(args.lora).stem
        for strength in grid:
            with attached_lora(model.unet, scaled(factors, strength)):
                pictures = sample(
                    model,
                    [args.prompt] * how.count,
                    seeds,
                    steps=how.steps,
                    guidance=how.guidance,
                    negative=args.negative,
                    size=(side, side),
                    observer=observer,
                )
            rows.append((f"{called}, {strength:g}" if len(grid) > 1 else called, pictures))
    sample_sheet(rows, title=args.prompt).save(output)
    print_json({"picture": str(output), "seeds": list(seeds)})


def _inspect(args: argparse.Namespace) -> None:
    from ..lora.summary import inspect_file

    print_json(inspect_file(args.file), indent=2)


def _info(args: argparse.Namespace) -> None:
    from ..model.loader import located
    from .info import about_checkpoint, environment

    said = about_checkpoint(located(args.checkpoint)) if args.checkpoint else environment()
    print_json(said, indent=2)
