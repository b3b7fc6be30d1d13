"""Paths of a run folder, and protection of the runs in it. Imports no torch.

best.safetensors  last.safetensors   student weights; everything needed to use them is in the metadata
config.json                          makes the folder a timm `local-dir:`
config.yaml  metrics.jsonl  summary.json
state/state.safetensors              optimizer, EMA, position, random states, configuration
state/previous.safetensors           the state before it
state/lock                           locked by the running process
"""

from __future__ import annotations

import shlex
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import IO

from irgdistill.errors import UserError
from irgdistill.io.loggers.base import LOGGERS

try:
    import fcntl
except ImportError:  # not a POSIX system: no lock
    fcntl = None  # type: ignore[assignment]


WEIGHTS = (".safetensors", ".pth", ".pt", ".bin")
"""Suffixes of weight files."""


TEMPORARY = ".tmp"
"""Suffix of temporary files, which a killed process may leave behind."""


class RunFolder:
    """Paths of one run, and its lock."""

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
    def resume_command(self) -> str:
        """The command that resumes this run."""
        return f"irgdistill distill --resume {shlex.quote(str(self.path))}"

    def check_inputs(self, files: Iterable[tuple[str, Path | None]]) -> None:
        """Raises UserError if this run would overwrite an input file; `files`: options and their paths."""
        own = {path.resolve() for path in self._own()}
        for name, path in files:
            if path is not None and (find_checkpoint(str(path)) or path).resolve() in own:
                raise UserError(f"{name} {path} lies in --output {self.path}, which would replace it")

    def check_overwrite(self, overwrite: bool) -> None:
        """Raises UserError if another run would be overwritten, or the path is a file."""
        if self.path.exists() and not self.path.is_dir():
            raise UserError(f"--output {self.path} is a file")
        if overwrite or not any(path.exists() for path in self._own()):
            return
        kind, resume = "files of a run that cannot be resumed", ""
        if self.summary.exists():
            kind = "a finished run"
        elif self.state.exists() or self.previous_state.exists():
            kind, resume = "an unfinished run", f", --resume {self.path} to continue it,"
        raise UserError(f"{self.path} holds {kind}; give another --output{resume} or --overwrite to replace it")

    def create(self, overwrite: bool) -> None:
        """Make an empty run folder and lock it. Raises UserError as `check_overwrite` and `lock` do."""
        self.check_overwrite(overwrite)
        self.lock()
        logs = [self.path / f"{name}.json" for name in LOGGERS]
        for path in [*self._own(), *logs, *self.path.glob("tensorboard/events.out.tfevents.*")]:
            path.unlink(missing_ok=True)

    def lock(self) -> None:
        """Lock the folder while this object lives. Raises UserError if another process holds the lock.

        Removes temporary files of killed processes. It is a record lock: the system frees it however the process ends,
        and loader workers do not inherit it.
        """
        self.state.parent.mkdir(parents=True, exist_ok=True)
        self._lock = open(self.state.parent / "lock", "a")  # noqa: SIM115
        if fcntl is not None:
            try:
                fcntl.lockf(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except (BlockingIOError, PermissionError):
                raise UserError(f"another process is using {self.path}; wait for it or stop it first") from None
            except OSError:
                pass  # a file system without locks
        for folder in (self.path, self.state.parent):
            for leftover in folder.glob(f".*{TEMPORARY}"):
                shutil.rmtree(leftover, ignore_errors=True)

    def explain_missing_state(self) -> str:
        """Why a folder without a state cannot be resumed."""
        if self.state.parent.is_dir() and not any(path.exists() for path in self._own()):
            return f"{self.path} was stopped before its first update; run the command that started it again"
        return f"{self.path} holds no run that can be resumed (no state)"


def find_checkpoint(target: str) -> Path | None:
    """A checkpoint file, or the best one of a run folder; None for other targets. Raises UserError if it has none."""
    path = Path(target)
    if path.is_dir():
        for candidate in (RunFolder(path).best, RunFolder(path).last):
            if candidate.exists():
                return candidate
        raise UserError(f"{path} holds no best.safetensors or last.safetensors; a run saves them after its first epoch")
    if path.is_file() or path.suffix in WEIGHTS:
        return path
    return None
