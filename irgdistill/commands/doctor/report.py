"""`irgdistill doctor`: describe this machine, and whether a planned run fits it."""

from __future__ import annotations

import json
import math
import os
import platform
import re
import shutil
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import Any

import torch
from rich.text import Text

from irgdistill.commands.doctor.trial import Trial, try_run
from irgdistill.commands.requests import DoctorRequest
from irgdistill.errors import UserError
from irgdistill.io import Report, table, visible
from irgdistill.models import build_network
from irgdistill.runtime import bf16_speed, choose_device, cores, instructions, may_have_bf16
from irgdistill.training import Setup, check_processes, on_backend, prepare
from irgdistill.version import __version__

SHARED = Path("/dev/shm")
"""Shared memory, through which loader workers pass images."""


MARGIN = {"cpu": 1.5}
"""Memory of the process over that of its tensors, by device; 1.1 on others. On a CPU, where freed memory is kept, 1.2
and 1.6 times as much was measured (benchmarks/results/pages.json, less the memory of a run of tiny networks)."""


DEVELOPERS = ("dev", "docs")
"""Extras that only developers of irgdistill need."""


STYLES = {"ok": "green", "change": "yellow", "no": "bold red"}


@dataclass
class Findings:
    """Rows of the table, the same values for scripts, and verdicts."""

    rows: list[list[str]] = field(default_factory=list)
    values: dict[str, Any] = field(default_factory=dict)
    verdicts: list[tuple[str, str]] = field(default_factory=list)
    """Pairs of a kind in `STYLES` and a sentence: it works, something should change, it will not run."""

    def row(self, name: str, text: str, **values: Any) -> None:
        self.rows.append([name, text])
        self.values |= values

    def verdict(self, kind: str, text: str) -> None:
        self.verdicts.append((kind, text))

    @property
    def fits(self) -> bool:
        return all(kind != "no" for kind, _ in self.verdicts)


def diagnose(request: DoctorRequest) -> bool:
    """Print what this machine has and what a planned run needs -> whether it fits.

    Raises UserError if the run itself would be refused.
    """
    found = Findings()
    _software(found)
    _machine(found, request.output)
    if request.planned:
        _planned_run(request, found)
    if request.as_json:
        verdicts = [{"kind": kind, "text": text} for kind, text in found.verdicts]
        print(json.dumps({**found.values, "verdicts": verdicts, "fits": found.fits}))  # noqa: T201  the command's result
        return found.fits
    table("", ["what", "found"], found.rows)
    console = Report(stdout=True).console
    for kind, text in found.verdicts:
        console.print(Text.assemble((kind, STYLES[kind]), f": {visible(text)}"), soft_wrap=not console.is_terminal)
    return found.fits


def _software(found: Findings) -> None:
    versions = {"irgdistill": __version__, "python": platform.python_version()}
    versions |= {name: version(name) for name in ("torch", "torchvision", "timm")}
    found.row("versions", "  ".join(f"{name} {number}" for name, number in versions.items()), versions=versions)
    extras: dict[str, dict[str, str | None]] = {}
    for line in _requirements():
        wanted = re.match(r"([\w.-]+).*extra == ['\"]([\w-]+)['\"]", line)
        if wanted is not None and wanted[2] not in DEVELOPERS:
            extras.setdefault(wanted[2], {})[wanted[1]] = _version(wanted[1])
    for extra, packages in extras.items():
        there = [f"{name} {number}" if number else f"{name} is missing" for name, number in packages.items()]
        remedy = "" if all(packages.values()) else f" (pip install 'irgdistill[{extra}]')"
        found.row(f"extra {extra}", ", ".join(there) + remedy)
    found.values["extras"] = extras


def _requirements() -> list[str]:
    try:
        return requires("irgdistill") or []
    except PackageNotFoundError:  # run from its source
        return []


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _machine(found: Findings, output: Path) -> None:
    for number in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(number)
        name = torch.cuda.get_device_name(number)
        found.row(f"cuda:{number}", f"{name}, {size(free)} of {size(total)} free")
        found.values.setdefault("cuda", []).append({"name": name, "free": free, "total": total})
    count, threads = cores(), torch.get_num_threads()
    there = memory()
    found.row(
        "cpu",
        f"{_count(count, 'core')}, {_count(threads, 'thread')} of torch, {size(there)} of memory free",
        cores=count,
    )
    found.values |= {"threads": threads, "memory": there}
    has, speed = instructions(), bf16_speed()
    auto = "measures the networks of a run" if may_have_bf16() else "is none"
    found.row(
        "cpu precision",
        f"a convolution in bf16 takes {1 / speed:.2g} of its time in float32; --amp auto {auto}; "
        f"instructions: {' '.join(has or ['unknown'])}",
        instructions=has,
        bf16_speed=round(speed, 3),
    )
    if SHARED.is_dir():
        found.row("shared memory", f"{size(_room(SHARED))} free", shared_memory=_room(SHARED))
    found.row("disk", f"{size(_room(output))} free for {output}", disk=_room(output))


def memory() -> int:
    """Bytes that processes of this container may still take; the whole memory if the system does not report it."""
    if not Path("/proc/meminfo").exists():
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    info = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    free = [int(info["MemAvailable"].split()[0]) * 1024]
    group = Path("/sys/fs/cgroup")
    for limit, used in (
        ("memory.max", "memory.current"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),
    ):
        if (group / limit).is_file() and (text := (group / limit).read_text().strip()).isdecimal():
            free.append(int(text) - int((group / used).read_text()))
    return min(free)


