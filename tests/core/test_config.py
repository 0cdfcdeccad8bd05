import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cntlora_core.config import CalibrationConfig, TrainConfig, from_dict, to_dict
from cntlora_core.errors import SettingError
from cntlora_core.lora.targets import targets_for


@pytest.mark.parametrize("config", [CalibrationConfig(), TrainConfig()])
def test_round_trip(config):
    assert from_dict(type(config), to_dict(config)) == config


def test_unknown_names_are_refused():
    with pytest.raises(SettingError, match="learning_rate"):
        from_dict(TrainConfig, {"learning_rate": 1})


@pytest.mark.parametrize(
    ("kind", "values"),
    [
        (CalibrationConfig, {"init": "magic"}),
        (CalibrationConfig, {"rank": 0}),
        (CalibrationConfig, {"rank": 2.5}),
        (CalibrationConfig, {"rank_rule": "best"}),
        (CalibrationConfig, {"rho": 0}),
        (CalibrationConfig, {"effort": "long"}),
        (CalibrationConfig, {"targets": "everything"}),
        (CalibrationConfig, {"preservation": float("nan")}),
        (TrainConfig, {"lr": float("inf")}),
        (TrainConfig, {"lr": -1}),
        (TrainConfig, {"lr": True}),
        (TrainConfig, {"steps": -1}),
        (TrainConfig, {"batch_size": 0}),
    ],
)
def test_bad_values_are_named_with_what_was_seen(kind, values):
    name = next(iter(values))
    with pytest.raises(SettingError, match=f"{name} is .*: it must be"):
        kind(**values)


@given(st.floats(), st.floats())
def test_no_float_slips_through(lr, decay):
    try:
        config = TrainConfig(lr=lr, weight_decay=decay)
    except SettingError:
        return
    assert 0 < config.lr <= 10
    assert 0 <= config.weight_decay < float("inf")


def test_configs_cannot_be_changed():
    with pytest.raises(dataclasses.FrozenInstanceError):
        TrainConfig().lr = 1


def test_real_models_learn_more_slowly_and_calibrated_starts_faster_than_ordinary_ones():
    from cntlora_core.defaults import default_lr, default_steps

    assert default_lr("mini-sd", "target") == TrainConfig.lr
    assert (
        default_lr("sd15.safetensors", "gaussian")
        == 1e-4
        < default_lr("sd15.safetensors", "target")
        < 3e-3
    )
    assert default_steps("sd15.safetensors", "gaussian", 5) == 500
    assert default_steps("sd15.safetensors", "target", 5) == 250
    assert default_steps("sd15.safetensors", "target", 30) == 600


@pytest.mark.parametrize(
    ("init", "rule", "family", "targets", "expected"),
    [
        ("target", "data", "sd1", "auto", "attention+ff"),
        ("domain", "data", "mini", "auto", "attention+ff"),
        ("target", "uniform", "sd1", "auto", "attention"),
        ("gaussian", "data", "sd1", "auto", "attention"),
        ("target", "data", "sdxl", "auto", "attention"),
        ("target", "data", "sdxl", "attention+ff", "attention+ff"),
        ("target", "data", "sd1", "attention", "attention"),
    ],
)
def test_feed_forward_layers_take_part_where_data_ranks_find_them_room(
    init, rule, family, targets, expected
):
    assert (
        targets_for(family, CalibrationConfig(init=init, rank_rule=rule, targets=targets))
        == expected
    )
