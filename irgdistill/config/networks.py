"""Settings of the two networks. Imports no torch."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field

from irgdistill.config.fields import Mean, Positive, Section, Size, Std
from irgdistill.config.flag import CHANGEABLE, NETWORKS, Flag
from irgdistill.config.model_args import check_model_args

Pooling = Literal["auto", "cls", "mean", "cls+mean"]
"""How an embedding is made of a network's last features."""


class Preprocessing(Section):
    """How a network wants its images normalised and resized; what is not set is the network's own."""

    mean: Annotated[
        Mean | None,
        Flag(
            "--{section}-mean", NETWORKS, "Of pixels in [0, 1]: R,G,B or one number; default: its own.", metavar="R,G,B"
        ),
    ] = None
    """Mean of each channel, for pixels in [0, 1]; one number counts for all. Default: the network's own."""
    std: Annotated[
        Std | None,
        Flag(
            "--{section}-std", NETWORKS, "Of pixels in [0, 1]: R,G,B or one number; default: its own.", metavar="R,G,B"
        ),
    ] = None
    """Standard deviation of each channel, for pixels in [0, 1]; one number counts for all. Default: the network's
    own."""
    interpolation: Annotated[
        Literal["nearest", "bilinear", "bicubic", "box", "hamming", "lanczos", "random"] | None,
        Flag("--{section}-interpolation", NETWORKS, "bilinear, bicubic, …; default: its own.", metavar="MODE"),
    ] = None
    """Interpolation by its name in timm. Images are resized once for both networks, by the student's."""
    crop_pct: Annotated[
        Positive | None,
        Flag("--{section}-crop-pct", NETWORKS, "Share that validation crops; default: its own.", metavar="SHARE"),
    ] = None
    """Share of the resized image that validation crops. Both networks see the student's crop."""

    @property
    def given(self) -> dict[str, Any]:
        """What is set."""
        return self.model_dump(exclude_none=True)


def _own_if_none(value: Any) -> Any:
    """Older versions wrote nothing for the network's own preprocessing."""
    return {} if value is None else value


OwnPreprocessing = Annotated[Preprocessing, BeforeValidator(_own_if_none)]


class TeacherConfig(Section):
    name: Annotated[
        str | None,
        Flag(
            "--teacher",
            NETWORKS,
            "timm name, hf-hub:…, local-dir:… or FILE.py:FUNCTION; may be repeated, as all options of teachers.",
            completion="network",
            repeated=True,
            metavar="TIMM-NAME",
            common=True,
        ),
    ] = None
    """timm name, `hf-hub:…`, `local-dir:…`, or `FILE.py:FUNCTION`, a function that returns any `nn.Module`. An
    irgdistill checkpoint knows its architecture and needs no name."""
    checkpoint: Annotated[
        Path | None,
        Flag(
            "--teacher-checkpoint",
            NETWORKS,
            "Weights: a run, .safetensors or .pth; default: pretrained.",
            repeated=True,
            metavar="RUN|FILE",
            common=True,
        ),
        CHANGEABLE,
    ] = None
    """Weights: safetensors, or a .pth read with `weights_only=True`. Default: timm's pretrained weights."""
    input_size: Annotated[
        Size | None,
        Flag(
            "--teacher-input-size",
            NETWORKS,
            "224 or 256x192; default: the teacher's own.",
            repeated=True,
            metavar="SIZE",
        ),
    ] = None
    """Height and width in pixels; default: what the teacher was trained on."""
    preprocessing: OwnPreprocessing = Field(default_factory=Preprocessing)
    cache: Annotated[
        Path | None,
        Flag(
            "--teacher-cache",
            NETWORKS,
            "Cache written by cache-teacher, used instead of a live teacher.",
            repeated=True,
            metavar="DIR",
            common=True,
        ),
        CHANGEABLE,
    ] = None
    """Cache written by `cache-teacher`, used instead of a live teacher."""
    pooling: Pooling = "auto"
    """How the teacher's embedding is made: by its own head, or of a transformer's class token, the mean of its patch
    tokens, or both."""
    weight: Annotated[
        Positive,
        Flag("--teacher-weight", NETWORKS, "Its share beside other teachers.", repeated=True, metavar="WEIGHT"),
    ] = 1.0
    """Its share, relative to the other teachers', in the means over several teachers."""
    check: Annotated[
        bool, Flag("--skip-teacher-check", NETWORKS, "Train even if the teacher is near chance.", off=True)
    ] = True
    """Evaluate the teacher before training and stop if it is near chance. False: none of several is checked."""


def _model_args(args: dict[str, Any]) -> dict[str, Any]:
    check_model_args(args)
    return args


class StudentConfig(Section):
    name: Annotated[
        str | None,
        Flag(
            "--student",
            NETWORKS,
            "To train: timm name or FILE.py:FUNCTION.",
            completion="network",
            metavar="TIMM-NAME",
            common=True,
        ),
    ] = None
    """Network to train: timm name, or `FILE.py:FUNCTION` as for the teacher; the function may take `num_classes`. An
    irgdistill checkpoint knows its architecture and needs no name."""
    pretrained: Annotated[
        bool, Flag("--student-pretrained", NETWORKS, "Start from timm's pretrained weights.", common=True)
    ] = False
    """Start from timm's pretrained weights, unless there is a checkpoint. The classifier is new if the number of
    classes differs."""
    checkpoint: Annotated[
        Path | None,
        Flag(
            "--student-checkpoint",
            NETWORKS,
            "Start from these weights: a run, .safetensors or .pth.",
            metavar="RUN|FILE",
        ),
    ] = None
    """Start from these weights: a run folder or checkpoint of irgdistill, or a timm file. The classifier is new if the
    classes differ."""
    preprocessing: OwnPreprocessing = Field(default_factory=Preprocessing)
    input_size: Annotated[
        Size | None, Flag("--input-size", NETWORKS, "The student's; default: its own.", metavar="SIZE", common=True)
    ] = None
    """Height and width in pixels; default: the network's own."""
    grad_checkpointing: bool = False
    """Recompute blocks in the backward pass instead of keeping them; batch norm then counts each batch twice."""
    args: Annotated[dict[str, Any], AfterValidator(_model_args)] = Field(default_factory=dict)
    """Further arguments of `timm.create_model` (or of FUNCTION), as drop_path_rate, that no other setting decides."""