def _room(path: Path) -> int:
    """Free bytes on the disk of `path`, which need not exist."""
    path = path.absolute()
    return shutil.disk_usage(next(folder for folder in (path, *path.parents) if folder.is_dir())).free


def _count(number: int, what: str) -> str:
    return f"{number} {what}" + "s" * (number != 1)


def size(count: float) -> str:
    """Bytes in words, such as 1.5 GiB."""
    step = min(int(math.log(max(count, 1), 1024)), 4)
    return f"{count / 1024**step:.{0 if step == 0 else 1}f} {('B', 'KiB', 'MiB', 'GiB', 'TiB')[step]}"


# --- a planned run ----------------------------------------------------------------------------------------------------


def _planned_run(request: DoctorRequest, found: Findings) -> None:
    """Measure one process of a planned run and add verdicts. Raises UserError as the run would."""
    config = on_backend(request.config, request.backend)
    processes = max(torch.cuda.device_count(), 1) if request.gpus == "all" else int(request.gpus or 1)
    student, share = config.student, config.data.batch_size // processes
    fetched = [("student", student.name)] if student.pretrained and student.checkpoint is None else []
    if config.uses_teacher and config.teacher.checkpoint is None:
        fetched.append(("teacher", config.teacher.name))
    setup = prepare(config, fetch=False)
    check_processes(setup.config, setup.splits, processes)
    device = choose_device(setup.config.runtime.device)
    there = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else memory() // processes
    names = [setup.student.name, *([] if setup.teacher is None else [setup.teacher.name])]
    where = f" on each of {processes} processes" if processes > 1 else ""
    images = f"{share} images of {'×'.join(map(str, setup.crop.size))}{where}"
    found.row("run", f"{' under '.join(names)}, {setup.config.method}, {images}")
    found.values["batch"] = share
    try:
        trial = try_run(setup, share, there)
    except torch.OutOfMemoryError:
        found.verdict("no", f"not even a few images fit in the {size(there)} of {device}")
        return
    found.values["trial"] = asdict(trial)
    _memory_verdict(trial, share, there, device, found)
    _speed_verdict(trial, setup, processes, found)
    _room_verdicts(trial, setup, share, request.output, processes, found)
    for role, name in fetched:
        _fetch(role, str(name), found)


def _memory_verdict(trial: Trial, share: int, there: int, device: torch.device, found: Findings) -> None:
    margin = MARGIN.get(device.type, 1.1)
    needed = int(margin * trial.memory(share))
    found.row("weights", f"{size(trial.weights)}, optimizer {size(trial.optimizer)}")
    found.row("precision", trial.precision)
    found.row("step", f"{size(trial.per_image)} an image and {size(trial.fixed)} for gradients")
    found.row("memory", f"about {size(needed)} of {size(there)} on {device}", needed=needed, available=there)
    if needed <= there:
        found.verdict("ok", f"it fits: about {size(needed)} of {size(there)} on {device}")
        return
    largest = trial.largest(int(there / margin))
    smaller = f"a batch of {largest} would fit" if largest >= 2 else "no batch fits"
    found.verdict(
        "no",
        f"it does not fit: about {size(needed)} of {size(there)} on {device}; {smaller} (--batch-size), or try "
        "--amp bf16 or --set student.grad_checkpointing=true",
    )


def _speed_verdict(trial: Trial, setup: Setup, processes: int, found: Findings) -> None:
    data, count = setup.config.data, len(setup.splits.train_indices)
    step, loader = trial.step_rate, trial.loader_rate
    found.row("step's speed", f"{step:,.0f} images/s, at {trial.step_images} images")
    found.row("loader's speed", f"{loader:,.0f} images/s, {_count(data.workers, 'worker')}")
    rate = min(step, loader) if data.workers else 1 / (1 / step + 1 / loader)  # without workers they take turns
    if count:
        seconds = count / (rate * processes)
        found.row("epoch", f"{seconds:,.0f} s of training for {count:,} images", epoch_seconds=seconds)
    wanted = math.ceil(max(data.workers, 1) * step / loader)
    most = max(cores() // processes, 1)
    if rate > 0.9 * step:
        found.verdict("ok", "the loader keeps up with the step")
    elif max(wanted, 1) <= most:
        found.verdict("change", f"data loading takes {1 - rate / step:.0%} of the training time: --workers {wanted}")
    else:
        more = f"--workers {most}, " if most > data.workers else ""
        found.verdict(
            "change",
            f"data loading takes {1 - rate / step:.0%} of the training time; it needs {_count(wanted, 'worker')}, more "
            f"than there are cores: {more}smaller images on disk, or lighter augmentation",
        )


def _room_verdicts(trial: Trial, setup: Setup, share: int, output: Path, processes: int, found: Findings) -> None:
    workers = setup.config.data.workers * processes
    shared, passing = _room(SHARED) if SHARED.is_dir() else None, 2 * workers * share * 3 * math.prod(setup.crop.size)
    if shared is not None and passing > shared:
        found.verdict(
            "no",
            f"{_count(workers, 'worker')} may hold {size(passing)} in shared memory, {size(shared)} are free: "
            "fewer --workers, a smaller --batch-size, or more of it (docker: --shm-size)",
        )
    if trial.saved > _room(output):
        found.verdict("no", f"the run folder may take {size(trial.saved)}, {size(_room(output))} are free for {output}")
    if trial.bad_images:
        found.verdict("change", f"unreadable images: {', '.join(trial.bad_images[:3])}")


def _fetch(role: str, name: str, found: Findings) -> None:
    try:
        build_network(name, pretrained=True)
    except UserError as error:
        found.verdict("change", f"not tried: the {role}'s weights; {error}")
