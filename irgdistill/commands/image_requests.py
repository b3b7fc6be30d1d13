"""Validated arguments of the commands that run a network over images: eval, predict, embed.

Constructing one raises UserError if the options, or their files, cannot work. Imports no torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from irgdistill.config import Config, check_files, check_source, check_word
from irgdistill.errors import UserError
from irgdistill.io import WEIGHTS

PROBES = ("knn", "linear")


@dataclass(frozen=True)
class EvalRequest:
    """Networks to evaluate."""

    targets: Sequence[str]
    """Checkpoints, run folders or names."""
    config: Config
    given: frozenset[str]
    """Keys of `config` that the command line set."""
    checkpoint: Path | None = None
    """Weights of the only target, a timm name."""
    against: str | None = None
    """Teacher whose agreement is measured."""
    against_checkpoint: Path | None = None
    as_json: bool = False
    probe: str | None = None
    """Classifier on the embeddings, one of PROBES; None: the network's own."""

    def __post_init__(self) -> None:
        if self.probe is not None:
            check_word("--probe", self.probe, PROBES)
        if self.checkpoint is not None and len(self.targets) > 1:
            raise UserError("--checkpoint holds the weights of one network; give one target with it")
        named = [target for target in (*self.targets, self.against or "") if Path(target).suffix in WEIGHTS]
        check_files(*map(Path, named), self.checkpoint, self.against_checkpoint)


@dataclass(frozen=True)
class PredictRequest:
    """Images to classify."""

    target: str
    """Checkpoint, run folder or name."""
    images: Sequence[str]
    """Files, and folders."""
    config: Config
    given: frozenset[str] = frozenset()
    """Keys of `config` that the command line set."""
    checkpoint: Path | None = None
    """Weights of the target, a timm name."""
    top: int = 1
    """Classes of each image."""
    output: Path | None = None
    """File to write; None: stdout."""
    overwrite: bool = False
    as_json: bool = False

    def __post_init__(self) -> None:
        if self.top < 1:
            raise UserError(f"--top {self.top}: expected at least 1")
        _check_target(self.target, self.checkpoint)
        if self.output is not None:
            _check_output(self.output, self.overwrite)


@dataclass(frozen=True)
class EmbedRequest:
    """Images to embed."""

    target: str
    """Checkpoint, run folder or name."""
    config: Config
    output: Path
    given: frozenset[str] = frozenset()
    """Keys of `config` that the command line set."""
    checkpoint: Path | None = None
    """Weights of the target, a timm name."""
    overwrite: bool = False

    @property
    def parquet(self) -> bool:
        """Write Parquet, not safetensors."""
        return self.output.suffix == ".parquet"

    def __post_init__(self) -> None:
        if self.output.suffix not in (".safetensors", ".parquet"):
            raise UserError(f"--output {self.output}: expected a name that ends in .safetensors or .parquet")
        if self.parquet and find_spec("pyarrow") is None:
            raise UserError(f"--output {self.output}: Parquet needs the package pyarrow: pip install pyarrow")
        _check_target(self.target, self.checkpoint)
        _check_output(self.output, self.overwrite)
        check_source(self.config.data)


def _check_target(target: str, checkpoint: Path | None) -> None:
    """Raises UserError for a checkpoint that does not exist."""
    check_files(Path(target) if Path(target).suffix in WEIGHTS else None, checkpoint)


def _check_output(path: Path, overwrite: bool) -> None:
    """Raises UserError if a file cannot be written there, or would be replaced."""
    if path.is_dir() or not path.parent.is_dir():
        what = "is a folder" if path.is_dir() else f"cannot be written: there is no folder {path.parent}"
        raise UserError(f"--output {path} {what}")
    if path.exists() and not overwrite:
        raise UserError(f"--output {path} is there already; give another --output, or --overwrite to replace it")
