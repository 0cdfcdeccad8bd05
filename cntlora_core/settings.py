"""What is said of a setting stands once, in the field of its frozen dataclass. The command line's
options, the nodes' widgets, the help pages and the tables are made from it, and checks read it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

from .errors import SettingError

AUTO = "auto"  # how people write 0 where 0 means that the value is chosen for them

Config = TypeVar("Config")


@dataclass(frozen=True)
class Setting:
    """One field of a settings class. A number lies between `low` and `high`, both included; `step`
    is that of a widget. With `auto`, 0 is allowed too and means: chosen by model and pictures."""

    name: str
    kind: type[bool] | type[int] | type[float] | type[str]
    default: Any
    choices: tuple[str, ...]
    text: str
    low: float = 0
    high: float = math.inf
    step: float = 1
    unit: str = ""
    auto: bool = False
    advanced: bool = False

    @property
    def expected(self) -> str:
        """What a value must be, to follow "it must be"."""
        if self.choices:
            return f"one of {', '.join(self.choices)}"
        if self.kind is bool:
            return "true or false"
        whole = "a whole number " if self.kind is int else ""
        return f"{whole}between {self.low} and {self.high}" + ", or auto" * self.auto

    @property
    def shown_default(self) -> str:
        return AUTO if self.auto and not self.default else str(self.default)

    def check(self, value: object) -> None:
        """Raises SettingError when the field cannot have this value."""
        if self.choices:
            ok = value in self.choices
        elif self.kind is bool:
            ok = isinstance(value, bool)
        elif isinstance(value, bool) or not isinstance(value, (int, float)):
            ok = False
        else:
            inside = self.low <= value <= self.high or (self.auto and value == 0)
            ok = inside and (self.kind is float or isinstance(value, int))
        if not ok:
            raise self._wrong(value)

    def read(self, value: Any) -> Any:
        """A value as people type it, or as another node gives it: "auto", "", or a number, perhaps
        as text. Raises SettingError."""
        if not self.auto:
            return value
        if isinstance(value, str):
            value = "0" if value.strip().lower() in (AUTO, "") else value
            try:
                value = float(value)
            except ValueError as error:
                raise self._wrong(value) from error
        whole = self.kind is int and isinstance(value, float) and value.is_integer()
        return int(value) if whole else value

    def _wrong(self, value: object) -> SettingError:
        return SettingError(f"{self.name} is {value!r}: it must be {self.expected}.")


def setting(default: Any, text: str, **more: Any) -> Any:
    """A field of a settings class: its default, its help in a sentence or two, and what else
    `Setting` takes."""
    return field(default=default, metadata={"text": text, **more})


def settings_of(config: type[Any]) -> Mapping[str, Setting]:
    """The settings of a class by name, in its order. A `Literal` gives choices."""
    kinds = get_type_hints(config)
    return {f.name: _setting(f.name, kinds[f.name], f.default, f.metadata) for f in fields(config)}


def _setting(name: str, kind: Any, default: Any, said: Mapping[str, Any]) -> Setting:
    choices = get_args(kind) if get_origin(kind) is Literal else ()
    return Setting(name, str if choices else kind, default, choices, **said)


def check_settings(config: Any) -> None:
    """For `__post_init__`. Raises SettingError for the first value out of its range."""
    for name, known in settings_of(type(config)).items():
        known.check(getattr(config, name))


def read_settings(config: type[Config], values: Mapping[str, Any]) -> Config:
    """A config from what people typed. Raises SettingError for a name it does not know."""
    known = settings_of(config)
    unknown = sorted(set(values) - set(known))
    if unknown:
        raise SettingError(
            f"Unknown setting {', '.join(unknown)}: known are {', '.join(sorted(known))}."
        )
    return config(**{name: known[name].read(value) for name, value in values.items()})
