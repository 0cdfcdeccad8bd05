"""The fields of a settings class as a node's widgets. An input left out of a graph has its default,
so graphs made before a setting existed still run."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from ..cntlora_core.errors import SettingError
from ..cntlora_core.settings import Setting, settings_of
from . import host
from .host import io

KINDS = {bool: io.Boolean, int: io.Int, float: io.Float, str: io.Combo}


def widgets_of(
    config: type[Any], *names: str, without: Iterable[str] = (), leaving: Iterable[str] = ()
) -> list[Any]:
    """The fields named, or all but some; `leaving` out choices that a node does not have."""
    known = settings_of(config)
    chosen = [known[name] for name in names or known if name not in set(without)]
    return [
        _widget(replace(s, choices=tuple(c for c in s.choices if c not in leaving))) for s in chosen
    ]


def _widget(setting: Setting) -> Any:
    common: dict[str, Any] = {"tooltip": setting.text, "optional": True}
    if setting.auto:
        return host.text_or_number(setting.name, default=setting.shown_default, **common)
    common["default"] = setting.default
    if setting.choices:
        common["options"] = list(setting.choices)
    elif setting.kind is not bool:
        common |= {"min": setting.kind(setting.low), "max": setting.kind(setting.high)}
        common["step"] = setting.kind(setting.step)
    if setting.kind is int:
        common["control_after_generate"] = False  # a seed that changes by itself trains all again
    kind = KINDS[setting.kind]
    return (host.advanced(kind) if setting.advanced else kind.Input)(setting.name, **common)


def one(value: Any) -> Any:
    """Of a node whose inputs come as lists: the first, for what is no list to people."""
    return value[0] if isinstance(value, (list, tuple)) and value else value


def single(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """The inputs of such a node, one of each. Raises SettingError for a list of several: the node
    would run for the first alone."""
    for name, value in inputs.items():
        if isinstance(value, (list, tuple)) and len(value) > 1:
            raise SettingError(
                f"{name} came as a list of {len(value)}, and this node takes one: connect one "
                "value, or a node of these for each."
            )
    return {name: one(value) for name, value in inputs.items()}


def refusal(config: type[Any], values: dict[str, Any]) -> bool | str:
    """What `validate_inputs` says of the automatic fields, which the host takes for any text. A
    value is None where another node gives it."""
    known = settings_of(config)
    try:
        for name, value in values.items():
            if value is not None:
                known[name].check(known[name].read(value))
    except SettingError as error:
        return str(error)
    return True
