"""No setting is ignored in silence: each that has no effect beside the others says so, and those
that have one say nothing."""

import pytest

from cntlora_core.cli.checks import without_effect
from cntlora_core.cli.main import _parser
from cntlora_core.cli.options import settings_from
from cntlora_core.config import CalibrationConfig, DataConfig, SampleConfig, TrainConfig
from cntlora_core.effects import (
    without_effect_in_sampling,
    without_effect_in_training,
    without_effect_on_natural_steps,
)

BASE = ["train", "--checkpoint", "mini-sd", "--images", "i", "--prompt", "p"]
BASE += ["--output", "x.safetensors"]
CLASS = ["--class-prompt", "a cat"]
ORDINARY = ["--init", "gaussian"]
CONTINUED = ["--continue-from", "a.safetensors"]


def said(*more):
    args = _parser().parse_args([*BASE, *more])
    settings = (settings_from(kind, args) for kind in (DataConfig, CalibrationConfig))
    return args, " ".join(without_effect(args, *settings))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ([*CLASS, *ORDINARY], "--class-prompt has no effect"),
        ([*CLASS, *CONTINUED], "--class-prompt has no effect"),
        ([*CLASS, "--preservation", "0"], "--class-prompt has no effect"),
        ([*CLASS, *ORDINARY, "--class-images", "c"], "--class-images has no effect"),
        (["--class-count", "9"], "--class-count has no effect"),
        (["--class-steps", "9"], "--class-steps has no effect"),
        ([*CLASS, *ORDINARY, "--class-count", "9"], "--class-count has no effect"),
        (
            [*CLASS, "--prior-loss", "images", "--class-images", "c", "--class-count", "9"],
            "--class-count has no effect",
        ),
        (["--validation-images", "v", "--validate-every", "0"], "--validation-images has no"),
        (
            [*CLASS, *ORDINARY, "--prior-loss", "base", "--class-images", "c"],
            "--class-images has no",
        ),
        (["--continue-shared"], "--continue-shared has no effect"),
        (["--no-hold-out", "--validate-every", "0"], "--no-hold-out has no effect"),
        (["--no-hold-out", "--validation-images", "v"], "--no-hold-out has no effect"),
        (["--masks", "m"], "--masks has no effect without --masked"),
        (["--unmasked-weight", "0.1"], "unmasked_weight: without effect, because nothing is mask"),
        (["--keep-tags", "2", "--caption-variants", "4"], "keep_tags, caption_variants: without"),
        *(
            ([*CONTINUED, option, value], option[2:].replace("-", "_"))
            for option, value in [
                ("--init", "domain"),
                ("--rank", "8"),
                ("--rank-rule", "uniform"),
                ("--effort", "quick"),
                ("--targets", "attention"),
                ("--rho", "1"),
            ]
        ),
        ([*ORDINARY, "--effort", "quick"], "effort: without effect, because init is 'gaussian'"),
        ([*ORDINARY, "--rank-rule", "uniform"], "rank_rule: without effect"),
        ([*ORDINARY, "--rho", "1"], "rho: without effect"),
        (["--init", "domain", "--effort", "quick"], "init 'domain' is one sweep"),
        (["--preservation", "2"], "there is no class to preserve"),
    ],
)
def test_what_has_no_effect_is_said(options, words):
    assert words in said(*options)[1]


@pytest.mark.parametrize(
    "options",
    [
        [],
        CLASS,
        [*CLASS, "--class-count", "9", "--class-steps", "25"],
        [*CLASS, *ORDINARY, "--prior-loss", "base"],
        [*CLASS, *CONTINUED, "--prior-loss", "images", "--class-count", "9"],
        [*CLASS, "--preservation", "2"],
        [*CONTINUED, "--continue-shared"],
        ["--validation-images", "v"],
        ["--no-hold-out"],
        ["--masked", "--masks", "m", "--unmasked-weight", "0.1"],
        ["--tag-dropout", "0.1", "--keep-tags", "2"],
        ["--shuffle-tags", "--caption-variants", "4"],
        ["--effort", "quick", "--rank-rule", "uniform", "--rank", "8"],
        [*ORDINARY, "--rank", "8", "--targets", "attention"],
    ],
)
def test_what_has_an_effect_is_not_talked_about(options):
    assert said(*options)[1] == ""


@pytest.mark.parametrize(
    ("settings", "validates", "has_prior", "words"),
    [
        ({"warmup": 10}, True, False, "never reaches its full height"),
        ({"patience": 3}, False, False, "nothing is validated"),
        ({"keep_best": False}, False, False, "the last weights are given out anyway"),
        ({"prior_weight": 2.0}, True, False, "there is no prior loss"),
        ({"prior_weight": 0.0}, True, True, "the prior loss has no effect"),
        ({"warmup": 9, "patience": 5, "keep_best": False, "prior_weight": 2.0}, True, True, ""),
    ],
)
def test_the_trainings_own_settings(settings, validates, has_prior, words):
    config = TrainConfig(steps=10, **settings)
    found = without_effect_in_training(config, validates=validates, has_prior=has_prior)
    assert bool(found) == bool(words)
    assert words in " ".join(found)


def test_settings_of_other_optimisers_say_nothing_to_natural_steps():
    rate = 3e-3
    assert without_effect_on_natural_steps(TrainConfig(), rate) == []
    assert without_effect_on_natural_steps(TrainConfig(learning_rate=rate), rate) == []
    for name, value in {
        "learning_rate": 1e-3,
        "weight_decay": 0.1,
        "schedule": "cosine",
        "warmup": 5,
        "max_grad_norm": 2.0,
    }.items():
        (text,) = without_effect_on_natural_steps(TrainConfig(**{name: value}), rate)
        assert text.startswith(f"{name}: without effect, because natural-gradient steps")


@pytest.mark.parametrize(
    ("settings", "has_lora", "words"),
    [
        ({}, False, []),
        ({"strength": 0.5}, True, []),
        ({"strength": 0.5}, False, ["strength: without effect, because there is no LoRA."]),
        ({"strength_grid": True}, True, []),
        (
            {"strength": 0.5, "strength_grid": True},
            True,
            ["strength: without effect, because strength_grid draws at its own strengths."],
        ),
    ],
)
def test_how_pictures_are_drawn(settings, has_lora, words):
    assert without_effect_in_sampling(SampleConfig(**settings), has_lora=has_lora) == words
