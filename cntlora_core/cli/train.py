"""`cntlora train` and `cntlora calibrate`: a folder of pictures in, a LoRA file out."""

from __future__ import annotations

import argparse
from contextlib import ExitStack
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from ..config import CalibrationConfig, DataConfig, TrainConfig
from ..errors import CNTLoRAError
from ..events import Done, Notice, Observer, ignore
from ..files import DISK, Disk
from .checks import check_arguments, check_outputs, check_room, without_effect
from .console import Console, EventFile, broadcast, print_json
from .interrupts import Interrupts
from .keeper import Keeper
from .options import settings_from

if TYPE_CHECKING:
    from ..model.loader import StableDiffusion
    from ..run.outcome import RunResult
    from ..training.prior_loss import PriorLoss
    from .inputs import Inputs


def run_train(args: argparse.Namespace, load: Any, disk: Disk = DISK) -> None:
    """Everything `train` does. `load(args, device, observer)` gives the model."""
    kinds = (DataConfig, CalibrationConfig, TrainConfig)
    data, calibration, training = (settings_from(kind, args) for kind in kinds)
    check_arguments(args)
    from ..devices import DTYPES, pick_device
    from ..distributed import local_device, process_group
    from .identity import identity_of
    from .inputs import read_inputs, read_priors, validation

    output, overwrite, checkpoints = check_outputs(args, disk)
    device = local_device(pick_device(args.device))
    with ExitStack() as stack:
        interrupts = stack.enter_context(Interrupts())
        group = interrupts.group = stack.enter_context(process_group(device))
        tell = _reports(args, stack) if group.rank == 0 else ignore
        observer = broadcast(tell, interrupts)
        model = load(args, device, observer)
        for text in without_effect(args, data, calibration):
            observer(Notice(text))
        inputs = read_inputs(args, model, data, observer)
        if inputs.continued:
            calibration = replace(calibration, init=inputs.continued.init)
        training = _resolved(args, model, inputs, training, observer)
        if checkpoints:
            made_with = (data, calibration, training, group)
            checkpoints.identity = identity_of(args, model, inputs, *made_with)
            checkpoints.read()  # refuses another run's before anything is drawn or measured
        check_room(args, output, model, inputs.lora, calibration, training)
        preserve, prior = read_priors(args, model, inputs.subject, data, observer)
        model.drop_encoders()
        story = {
            "model": model,
            "subject": inputs.subject,
            "calibration": calibration,
            "source": inputs.continued and inputs.continued.source,
            "dtype": DTYPES[args.save_precision],
        }
        keeper = Keeper(output, story, args.trains, overwrite, checkpoints, tell, disk)
        shared = {
            "preserve": preserve,
            "validate": validation(args, model, inputs.held_out, group),
            "observer": observer,
            "group": group,
        }
        try:
            run = _run(keeper, training, prior, inputs, shared)
            interrupts.finish()
            if group.rank:
                return
            keeper.keep(run)
        except CNTLoRAError as error:
            if group.rank == 0:
                keeper.locate(error)
            raise
        result = keeper.finish(run)
        tell(Done(result))
    print_json(result)


def _run(
    keeper: Keeper,
    training: TrainConfig,
    prior: PriorLoss | None,
    inputs: Inputs,
    shared: dict[str, Any],
) -> RunResult:
    from ..calibration.calibrate import continued
    from ..run.runs import run_training, run_untrained

    model, calibration = keeper.story["model"], keeper.story["calibration"]
    if not keeper.trains:
        return run_untrained(model, inputs.subject, calibration, **shared)
    return run_training(
        model,
        inputs.subject,
        calibration,
        training,
        prior=prior,
        start=continued(inputs.lora) if inputs.lora else None,
        checkpoints=keeper.checkpoints,
        on_stop=keeper.keep if shared["group"].rank == 0 else None,
        **shared,
    )


def _resolved(
    args: argparse.Namespace,
    model: StableDiffusion,
    inputs: Inputs,
    training: TrainConfig,
    observer: Observer,
) -> TrainConfig:
    """The settings with numbers where they say auto."""
    from ..defaults import resolve
    from ..presets import PRESETS

    if not args.trains:
        return training
    if inputs.lora and training.optimizer == "auto":
        training = replace(training, optimizer="adamw")  # a LoRA file holds no metric
    init = inputs.continued.init if inputs.continued else args.init
    pictures, share = inputs.subject.picture_count, PRESETS[args.preset].steps
    held = len(inputs.held_out) if args.validate_every else 0
    return resolve(training, model.name, init, pictures, observer, share=share, held_out=held)


def _reports(args: argparse.Namespace, stack: ExitStack) -> Observer:
    """The console and the file of events; neither stops a run."""
    console = stack.enter_context(Console())
    if not args.events:
        return console
    events = stack.enter_context(EventFile(args.events, console, append=args.resume))
    return broadcast(console, events)
