"""One choice in place of ten settings; what a person sets stays."""

import pytest

from cntlora_core.config import CalibrationConfig, DataConfig, TrainConfig
from cntlora_core.defaults import resolve
from cntlora_core.presets import NONE, PRESETS, help_text, told, with_preset
from cntlora_core.settings import settings_of

CONFIGS = (DataConfig, CalibrationConfig, TrainConfig)


@pytest.mark.parametrize("name", PRESETS)
def test_every_value_is_one_of_a_setting_and_fits_it(name):
    known = {n: s for config in CONFIGS for n, s in settings_of(config).items()}
    for setting, value in PRESETS[name].settings.items():
        known[setting].check(value)
        (changed,) = [c for c in CONFIGS if setting in settings_of(c)]
        assert getattr(with_preset(changed(), name), setting) == value
    if name != NONE:
        assert PRESETS[name].measured
        assert f"{name}: {PRESETS[name].reason}" in help_text()
        assert told(name).startswith(f"Preset {name}: rank ")


def test_what_a_person_sets_stays():
    assert with_preset(CalibrationConfig(rank=6), "style").rank == 6
    assert with_preset(TrainConfig(), NONE) == TrainConfig()


def test_a_preset_makes_more_or_fewer_steps():
    style = resolve(TrainConfig(), "sd15", "target", 6, share=PRESETS["style"].steps)
    assert style.steps == 450
    assert resolve(TrainConfig(steps=7), "sd15", "target", 6, share=1.5).steps == 7
