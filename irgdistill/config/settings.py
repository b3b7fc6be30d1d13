"""Every setting with its dotted key, default and option, read from the schema. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, get_args

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from irgdistill.config.flag import Changeable, Flag
from irgdistill.config.schema import Config
from irgdistill.errors import UserError, nearest

SKIPPED = "none"
"""The value of an option of one of several teachers to which it does not apply."""


@dataclass(frozen=True)
class Setting:
    """One key of the configuration."""

    key: str
    field: FieldInfo
    flag: Flag | None
    """Its option on the command line; None: it has none."""

    @property
    def changeable(self) -> bool:
        """Whether a resumed run may change it."""
        return any(isinstance(item, Changeable) for item in self.field.metadata)

    @property
    def default(self) -> Any:
        return self.field.get_default(call_default_factory=True)

    @property
    def section(self) -> type[BaseModel] | None:
        """The section that each value of a list such as `plugins` is."""
        parts = (part for part in get_args(self.field.annotation) if isinstance(part, type))
        return next((part for part in parts if issubclass(part, BaseModel)), None)


def settings(section: type[BaseModel] = Config, prefix: str = "") -> Iterator[Setting]:
    """All settings in the order of the schema."""
    for name, field in section.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from settings(field.annotation, f"{prefix}{name}.")
        else:
            flag = next((item for item in field.metadata if isinstance(item, Flag)), None)
            if flag is not None:
                flag = replace(flag, name=flag.name.format(section=prefix.partition(".")[0]))
            yield Setting(prefix + name, field, flag)


def keys() -> list[str]:
    """All dotted keys that can be set."""
    return [setting.key for setting in settings()]


def changeable_on_resume() -> frozenset[str]:
    """Keys that a resumed run may change: where things are and when they are saved, never what is computed."""
    return frozenset(setting.key for setting in settings() if setting.changeable)


def of_any_teacher(key: str) -> str:
    """`teachers.0.name` -> `teacher.name`; other keys as they are."""
    section, _, rest = key.partition(".")
    return f"teacher.{rest.partition('.')[2]}" if section == "teachers" and rest else key


def options() -> dict[str, Setting]:
    """Options of `distill` by their names in Python, such as `weight_decay`, and the setting of each."""
    return {setting.flag.parameter: setting for setting in settings() if setting.flag is not None}


def values_of(given: Mapping[str, Any], known: Mapping[str, Setting] | None = None) -> dict[str, Any]:
    """Options such as `no_labels=True` -> {"key.path": value}. None and an empty list mean not given.

    A list for an option of the teacher has a value for each teacher: those from the second on have the keys
    `teachers.0.…`. `known`: the options of the command; default: those of `distill`. Raises UserError: an option that
    does not exist, two starting points of the student, lists of different lengths for several teachers.
    """
    known, values = options() if known is None else known, dict[str, Any]()
    of_teachers: dict[str, tuple[str, list[Any]]] = {}
    for name, value in given.items():
        if name not in known:
            raise UserError(f"no option {name!r}{nearest(name, known)}")
        flag = known[name].flag
        assert flag is not None
        key = known[name].key
        if value in (None, (), []):
            continue
        if flag.repeated and key.startswith("teacher."):
            of_teachers[key] = flag.name, _one_each(key, value)
        else:
            values[key] = not value if flag.off else value
    values |= _by_teacher(of_teachers)
    starts = ("student.pretrained", "student.checkpoint")
    if all(values.get(key) for key in starts):
        flags = {setting.key: setting.flag.name for setting in known.values() if setting.flag is not None}
        raise UserError(f"{' and '.join(flags[key] for key in starts)}: a network starts from one or the other")
    return values


def _one_each(key: str, value: Any) -> list[Any]:
    """One value for each teacher; two whole numbers are one input size."""
    size = key == "teacher.input_size" and isinstance(value, list) and all(isinstance(item, int) for item in value)
    return value if isinstance(value, list) and not size else [value]


def _by_teacher(given: Mapping[str, tuple[str, list[Any]]]) -> dict[str, Any]:
    """{"teacher.name": ("--teacher", [A, B])} -> {"teacher.name": A, "teachers.0.name": B}. Raises UserError."""
    counts = {flag: len(items) for flag, items in given.values()}
    if len(set(counts.values())) > 1:
        times = ", ".join(f"{flag} {count} time{'s' * (count > 1)}" for flag, count in counts.items())
        raise UserError(
            f"{times}: the n-th value is the n-th teacher's; give each of these options once for every teacher, "
            f"{SKIPPED} where it does not apply"
        )
    values: dict[str, Any] = {}
    for key, (_, items) in given.items():
        name = key.removeprefix("teacher.")
        for number, item in enumerate(items):
            if len(items) == 1 or str(item) != SKIPPED:
                values[key if number == 0 else f"teachers.{number - 1}.{name}"] = item
    return values
