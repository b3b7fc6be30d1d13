"""Loggers beside metrics.jsonl: TensorBoard and Weights & Biases. What fails there is told once and stops nothing."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol
from uuid import uuid4

import numpy as np
from numpy.typing import NDArray

from irgdistill.errors import UserError

PACKAGES = {"tensorboard": "tensorboard", "wandb": "wandb"}


class Logger(Protocol):
    """Takes numbers and pictures of one update after another."""

    since: int
    """Update up to which it has the numbers already."""

    def scalars(self, kind: str, values: Mapping[str, float], step: int) -> None: ...

    def images(self, pictures: Mapping[str, NDArray[np.uint8]], step: int) -> None:
        """Pictures (H, W, 3) by name."""

    def close(self) -> None: ...


def check_loggers(names: Sequence[str]) -> None:
    """Raises UserError for a logger whose package is not installed."""
    for name in names:
        if find_spec(PACKAGES[name]) is None:
            raise UserError(f"--log {name} needs the package {PACKAGES[name]}: pip install 'irgdistill[{name}]'")


class TensorBoard:
    """Event files in RUN/tensorboard; those of a resumed run take the place of what came after `step` before."""

    def __init__(self, folder: Path, step: int, config: Mapping[str, Any], text: str) -> None:
        from torch.utils.tensorboard import SummaryWriter

        path = folder / "tensorboard"
        known = any(path.glob("events.out.tfevents.*"))
        self.since = step if known else 0
        """From where records of before are to be given again: those of `step` are taken back with what came after."""
        self._writer = SummaryWriter(str(path), purge_step=step if known else None)
        self._writer.add_text("config", f"```yaml\n{text}```", step)

    def scalars(self, kind: str, values: Mapping[str, float], step: int) -> None:
        for name, value in values.items():
            self._writer.add_scalar(f"{kind}/{name}", value, step)
        self._writer.flush()

    def images(self, pictures: Mapping[str, NDArray[np.uint8]], step: int) -> None:
        for name, picture in pictures.items():
            self._writer.add_image(f"graphs/{name}", picture, step, dataformats="HWC")
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class WeightsAndBiases:
    """One run of W&B, whose id in RUN/wandb.json lets a resumed run go on with it.

    W&B takes nothing back, so what it was given once, as that file says, is not given again.
    """

    def __init__(self, folder: Path, step: int, config: Mapping[str, Any], text: str) -> None:
        import wandb

        self.since = 0
        self._path = folder / "wandb.json"
        known = json.loads(self._path.read_text(encoding="utf-8")) if self._path.exists() else {}
        self._id, self._given = str(known.get("id", uuid4().hex[:12])), dict(known.get("given", {}))
        self._wandb = wandb
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", "irgdistill"),
            name=folder.name,
            dir=str(folder),
            id=self._id,
            resume="allow",
            config=dict(config),
            settings=wandb.Settings(console="off", quiet=True),
        )
        self._remember()

    def scalars(self, kind: str, values: Mapping[str, float], step: int) -> None:
        self._give(kind, {f"{kind}/{name}": value for name, value in values.items()}, step)

    def images(self, pictures: Mapping[str, NDArray[np.uint8]], step: int) -> None:
        self._give("graphs", {f"graphs/{name}": self._wandb.Image(array) for name, array in pictures.items()}, step)

    def close(self) -> None:
        self._run.finish()

    def _give(self, kind: str, values: Mapping[str, Any], step: int) -> None:
        if step > self._given.get(kind, -1):
            self._run.log(dict(values), step=step)
            self._given[kind] = step
            self._remember()

    def _remember(self) -> None:
        self._path.write_text(json.dumps({"id": self._id, "given": self._given}), encoding="utf-8")


KINDS: dict[str, Callable[..., Any]] = {"tensorboard": TensorBoard, "wandb": WeightsAndBiases}


class Loggers:
    """Those of one run, from update `step` on; `before` are the records of metrics.jsonl up to there."""

    def __init__(
        self,
        names: Sequence[str],
        folder: Path,
        step: int,
        config: Mapping[str, Any],
        text: str,
        before: Sequence[Mapping[str, Any]],
        warn: Callable[[str], None],
    ) -> None:
        self._warn = warn
        self._at = 0
        self._open: dict[str, Logger] = {}
        for name in dict.fromkeys(names):
            logger = self._try(name, KINDS[name], folder, step, config, text)
            if logger is not None:
                self._open[name] = logger
        since = {name: logger.since for name, logger in self._open.items()}
        for record in before:
            self.record(record, since)
        self._at = step

    def __bool__(self) -> bool:
        return bool(self._open)

    def record(self, values: Mapping[str, Any], since: Mapping[str, int] | None = None) -> None:
        """A record as metrics.jsonl has it, to every logger that begins by then; an epoch's end names no update."""
        self._at = int(values.get("update", self._at))
        flat = _numbers({key: value for key, value in values.items() if key not in ("kind", "update", "share")})
        flat |= _numbers(values.get("share", {}))
        for name in list(self._open):
            if self._at >= (since or {}).get(name, 0):
                self._try(name, self._open[name].scalars, str(values["kind"]), flat, self._at)

    def images(self, pictures: Mapping[str, NDArray[np.uint8]]) -> None:
        """Pictures (H, W, 3) by name, of the update under way."""
        for name in list(self._open):
            self._try(name, self._open[name].images, pictures, self._at)

    def close(self) -> None:
        for name in list(self._open):
            self._try(name, self._open[name].close)

    def _try(self, name: str, call: Callable[..., Any], *arguments: Any) -> Any:
        """What a logger does; one that fails is left out from then on."""
        try:
            return call(*arguments)
        except Exception as error:
            self._open.pop(name, None)
            why = " ".join(str(error).split())[:200] or type(error).__name__
            self._warn(f"--log {name} failed and is left out from here on ({why}); metrics.jsonl has everything")
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
