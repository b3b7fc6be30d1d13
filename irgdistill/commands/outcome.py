"""The end of `distill` and `train`: teacher and student side by side, and the commands that come next."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from copy import deepcopy
from pathlib import Path
from statistics import median

import torch
from torch import nn

from irgdistill.io import SELECTING, table
from irgdistill.models import Network, NetworkRecord, fold_batch_norm, parameters, rebuild_network
from irgdistill.training import Trainer, metric_name, now

SECONDS = 0.2
"""Time for which the speed of a network is measured; at least one batch."""

BATCH = {"cpu": 1, "cuda": 32}
"""Images of a measured batch by the kind of device."""


def show_outcome(trainer: Trainer, folder: Path) -> None:
    """Print the table and the next commands of a run that has ended. Its networks have no taps afterwards."""
    run, best = trainer.components, trainer.progress.best
    setup, name = run.setup, metric_name(best)
    run.student.release()
    student = {
        f"{SELECTING[name]} %": best[name],
        **_size(setup.student),
        **_speed(trainer, setup.student, deepcopy(setup.student.model)),
    }
    if setup.teacher is None:
        table(setup.student.name, ["", "network"], [[key, _shown(value)] for key, value in student.items()], False)
    else:
        live = None if run.teacher is None else run.teacher.network
        score, note = _teachers_score(trainer, name)
        teacher = {f"{SELECTING[name]} %": score, **_size(setup.teacher)}
        teacher |= {} if live is None else _speed(trainer, setup.teacher, live.release())
        rows = [
            [key, _shown(teacher.get(key)), _shown(value), _difference(key, teacher.get(key), value)]
            for key, value in student.items()
        ]
        which = f"teacher 1 of {len(setup.teachers)}" if len(setup.teachers) > 1 else "teacher"
        title = f"{setup.teacher.name} → {setup.student.name}{note}"
        table(title, ["", which, "student", "difference"], rows, stdout=False)
    where, form = shlex.quote(str(folder)), ""
    if setup.student.code is not None:
        files = {plugin.sha256: plugin.path for plugin in setup.config.plugins}
        code = setup.student.code
        where += f" --plugin {shlex.quote(str(files.get(code.sha256, code.path)))}"
        form = " --format onnx"
    trainer.report.line(f"next: irgdistill eval {where}{'' if setup.classes else ' --probe knn'}")
    trainer.report.line(f"      irgdistill export {where}{form}")


def _teachers_score(trainer: Trainer, name: str) -> tuple[float | None, str]:
    """The teacher's value of the metric, None if it is unknown, and a note if it is of fewer images."""
    best, record = trainer.progress.best, trainer.progress.teacher_record
    if name == "top1" and record is not None:
        few = record["images"] < best["images"]
        return record["top1"], f" (its top-1 on {record['images']:,} images)" if few else ""
    return best.get(f"teacher_{name}"), ""


def _size(network: Network) -> dict[str, float]:
    """Parameters, and megabytes of the weights and buffers as they are saved, before any folding."""
    model = rebuild_network(NetworkRecord.model_validate(network.describe()), meta=True).model
    size = sum(value.numel() * value.element_size() for value in model.state_dict().values())
    return {"parameters": parameters(model), "size in MB": size / 1e6}


def _speed(trainer: Trainer, network: Network, model: nn.Module) -> Mapping[str, float]:
    """Milliseconds for an image of noise: the median, in the run's precision and with folded batch norms as there."""
    run, runtime = trainer.components, trainer.config.runtime
    batch = BATCH.get(run.device.type, 1)
    layout = torch.channels_last if runtime.channels_last else torch.contiguous_format
    images = torch.randn(batch, *network.input.shape, device=run.device).contiguous(memory_format=layout)
    if runtime.fold_batch_norm:
        fold_batch_norm(model.eval(), network.input.size)

    @torch.no_grad()
    def forward() -> None:
        with run.autocast:
            model(images)

    times = list[float]()
    forward()
    while sum(times) < SECONDS:
        start = now(run.device)
        forward()
        times.append(now(run.device) - start)
    return {f"ms per image (batch {batch})": 1000 * median(times) / batch}


def _shown(value: float | None) -> str:
    if value is None:
        return "–"
    return f"{value:,}" if isinstance(value, int) else f"{value:.2f}"


def _difference(title: str, teacher: float | None, student: float) -> str:
    """In points of percent, or how many times less or more."""
    if teacher is None:
        return "–"
    if title.endswith("%"):
        return f"{round(student, 2) - round(teacher, 2):+.2f}"
    less = teacher >= student
    return f"{max(teacher, student) / min(teacher, student):.1f}× {'less' if less else 'more'}"
