"""Paths of a run, and what may be done with a folder that is already there. Imports no torch.

best.safetensors  last.safetensors   student weights; everything needed to use them is in the metadata
config.json                          makes the folder a timm `local-dir:`
config.yaml  metrics.jsonl  summary.json
state/state.safetensors              optimizer, EMA, position, random states, configuration
state/previous.safetensors           the state before it
state/lock                           held by the process at work
"""

from __future__ import annotations

import shlex
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import IO

from irgdistill.errors import UserError

try:
    import fcntl
except ImportError:  # not a POSIX system: no lock
    fcntl = None  # type: ignore[assignment]


WEIGHTS = (".safetensors", ".pth", ".pt", ".bin")
"""Endings of files of weights."""


TEMPORARY = ".tmp"
"""Ending of what a killed process may leave."""


class RunFolder:
    """Paths of one run, and what may be done with a folder that is already there."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.best = path / "best.safetensors"
        self.last = path / "last.safetensors"
        self.config = path / "config.yaml"
        self.metrics = path / "metrics.jsonl"
        self.summary = path / "summary.json"
        self.timm_config = path / "config.json"
        self.state = path / "state" / "state.safetensors"
        self.previous_state = path / "state" / "previous.safetensors"
        self._lock: IO[str] | None = None

    def _own(self) -> list[Path]:
        states = [self.state, self.previous_state]
        return [*states, self.summary, self.best, self.last, self.config, self.metrics, self.timm_config]

    @property
    def go_on(self) -> str:
        """The command that resumes it."""
        return f"irgdistill distill --resume {shlex.quote(str(self.path))}"

    def refuse_to_lose(self, files: Mapping[str, Path | None]) -> None:
        """Raises UserError where a file that an option names would be replaced by this run's own."""
        own = {path.resolve() for path in self._own()}
        for name, path in files.items():
            if path is not None and (find_checkpoint(str(path)) or path).resolve() in own:
                raise UserError(f"{name} {path} lies in --output {self.path}, which would replace it")

    def refuse(self, overwrite: bool) -> None:
        """Raises UserError where another run, or something that is no run, would be lost."""
        if self.path.exists() and not self.path.is_dir():
            raise UserError(f"--output {self.path} is a file")
        if overwrite or not any(path.exists() for path in self._own()):
            return
        kind, go_on = "files of a run that cannot go on", ""
        if self.summary.exists():
            kind = "a finished run"
        elif self.state.exists() or self.previous_state.exists():
            kind, go_on = "an unfinished run", f", --resume {self.path} to go on with it,"
        raise UserError(f"{self.path} holds {kind}; give another --output{go_on} or --overwrite to replace it")

    def create(self, overwrite: bool) -> None:
        """Make an empty run folder, for this process alone. Raises UserError as `refuse` and `lock` do."""
        self.refuse(overwrite)
        self.lock()
        logs = [self.path / "wandb.json", *self.path.glob("tensorboard/events.out.tfevents.*")]
        for path in [*self._own(), *logs]:
            path.unlink(missing_ok=True)

    def lock(self) -> None:
        """Take the folder for as long as this object lives. Raises UserError while another process has it.

        Temporary files of processes that were killed are removed. A record lock: the system frees it whatever happens
        to the process, and loader processes do not inherit it.
        """
        self.state.parent.mkdir(parents=True, exist_ok=True)
        self._lock = open(self.state.parent / "lock", "a")  # noqa: SIM115
        if fcntl is not None:
            try:
                fcntl.lockf(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except (BlockingIOError, PermissionError):
                raise UserError(f"another process is at work in {self.path}; wait for it or stop it first") from None
            except OSError:
                pass  # a file system without locks
        for folder in (self.path, self.state.parent):
            for left in folder.glob(f".*{TEMPORARY}"):
                shutil.rmtree(left, ignore_errors=True)

    def unsaved(self) -> str:
        """Why there is nothing to go on with, where no state is."""
        if self.state.parent.is_dir() and not any(path.exists() for path in self._own()):
            return f"{self.path} was stopped before anything was trained; give the command that began it again"
        return f"{self.path} holds no run that can be resumed (no state)"


def find_checkpoint(target: str) -> Path | None:
    """A checkpoint file, or the best one of a run folder; None when `target` is neither."""
    path = Path(target)
    if path.is_dir():
        for candidate in (RunFolder(path).best, RunFolder(path).last):
            if candidate.exists():
                return candidate
        raise UserError(f"{path} holds no best.safetensors or last.safetensors")
    if path.is_file() or path.suffix in WEIGHTS:
        return path
    return None
