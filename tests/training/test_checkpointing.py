"""Saving and resuming on small fakes: what is written in which order, failing disks, due times."""

from __future__ import annotations

import errno
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from irgdistill.config import load_config
from irgdistill.errors import UserError
from irgdistill.io import RunFolder, read_metadata
from irgdistill.runtime import World
from irgdistill.training import Checkpointer, Progress
from irgdistill.training import checkpointing as module
from irgdistill.training.state import SavedState, load_state


class Report:
    def __init__(self) -> None:
        self.warnings: list[str] = []
        self.records: list[dict[str, Any]] = []
        self.marks: list[dict[str, int]] = []

    def warn(self, text: str) -> None:
        self.warnings.append(text)

    def record(self, values: dict[str, Any]) -> None:
        self.records.append(values)

    def mark(self) -> dict[str, int]:
        return {"bytes": len(self.records)}

    def rewind(self, mark: dict[str, int]) -> None:
        self.marks.append(mark)


class Components(SimpleNamespace):
    """One linear layer in the place of networks, optimizer and all."""

    def state_dict(self) -> dict[str, Any]:
        return {"student": self.model.state_dict()}

    def load_state_dict(self, state: SavedState) -> None:
        self.model.load_state_dict(state.student)


class Fixture:
    def __init__(self, path: Path, monkeypatch: pytest.MonkeyPatch, **flags: Any) -> None:
        monkeypatch.setattr(module, "describe", lambda network, classes: {"format": 2, "architecture": network.name})
        monkeypatch.setattr(module, "timm_config", lambda network, classes: {"architecture": network.name})
        self.model, self.written = nn.Linear(1, 1, bias=False), list[str]()
        self.fill(0)
        config = load_config(flags={"method": "none", **flags})
        student = SimpleNamespace(name="student", from_timm=True)
        self.components = Components(
            config=config,
            world=World(),
            device=torch.device("cpu"),
            model=self.model,
            evaluated=SimpleNamespace(model=self.model),
            local_models=[],
            scheduler=SimpleNamespace(step_update=lambda update: self.written.append(f"schedule {update}")),
            unreadable=SimpleNamespace(names=["a.png"]),
            batches=9,
            data_facts={"training images": 8, "classes": ["cat", "dog"]},
            setup=SimpleNamespace(student=student, teachers=[], plan=None, classes=["cat", "dog"], checksums=None),
        )
        self.folder, self.progress, self.report = RunFolder(path), Progress(), Report()
        self.folder.state.parent.mkdir(parents=True, exist_ok=True)
        self.saver = Checkpointer(self.components, self.progress, self.folder, self.report)  # type: ignore[arg-type]
        save = module.save_tensors

        def save_tensors(path: Path, *rest: Any) -> None:
            self.written.append(path.name)
            save(path, *rest)

        def save_state(path: Path, state: Any, previous: Path) -> None:
            self.written.append(path.name)
            original(path, state, previous)

        original = module.save_state
        monkeypatch.setattr(module, "save_tensors", save_tensors)
        monkeypatch.setattr(module, "save_state", save_state)

    def fill(self, value: float) -> None:
        nn.init.constant_(self.model.weight, value)

    def evaluated(self, epoch: int, top1: float) -> None:
        """An epoch that has just been evaluated."""
        self.progress.epoch, self.progress.batch = epoch, 0
        self.progress.last = {"epoch": epoch, "top1": top1}
        if not self.progress.best or top1 > self.progress.best["top1"]:
            self.progress.best = self.progress.last
            self.saver.save_weights("best")
        self.saver.save_weights("last")
        self.saver.save_state()


@pytest.fixture
def fixture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Fixture:
    return Fixture(tmp_path / "run", monkeypatch)


def weight(path: Path) -> float:
    return float(load_file(path)["weight"])


