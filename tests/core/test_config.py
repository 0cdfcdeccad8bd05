import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cntlora_core.config import CalibrationConfig, DataConfig, SampleConfig, TrainConfig
from cntlora_core.errors import SettingError
from cntlora_core.lora.targets import targets_for
from cntlora_core.settings import read_settings


def test_unknown_names_are_refused():
    with pytest.raises(SettingError, match="lr"):
        read_settings(TrainConfig, {"lr": 1})


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
        (TrainConfig, {"learning_rate": float("inf")}),
        (TrainConfig, {"learning_rate": -1}),
        (TrainConfig, {"learning_rate": True}),
        (TrainConfig, {"steps": -1}),
        (TrainConfig, {"batch_size": 0}),
        (TrainConfig, {"keep_best": 1}),
        (TrainConfig, {"steps": 1.0}),
        (TrainConfig, {"schedule": "linear"}),
        (DataConfig, {"resolution": 8}),
        (SampleConfig, {"guidance": 0.5}),
    ],
)
def test_bad_values_are_named_with_what_was_seen(kind, values):
    name = next(iter(values))
    with pytest.raises(SettingError, match=f"{name} is .*: it must be"):
        kind(**values)


@given(st.floats(), st.floats())
def test_no_float_slips_through(lr, decay):
    try:
        config = TrainConfig(learning_rate=lr, weight_decay=decay)
    except SettingError:
        return
    assert 0 <= config.learning_rate <= 10
    assert 0 <= config.weight_decay < float("inf")


def test_configs_cannot_be_changed():
    with pytest.raises(dataclasses.FrozenInstanceError):
        TrainConfig().learning_rate = 1


@pytest.mark.parametrize(
    ("init", "rule", "targets", "expected"),
    [
        ("target", "data", "auto", "attention+ff+conv"),
        ("domain", "data", "auto", "attention+ff"),
        ("target", "uniform", "auto", "attention"),
        ("gaussian", "data", "auto", "attention"),
        ("target", "uniform", "attention+ff", "attention+ff"),
        ("target", "data", "attention", "attention"),
    ],
)
def test_feed_forward_layers_take_part_where_data_ranks_find_them_room(
    init, rule, targets, expected
):
    assert targets_for(CalibrationConfig(init=init, rank_rule=rule, targets=targets)) == expected
