"""Completes a configuration: absolute paths, what the student's checkpoint records, the device of a backend."""

from __future__ import annotations

from pathlib import Path

from irgdistill.config import Config, TeacherConfig, absolute_source
from irgdistill.models import LOCAL, resolve_student


def resolved(config: Config, resuming: bool = False) -> Config:
    """The configuration with absolute paths, and the student's settings from its checkpoint. Raises UserError."""
    student = config.student if resuming else resolve_student(config.student)
    data, source = config.data, config.data.source and absolute_source(config.data.source)
    return config.replaced(
        {
            "student": student.replaced({"name": _absolute(student.name)}),
            "data": data.replaced({"source": source, "root": data.root.resolve()}),
            "teacher": _with_absolute_paths(config.teacher),
            "teachers": tuple(map(_with_absolute_paths, config.teachers)),
        }
    )


def _with_absolute_paths(teacher: TeacherConfig) -> TeacherConfig:
    return teacher.replaced(
        {
            "name": _absolute(teacher.name),
            "checkpoint": teacher.checkpoint and teacher.checkpoint.resolve(),
            "cache": teacher.cache and teacher.cache.resolve(),
        }
    )


def on_backend(config: Config, backend: str | None) -> Config:
    """The configuration on the device that `--backend` needs: gloo runs on the CPU."""
    return config.replaced({"runtime.device": "cpu"}) if backend == "gloo" else config


def _absolute(name: str | None) -> str | None:
    """The name of a network; one in a folder with the folder's full path."""
    if name is None or not name.startswith(LOCAL):
        return name
    return LOCAL + str(Path(name.removeprefix(LOCAL)).resolve())