def test_weights_are_written_before_the_state_that_refers_to_them(fixture: Fixture) -> None:
    fixture.saver.save_weights("last")
    assert fixture.written == [] and not fixture.folder.last.exists(), "they wait for the state"
    fixture.evaluated(1, 50.0)
    assert fixture.written == ["last.safetensors", "best.safetensors", "state.safetensors"]
    metadata = read_metadata(fixture.folder.best)
    assert metadata is not None and metadata["metrics"] == {"epoch": 1, "top1": 50.0}


def test_a_state_holds_what_the_run_is_resumed_with(fixture: Fixture) -> None:
    progress = fixture.progress
    progress.epoch, progress.batch, progress.update, progress.seconds, progress.images = 1, 3, 7, 2.5, 40
    progress.best = progress.last = {"epoch": 1, "top1": 40.0}
    progress.teacher_record = {"kind": "teacher", "top1": 90.0}
    progress.sums = {"count": torch.tensor(2.0), "loss": torch.tensor(3.0)}
    fixture.fill(5)
    torch.manual_seed(4)
    fixture.saver.save_state()
    following = torch.rand(3)
    state = load_state(fixture.folder.state)
    assert set(state) == {
        *("config", "data", "taught_by", "epoch", "batch", "update", "student", "processes", "best", "last"),
        *("seconds", "images_seen", "bad_images", "metrics", "tried"),
    }
    fixture.fill(0)
    fixture.progress.__init__()  # type: ignore[misc]
    fixture.components.unreadable.names = []
    fixture.saver.resume(SavedState.parse(state, fixture.folder.state))
    assert (progress.epoch, progress.batch, progress.update) == (1, 3, 7)
    assert (progress.seconds, progress.images, progress.teacher_record) == (2.5, 40, {"kind": "teacher", "top1": 90.0})
    assert float(fixture.model.weight.detach()) == 5 and fixture.components.unreadable.names == ["a.png"]
    assert {name: float(value) for name, value in progress.sums.items()} == {"count": 2.0, "loss": 3.0}
    assert torch.equal(torch.rand(3), following), "the generators go on"
    assert "schedule 7" in fixture.written and fixture.report.marks == [{"bytes": 0}]


def test_the_state_before_is_kept_and_a_position_is_written_once(fixture: Fixture) -> None:
    fixture.progress.batch = 1
    fixture.saver.save_state()
    fixture.saver.save_state()
    assert fixture.written == ["state.safetensors"] and not fixture.folder.previous_state.exists()
    fixture.progress.batch = 2
    fixture.saver.save_state()
    states = [load_state(path)["batch"] for path in (fixture.folder.previous_state, fixture.folder.state)]
    assert states == [1, 2] and fixture.saver.saved == "the last saved state is epoch 1, batch 2"


def test_a_disk_that_fails_warns_once_and_is_tried_again(fixture: Fixture, monkeypatch: pytest.MonkeyPatch) -> None:
    fixture.progress.batch = 1
    fixture.saver.save_state()
    working = module.save_tensors

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(module, "save_tensors", full)
    fixture.fill(1)
    fixture.evaluated(1, 50.0)
    fixture.fill(2)  # training goes on
    fixture.saver.save_state()
    assert fixture.report.warnings == [
        "not saved (No space left on device); the last saved state is epoch 1, batch 1; "
        "training continues and tries again"
    ]
    assert fixture.saver.error is not None and load_state(fixture.folder.state)["batch"] == 1
    with pytest.raises(OSError, match="No space"):
        fixture.saver.save_summary({})
    monkeypatch.setattr(module, "save_tensors", working)
    fixture.progress.batch = 2
    fixture.saver.save_state()
    assert fixture.saver.error is None and len(fixture.report.warnings) == 2
    assert weight(fixture.folder.best) == weight(fixture.folder.last) == 1, "as they were when they were queued"
    assert load_state(fixture.folder.state)["batch"] == 2


def test_the_first_state_that_cannot_be_written_ends_the_run(fixture: Fixture, monkeypatch: pytest.MonkeyPatch) -> None:
    def readonly(*_: Any) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(module, "save_state", readonly)
    with pytest.raises(OSError, match="Read-only"):
        fixture.saver.save_first()
    assert not fixture.folder.config.exists()


