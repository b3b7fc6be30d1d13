"""Arguments of `timm.create_model` that other settings decide. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterable

DECIDED = {
    "model_name": "--student",
    "pretrained": "--student-pretrained",
    "checkpoint_path": "--student-checkpoint",
    "pretrained_cfg": "student.preprocessing",
    "num_classes": "--data",
    "input_size": "--input-size",
    "features_only": "--taps-student",
    "feature_cfg": "--taps-student",
    "out_indices": "--taps-student",
    "device": "--device",
    "dtype": "--amp",
}
"""Argument -> the option or setting that decides it."""


def check_model_args(names: Iterable[str]) -> None:
    """Raises ValueError for the first argument that another setting decides."""
    for name in names:
        if name in DECIDED:
            raise ValueError(f"{name} is decided by {DECIDED[name]}: give that instead")
