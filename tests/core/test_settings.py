"""What people type becomes a config, and what is said of a field is said everywhere."""

import argparse
import os
from pathlib import Path

import pytest

from cntlora_core.cli.main import _parser
from cntlora_core.config import (
    CalibrationConfig,
    DataConfig,
    ModelConfig,
    RunConfig,
    SampleConfig,
    TrainConfig,
)
from cntlora_core.errors import SettingError
from cntlora_core.settings import read_settings, settings_of

CONFIGS = [ModelConfig, DataConfig, CalibrationConfig, TrainConfig, RunConfig, SampleConfig]
ASKED_FOR = {"prior_loss": "none"}  # the command line's own default


@pytest.mark.parametrize("config", CONFIGS)
def test_every_field_says_what_it_does_in_a_sentence(config):
    for name, known in settings_of(config).items():
        assert len(known.text) > 10, name
        assert known.text.endswith("."), name
        known.check(known.default)
        if known.kind in (int, float):
            assert known.low < known.high < float("inf"), name


@pytest.mark.parametrize("typed", ["auto", " AUTO ", "", "0", "0.0", 0, 0.0])
@pytest.mark.parametrize("name", ["steps", "learning_rate"])
def test_auto_and_nought_are_the_same(name, typed):
    assert read_settings(TrainConfig, {name: typed}) == TrainConfig()


@pytest.mark.parametrize(
    ("name", "typed", "value"),
    [
        ("steps", "200", 200),
        ("steps", "200.0", 200),
        ("steps", 7, 7),
        ("learning_rate", "5e-4", 5e-4),
        ("learning_rate", 1, 1),
    ],
)
def test_numbers_may_come_as_text(name, typed, value):
    assert getattr(read_settings(TrainConfig, {name: typed}), name) == value


@pytest.mark.parametrize(
    ("name", "typed"),
    [
        ("steps", "many"),
        ("steps", "1.5"),
        ("steps", "-3"),
        ("steps", "inf"),
        ("steps", "nan"),
        ("steps", None),
        ("steps", "9" * 30),
        ("learning_rate", "fast"),
        ("learning_rate", "11"),
        ("learning_rate", [1]),
    ],
)
def test_what_is_no_number_is_a_sentence(name, typed):
    with pytest.raises(SettingError, match=rf"{name} is .*: it must be .* or auto\.$"):
        read_settings(TrainConfig, {name: typed})


def options(command):
    commands = next(
        a for a in _parser()._actions if isinstance(a, argparse._SubParsersAction)
    ).choices
    return {a.dest: a for a in commands[command]._actions}


@pytest.mark.parametrize(
    ("command", "configs"),
    [
        ("train", [ModelConfig, DataConfig, RunConfig, CalibrationConfig, TrainConfig]),
        ("sample", [ModelConfig, SampleConfig]),
    ],
)
def test_every_setting_is_an_option_with_the_same_text_and_default(command, configs):
    given = options(command)
    for config in configs:
        for name, known in settings_of(config).items():
            if name in settings_of(configs[-1]) and config is not configs[-1]:
                continue  # one option of training and calibration
            option = given[name]
            assert option.help.startswith(known.text), name
            assert option.default == ASKED_FOR.get(name, known.default), name
            assert tuple(option.choices or ()) == known.choices, name


HEADINGS = {
    ModelConfig: "The model",
    DataConfig: "Pictures",
    CalibrationConfig: "Calibration",
    TrainConfig: "Training",
    RunConfig: "Prior, checkpoints, files",
    SampleConfig: "Drawing with a LoRA",
}
UPDATE = bool(os.environ.get("UPDATE_NODE_TEXTS"))  # `make node-texts` writes the tables


def tables():
    for config, heading in HEADINGS.items():
        yield f"\n## {heading}\n\n"
        yield "| setting | default | may be | what it does |\n|---|---|---|---|\n"
        for name, known in settings_of(config).items():
            default = known.shown_default.lower()
            yield f"| `{name}` | {default} | {known.expected} | {known.text} |\n"


def test_the_tables_list_the_settings_as_they_are():
    page = Path(__file__).resolve().parents[2] / "docs/settings.md"
    prose, mark, written = page.read_text(encoding="utf-8").partition("<!-- settings -->\n")
    if UPDATE:
        written = "".join(tables())
        page.write_text(prose + mark + written, encoding="utf-8")
    assert mark
    assert written == "".join(tables())
