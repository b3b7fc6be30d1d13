"""Declares loggers and passes a run's records on to them. A logger that fails is dropped with a warning.

To add one, write a file with a class like `Logger` under `@logger("NAME")` into this folder, or into a plug-in.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from irgdistill.errors import UserError, nearest, one_line
from irgdistill.plugins import Registry

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


class Logger(Protocol):
    """Takes the numbers and pictures of a run, in the order of its updates."""

    since: int
    """Records of earlier updates are known already and not sent again."""

    def __init__(self, folder: Path, step: int, config: Mapping[str, Any], text: str) -> None:
        """Open the logger of the run in `folder`, which starts or resumes at update `step`.

        `config` is the configuration, `text` the same as YAML.
        """

    def scalars(self, kind: str, values: Mapping[str, float], step: int) -> None:
        """Numbers by name of one record; `kind` is `train`, `eval`, `gradient` or `teacher`."""

    def images(self, pictures: Mapping[str, NDArray[np.uint8]], step: int) -> None:
        """Pictures (H, W, 3) by name."""

    def close(self) -> None: ...


@dataclass(frozen=True)
class LoggerEntry:
    """A declared logger."""

    create: type[Logger]
    package: str
    """Package that it needs, or an empty string."""
    install: str
    """What pip installs that package by."""


LOGGERS: Registry[LoggerEntry] = Registry("logger", "irgdistill.io.loggers")
"""Loggers by the name that `--log` takes."""


Class = TypeVar("Class", bound=type[Logger])


def logger(name: str, *, package: str = "", install: str = "") -> Callable[[Class], Class]:
    """Declare a class as the logger of `--log NAME`.

    It needs `package`, imported by its constructor and installed by `pip install INSTALL` (default: its name).
    """

    def declare(create: Class) -> Class:
        LOGGERS.add(name, LoggerEntry(create, package, install or package))
        return create

    return declare


def check_loggers(names: Sequence[str]) -> None:
    """Raises UserError for a logger that does not exist, or whose package is not installed. Imports no torch."""
    for name in names:
        if name not in LOGGERS:
            raise UserError(f"--log {name}: expected {' or '.join(LOGGERS)}{nearest(name, LOGGERS)}")
        entry = LOGGERS[name]
        if entry.package and find_spec(entry.package) is None:
            raise UserError(f"--log {name} needs the package {entry.package}: pip install {entry.install}")


class Loggers:
    """The loggers of one run, from update `step` on. `earlier`: the records of metrics.jsonl up to there."""

    def __init__(
        self,
        names: Sequence[str],
        folder: Path,
        step: int,
        config: Mapping[str, Any],
        text: str,
        earlier: Sequence[Mapping[str, Any]],
        warn: Callable[[str], None],
    ) -> None:
        self._warn = warn
        self._step = 0
        self._open: dict[str, Logger] = {}
        for name in dict.fromkeys(names):
            opened = self._try(name, LOGGERS[name].create, folder, step, config, text)
            if opened is not None:
                self._open[name] = opened
        since = {name: opened.since for name, opened in self._open.items()}
        for record in earlier:
            self.record(record, since)
        self._step = step

    def __bool__(self) -> bool:
        return bool(self._open)

    def record(self, values: Mapping[str, Any], since: Mapping[str, int] | None = None) -> None:
        """Send a record of metrics.jsonl to every logger, or to those whose `since` it reaches.

        A record without an update, such as one of an evaluation, belongs to the last one that was named.
        """
        self._step = int(values.get("update", self._step))
        flat = _numbers({key: value for key, value in values.items() if key not in ("kind", "update", "share")})
        flat |= _numbers(values.get("share", {}))
        for name in list(self._open):
            if self._step >= (since or {}).get(name, 0):
                self._try(name, self._open[name].scalars, str(values["kind"]), flat, self._step)

    def images(self, pictures: Mapping[str, NDArray[np.uint8]]) -> None:
        """Send pictures (H, W, 3) by name, of the current update."""
        for name in list(self._open):
            self._try(name, self._open[name].images, pictures, self._step)

    def close(self) -> None:
        for name in list(self._open):
            self._try(name, self._open[name].close)

    def _try(self, name: str, call: Callable[..., Any], *arguments: Any) -> Any:
        """Call a logger; one that fails is dropped."""
        try:
            return call(*arguments)
        except Exception as error:
            self._open.pop(name, None)
            why = one_line(error, 200)
            self._warn(f"--log {name} failed and is not used any more ({why}); metrics.jsonl has everything")
            return None


def _numbers(values: Mapping[str, Any], prefix: str = "") -> dict[str, float]:
    """Nested numbers by path: {"terms": {"kd": 1}} -> {"terms/kd": 1.0}."""
    flat: dict[str, float] = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            flat |= _numbers(value, f"{prefix}{name}/")
        elif isinstance(value, (int, float)):
            flat[prefix + name] = float(value)
    return flat