@pytest.mark.parametrize(
    ("flags", "update", "minutes", "due"),
    [
        ({"runtime.save_every_steps": 5}, 10, 0, True),
        ({"runtime.save_every_steps": 5}, 11, 0, False),
        ({"runtime.save_every_steps": 0, "runtime.save_every_minutes": 0}, 10, 1000, False),
        ({"runtime.save_every_steps": 0, "runtime.save_every_minutes": 2}, 1, 1.9, False),
        ({"runtime.save_every_steps": 0, "runtime.save_every_minutes": 2}, 1, 2.1, True),
    ],
)
def test_due_times(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    flags: dict[str, float],
    update: int,
    minutes: float,
    due: bool,
) -> None:
    now = 100.0
    monkeypatch.setattr(module.time, "monotonic", lambda: now)
    fixture = Fixture(tmp_path / "run", monkeypatch, **flags)
    now += 60 * minutes
    fixture.progress.update = update
    assert fixture.saver.due() == due
    fixture.saver.save_state()
    fixture.progress.update = 1
    assert not fixture.saver.due(), "the time counts from the last save"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"data": {"training images": 9, "classes": ["cat", "dog"]}}, "training images 8, were 9"),
        ({"data": {"training images": 8, "classes": ["cat", "cow"]}}, "classes"),
        ({"taught_by": "0badcafe"}, "the teacher is not the one that the run learns from"),
        ({"student": {"other": torch.ones(1)}}, "does not fit the run's networks"),
    ],
)
def test_a_state_of_another_run_is_refused(fixture: Fixture, change: dict[str, Any], message: str) -> None:
    fixture.saver.save_state()
    with pytest.raises(UserError, match=message):
        fixture.saver.resume(SavedState.parse({**load_state(fixture.folder.state), **change}, fixture.folder.state))


def test_weights_newer_or_older_than_the_state_are_made_consistent_with_it(fixture: Fixture) -> None:
    fixture.fill(1)
    fixture.evaluated(1, 50.0)
    state = SavedState.read(fixture.folder.state)
    fixture.fill(2)
    fixture.evaluated(2, 40.0)
    fixture.folder.best.unlink()
    fixture.saver.resume(state)
    assert weight(fixture.folder.last) == weight(fixture.folder.best) == 1
    assert fixture.progress.best == {"epoch": 1, "top1": 50.0}


def test_better_weights_that_were_saved_after_the_state_count(fixture: Fixture) -> None:
    fixture.fill(1)
    fixture.evaluated(1, 50.0)
    fixture.progress.batch = 1
    fixture.saver.save_state()
    state = SavedState.read(fixture.folder.state)
    fixture.evaluated(2, 60.0)
    fixture.saver.resume(state)
    assert fixture.progress.best == {"epoch": 2, "top1": 60.0}


def test_the_teachers_record_survives_a_stop_right_after_the_first_state(fixture: Fixture) -> None:
    record: dict[str, Any] = {"kind": "teacher", "top1": 90.0}
    fixture.progress.teacher_record = record
    fixture.saver.save_first()
    assert fixture.report.records == [record]
    fixture.saver.resume(SavedState.read(fixture.folder.state))
    assert fixture.report.records == [record, record], "the journal was rewound before"


def test_another_number_of_processes_takes_the_means_of_all(fixture: Fixture) -> None:
    fixture.progress.sums = {"count": torch.tensor(2.0), "loss": torch.tensor(3.0)}
    fixture.saver.save_state()
    state = load_state(fixture.folder.state)
    second: dict[str, dict[str, Tensor]] = {"sums": {"count": torch.tensor(2.0), "loss": torch.tensor(5.0)}}
    state["processes"] = [state["processes"][0], {**state["processes"][0], **second}]
    fixture.saver.resume(SavedState.parse(state, fixture.folder.state))
    assert {name: float(value) for name, value in fixture.progress.sums.items()} == {"count": 2.0, "loss": 4.0}
