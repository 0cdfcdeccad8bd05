"""Any settings together: a run ends with a LoRA that loads or with one sentence, and its events are
JSON lines of known types."""

import contextlib
import copy
import io
import json
import shutil
import tempfile
from pathlib import Path

import pytest

pytest.importorskip("hypothesis")
from hypothesis import given, settings
from hypothesis import strategies as st

from cntlora_core import config, events
from cntlora_core.cli import main as command_line
from cntlora_core.lora.file import load_lora
from cntlora_core.lora.targets import ALL, find_projections
from cntlora_core.model.loader import MINI_SD_FOLDER
from cntlora_core.settings import settings_of

DATA, START, TRAINING, RUN = map(
    settings_of, (config.DataConfig, config.CalibrationConfig, config.TrainConfig, config.RunConfig)
)
ON_CALIBRATE = DATA | START | {"validate_every": TRAINING["validate_every"]}
TYPES = {kind.type for kind in events.Event.__subclasses__()}
# Where a value of the whole range would cost minutes or gigabytes.
CHEAP = {
    "resolution": st.sampled_from([16, 24, 32, 40]),
    "rank": st.sampled_from([1, 3, 16, 1024]),
    "steps": st.integers(1, 3),
    "batch_size": st.integers(1, 3),
    "accumulation": st.integers(1, 2),
    "caption_variants": st.integers(1, 3),
}


def values(setting):
    """Of one setting: its ends, its default, and what lies between."""
    if setting.name in CHEAP:
        return CHEAP[setting.name]
    if setting.kind is bool:
        return st.booleans()
    if setting.choices:
        return st.sampled_from(setting.choices)
    high = min(setting.high, 1e6)
    ends = st.sampled_from([setting.kind(x) for x in (setting.low, high, setting.default)])
    kind = st.integers if setting.kind is int else st.floats
    return ends | kind(setting.kind(setting.low), setting.kind(high))


MORE = {
    "class_prompt": st.sampled_from(["a cat", "", "{class} {nothing}"]),
    "class_count": st.integers(0, 2),
    "class_steps": st.integers(0, 2),
    "prior_loss": st.sampled_from(RUN["prior_loss"].choices),
    "checkpoint_every": st.integers(0, 2),
    "save_precision": st.sampled_from(RUN["save_precision"].choices),
    "trigger": st.sampled_from(["sks", "", "a, b ||| c"]),
}


def runs(command, known, more=()):
    fields = {name: values(setting) for name, setting in known.items()}
    least = {name: CHEAP[name] for name in ("steps", "resolution") if name in fields}
    optional = {k: v for k, v in fields.items() if k not in least} | {k: MORE[k] for k in more}
    return st.tuples(st.just(command), st.fixed_dictionaries(least, optional=optional))


RUNS = runs("train", DATA | START | TRAINING, MORE) | runs("calibrate", ON_CALIBRATE)


def arguments(chosen):
    for name, value in chosen.items():
        option = name.replace("_", "-")
        if isinstance(value, bool):
            yield f"--{option}" if value else f"--no-{option}"
        else:
            yield f"--{option}={value}"


@pytest.fixture(scope="module")
def run(mini_sd, tmp_path_factory):
    """The command with settings, in a folder: its exit status and what it printed."""
    pictures = tmp_path_factory.mktemp("pictures")
    for path in sorted((MINI_SD_FOLDER / "subject").glob("*.png"))[:2]:
        shutil.copy(path, pictures)
        (pictures / path.with_suffix(".txt").name).write_text("a sks cat, yellow, {class}")

    def command(folder, name, chosen):
        given = ["--checkpoint", "mini-sd", "--images", str(pictures), "--prompt", "a sks cat"]
        given += ["--output", str(folder / "x.safetensors"), "--events", str(folder / "x.jsonl")]
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            status = command_line.main([name, *given, *arguments(chosen)])
        return status, out.getvalue(), err.getvalue()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(command_line, "_load", lambda *_: copy.deepcopy(mini_sd))
        for n, effort in enumerate(config.EFFORTS):
            patch.setitem(config.EFFORTS, effort, (1, n))
        yield command


def no_constant(name):
    raise AssertionError(f"{name} is no JSON")


def check(run, mini_sd, example):
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        status, out, err = run(folder, *example)
        assert "Traceback" not in err
        lora = folder / "x.safetensors"
        if status:
            assert (status, err.splitlines()[-1][:7]) == (1, "Error: ")
            assert err.count("Error: ") == 1
        else:
            result = json.loads(out.splitlines()[-1], parse_constant=no_constant)
            assert result["lora"] == str(lora)
        if lora.exists():
            load_lora(lora, find_projections(mini_sd.unet, ALL), mini_sd.family)
        log = folder / "x.jsonl"
        lines = log.read_text().splitlines() if log.exists() else []
        told = [json.loads(line, parse_constant=no_constant) for line in lines]
        assert {event["type"] for event in told} <= TYPES
        assert status or told[-1]["type"] == "done"
        left = {p.name for p in folder.iterdir()} - {lora.name, log.name}
        assert left <= ({"x.state.safetensors"} if status else set())


@settings(max_examples=25)
@given(example=RUNS)
def test_some_settings(run, mini_sd, example):
    check(run, mini_sd, example)


@pytest.mark.slow
@settings(max_examples=200)
@given(example=RUNS)
def test_many_settings(run, mini_sd, example):
    check(run, mini_sd, example)
