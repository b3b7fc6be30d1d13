"""What TensorBoard and W&B are given is what metrics.jsonl holds, also of runs that died and went on."""

from __future__ import annotations

import io
import json
import struct
import sys
from collections import namedtuple
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image
from safetensors.torch import load_file
from support import SMALL, Run, write_plugin
from support.processes import Command

from irgdistill.io.loggers import base
from irgdistill.io.loggers.tensorboard import TensorBoard
from irgdistill.plugins import snapshot
from irgdistill.training.checkpointing import Checkpointer
from irgdistill.training.trainer import Trainer

pytest.importorskip("tensorboard")
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

Points = dict[tuple[str, int], float]
PICTURES = ("--set", "runtime.graph_images_every=1")


@pytest.fixture(autouse=True)
def _offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")


@pytest.fixture
def blank(monkeypatch: pytest.MonkeyPatch) -> None:
    """Empty pictures, for tests that look at anything else: drawing is most of the time."""
    monkeypatch.setattr("irgdistill.commands.inspect.figures.stage_figure", lambda *_: Figure(figsize=(1, 1)))


def arguments(teacher: Path, folder: Path, output: Path, *options: object) -> list[object]:
    networks = ("--teacher-checkpoint", teacher, "--skip-teacher-check", "--student", "cifar_resnet14_x0_5")
    more = ("--epochs", 2, "--set", "runtime.gradient_shares_every=2", "--set", "student.args={drop_rate: 0.2}")
    return ["distill", *networks, "--data", folder, "--output", output, *SMALL, *more, *options]


def expected(output: Path) -> Points:
    """(name, update) -> value of every number in metrics.jsonl."""
    points: Points = {}
    update = 0
    for line in (output / "metrics.jsonl").read_text().splitlines():
        record = json.loads(line)
        kind, update = record.pop("kind"), record.pop("update", update)
        values = {**record, **record.pop("share", {})}
        values.pop("share", None)
        values |= {f"terms/{name}": value for name, value in values.pop("terms", {}).items()}
        for name, value in values.items():
            assert points.setdefault((f"{kind}/{name}", update), value) == value, "one of each"
    return points


def events(output: Path) -> EventAccumulator:
    found = EventAccumulator(str(output / "tensorboard"), size_guidance={"scalars": 0, "images": 0})
    found.Reload()
    return found


def tensorboard(output: Path) -> Points:
    found, points = events(output), {}
    for name in found.Tags()["scalars"]:
        for event in found.Scalars(name):
            assert (name, event.step) not in points, f"{name} doubled at {event.step}"
            points[name, event.step] = event.value
    return points


def wandb_files(output: Path) -> list[Path]:
    return sorted(output.glob("wandb/offline-run-*/*.wandb"), key=lambda path: path.stat().st_mtime)


def wandb_records(path: Path) -> Iterator[Any]:
    """Records of an offline run: blocks of 32 KiB, each record with a checksum, a length and a kind before it."""
    from wandb.proto.wandb_internal_pb2 import Record

    content, position, parts = path.read_bytes(), 7, b""
    while position + 7 <= len(content):
        if (room := 32768 - position % 32768) < 7:
            position += room
            continue
        _, length, kind = struct.unpack_from("<IHB", content, position)
        parts += content[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # whole, or the last part
            record = Record()
            record.ParseFromString(parts)
            yield record
            parts = b""


def wandb_points(output: Path) -> Points:
    points: Points = {}
    for path in wandb_files(output):
        for record in wandb_records(path):
            if record.WhichOneof("record_type") != "history":
                continue
            for item in record.history.item:
                name, value = item.key or "/".join(item.nested_key), json.loads(item.value_json)
                if not name.startswith(("_", "graphs")):
                    assert (name, record.history.step.num) not in points, f"{name} doubled"
                    points[name, record.history.step.num] = value
    return points


def same(found: Points, wanted: Points) -> None:
    """But for speeds, which a repeated update has anew."""
    assert set(found) == set(wanted)
    for key, value in wanted.items():
        if not key[0].endswith("images_per_second"):
            assert found[key] == pytest.approx(value, rel=1e-5), key


@pytest.mark.usefixtures("blank")
def test_loggers_hold_what_metrics_jsonl_holds(run: Run, teacher: Path, folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("wandb")
    output = tmp_path / "run"
    result = run(*arguments(teacher, folder, output, "--log", "tensorboard", "--log", "wandb", *PICTURES))
    assert result.code == 0 and "warning" not in result.err, result.err
    wanted = expected(output)
    assert ("train/terms/edges", 6) in wanted and ("eval/top1", 3) in wanted and ("gradient/kd", 4) in wanted
    same(tensorboard(output), wanted)
    same(wandb_points(output), wanted)
    found = events(output)
    text = found.Tensors("config/text_summary")[0].tensor_proto.string_val[0].decode()
    assert "cifar_resnet14_x0_5" in text and "loggers:\n  - tensorboard\n  - wandb" in text
    (path,) = wandb_files(output)
    (start,) = [record.run for record in wandb_records(path) if record.WhichOneof("record_type") == "run"][:1]
    assert start.run_id == json.loads((output / "wandb.json").read_text())["id"]
    config = {update.key: json.loads(update.value_json) for update in start.config.update}
    assert config["seed"] == 3 and config["student"]["name"] == "cifar_resnet14_x0_5"


def test_pictures_of_the_graphs(
    run: Run, teacher: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the untrained student and after every epoch; the teacher's graph never changes, the student's does."""
    from irgdistill.commands.inspect import figures as plot

    views: list[Any] = []
    draw = plot.stage_figure
    monkeypatch.setattr(plot, "stage_figure", lambda view, blocks: views.append(view) or draw(view, blocks))
    output = tmp_path / "run"
    assert run(*arguments(teacher, folder, output, "--log", "tensorboard", "--ema", 0.9, *PICTURES)).code == 0
    found = events(output)
    assert found.Tags()["images"] == ["graphs/stage-1", "graphs/stage-2", "graphs/stage-4", "graphs/logits"]
    for number, name in enumerate(found.Tags()["images"]):
        shown, drawn = found.Images(name), views[number::4]
        assert [event.step for event in shown] == [0, 3, 6] and len(drawn) == 3
        for event in shown:
            picture = Image.open(io.BytesIO(event.encoded_image_string))
            assert picture.width > 2 * picture.height and len(picture.getcolors(picture.width * picture.height)) > 50
        first, last = drawn[0].edges, drawn[2].edges
        assert np.array_equal(first["teacher"], last["teacher"]) and first["teacher"].shape == (24, 24)
        assert not np.array_equal(first["student"], last["student"])


@pytest.mark.usefixtures("blank")
def test_without_stages_the_logits_are_shown(run: Run, teacher: Path, folder: Path, tmp_path: Path) -> None:
    options = ("--log", "tensorboard", "--method", "kd", "--epochs", 1, *PICTURES)
    assert run(*arguments(teacher, folder, tmp_path / "run", *options)).code == 0
    assert events(tmp_path / "run").Tags()["images"] == ["graphs/logits"]


def test_looking_changes_nothing(run: Run, teacher: Path, folder: Path, tmp_path: Path) -> None:
    for name, options in (("plain", ()), ("logged", ("--log", "tensorboard", *PICTURES))):
        assert run(*arguments(teacher, folder, tmp_path / name, "--epochs", 1, "--mixup", 0.2, *options)).code == 0
    a, b = (load_file(tmp_path / name / "last.safetensors") for name in ("plain", "logged"))
    assert all(torch.equal(a[key], b[key]) for key in a)
    assert not (tmp_path / "plain" / "tensorboard").exists() and not (tmp_path / "plain" / "wandb.json").exists()


class Killed(BaseException):
    pass


def die(patch: pytest.MonkeyPatch, where: str) -> None:
    """The fifth step never ends, or the first epoch's evaluation is recorded and not saved."""
    step, calls = Trainer.train_step, []

    def fifth(self: Trainer, *batch: Any) -> Any:
        calls.append(1)
        if len(calls) == 6:
            raise Killed
        return step(self, *batch)

    def never(self: Checkpointer, which: str) -> None:
        raise Killed

    if where == "step":
        patch.setattr(Trainer, "train_step", fifth)
    else:
        patch.setattr(Checkpointer, "save_weights", never)


@pytest.mark.usefixtures("blank")
@pytest.mark.parametrize(("where", "every"), [("step", 2), ("evaluation", 3)])
def test_a_run_that_died_goes_on_in_the_same_log(
    run: Run, teacher: Path, folder: Path, tmp_path: Path, where: str, every: int
) -> None:
    """The state is older than the log: nothing of it is doubled, nothing is missing."""
    pytest.importorskip("wandb")
    output = tmp_path / "run"
    options = ("--log", "tensorboard", "--log", "wandb", "--save-every-steps", every, *PICTURES)
    with pytest.MonkeyPatch.context() as patch:
        die(patch, where)
        with pytest.raises(Killed):
            run(*arguments(teacher, folder, output, *options))
    resumed = run("distill", "--resume", output)
    assert resumed.code == 0, resumed.err
    wanted = expected(output)
    assert len([key for key in wanted if key[0] == "train/loss"]) == 6
    same(tensorboard(output), wanted)
    assert [event.step for event in events(output).Images("graphs/stage-4")] == [0, 3, 6]
    same(wandb_points(output), wanted)
    ids = {r.run.run_id for p in wandb_files(output) for r in wandb_records(p) if r.WhichOneof("record_type") == "run"}
    assert len(wandb_files(output)) == 2 and ids == {json.loads((output / "wandb.json").read_text())["id"]}


def test_a_logger_may_come_later_and_gets_everything(run: Run, teacher: Path, folder: Path, tmp_path: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        die(patch, "step")
        with pytest.raises(Killed):
            run(*arguments(teacher, folder, tmp_path / "run"))
    resumed = run("distill", "--resume", tmp_path / "run", "--log", "tensorboard")
    assert resumed.code == 0, resumed.err
    same(tensorboard(tmp_path / "run"), expected(tmp_path / "run"))


def test_overwriting_a_run_begins_its_log_anew(run: Run, teacher: Path, folder: Path, tmp_path: Path) -> None:
    for _ in range(2):
        options = ("--log", "tensorboard", "--epochs", 1, "--overwrite")
        assert run(*arguments(teacher, folder, tmp_path / "run", *options)).code == 0
    assert len(list((tmp_path / "run" / "tensorboard").iterdir())) == 1
    same(tensorboard(tmp_path / "run"), expected(tmp_path / "run"))


@pytest.mark.usefixtures("blank")
@pytest.mark.parametrize("broken", ["__init__", "scalars", "images", "close"])
def test_a_logger_that_fails_ends_nothing(
    run: Run, teacher: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, broken: str
) -> None:
    def fail(*_: object) -> None:
        raise OSError("the disk is full\nand more")

    monkeypatch.setattr(TensorBoard, broken, fail)
    options = ("--log", "tensorboard", "--epochs", 1, *PICTURES)
    result = run(*arguments(teacher, folder, tmp_path / "run", *options))
    assert result.code == 0, result.err
    assert result.err.count("warning: --log tensorboard failed and is not used any more (the disk is full and") == 1
    assert len([key for key in expected(tmp_path / "run") if key[0] == "train/loss"]) == 3


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("{", "is damaged: it is not JSON"),
        ("[]", "has values that do not fit"),
        ('{"id": 5}', "id: input should be a valid string"),
        ('{"id": "x", "given": {"train": "never"}}', "given.train: input should be a valid integer"),
    ],
)
def test_a_damaged_wandb_json_is_one_warning(tmp_path: Path, text: str, reason: str) -> None:
    """No new W&B run takes the place of the one whose name is lost."""
    pytest.importorskip("wandb")
    path, warnings = tmp_path / "wandb.json", list[str]()
    path.write_text(text)
    loggers = base.Loggers(["wandb"], tmp_path, 0, {}, "", [], warnings.append)
    assert not loggers and len(warnings) == 1 and f"({path} " in warnings[0] and reason in warnings[0]
    assert path.read_text() == text and not wandb_files(tmp_path)


def test_pictures_that_fail_end_nothing(
    run: Run, teacher: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("irgdistill.commands.inspect.figures.stage_figure", lambda *_: 1 / 0)
    options = ("--log", "tensorboard", "--epochs", 1, *PICTURES)
    result = run(*arguments(teacher, folder, tmp_path / "run", *options))
    assert result.code == 0 and "no images of the graphs after epoch 1: division by zero" in result.err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--log", "tensorbord"), "did you mean tensorboard"),
        (PICTURES, "no logger receives the images; give --log mlflow or --log tensorboard or --log wandb"),
        ((*PICTURES, "--log", "tensorboard", "--method", "none"), "method 'none' has no teacher"),
    ],
)
def test_bad_input_is_one_line(
    run: Run, teacher: Path, folder: Path, tmp_path: Path, options: tuple[object, ...], message: str
) -> None:
    result = run(*arguments(teacher, folder, tmp_path / "run", *options))
    assert result.code == 2 and result.err.count("\n") == 1 and message in result.err, result.err
    assert not (tmp_path / "run").exists()


def test_a_plugin_file_adds_a_logger(run: Run, teacher: Path, folder: Path, tmp_path: Path) -> None:
    plugin = ("--plugin", write_plugin(tmp_path))
    restore = snapshot()
    try:
        result = run(*arguments(teacher, folder, tmp_path / "run", *plugin, "--log", "lines"))
        assert result.code == 0 and "warning" not in result.err, result.err
        wrong = run(*arguments(teacher, folder, tmp_path / "other", *plugin, "--log", "line"))
        assert wrong.code == 2 and "expected lines or mlflow or tensorboard or wandb; did you mean lines?" in wrong.err
    finally:
        restore()
    lines = map(json.loads, (tmp_path / "run" / "lines.jsonl").read_text().splitlines())
    assert {(name, step): value for name, step, value in lines} == expected(tmp_path / "run")
    again = run(*arguments(teacher, folder, tmp_path / "other", "--log", "wandbs"))
    assert "expected mlflow or tensorboard or wandb;" in again.err, "the plug-in is gone"


@pytest.mark.parametrize("name", ["mlflow", "tensorboard", "wandb"])
def test_a_missing_package_is_named_before_training(
    run: Run, teacher: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr(base, "find_spec", lambda package: None if package == name else find_spec(package))
    result = run(*arguments(teacher, folder, tmp_path / "run", "--log", name))
    assert result.code == 2 and result.err.count("\n") == 1
    assert f"--log {name} needs the package {name}: pip install 'irgdistill[{name}]'" in result.err
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_of_two_processes_the_first_logs(teacher: Path, folder: Path, tmp_path: Path) -> None:
    options = ("--log", "tensorboard", "--gpus", 2, "--backend", "gloo", "--epochs", 1, *PICTURES)
    code, _, error = Command(tmp_path, *arguments(teacher, folder, tmp_path / "run", *options)).end()
    assert code == 0, error
    assert len(list((tmp_path / "run" / "tensorboard").iterdir())) == 1
    same(tensorboard(tmp_path / "run"), expected(tmp_path / "run"))


# --- MLflow -----------------------------------------------------------------------------------------------------------


class FakeClient:
    """An `MlflowClient` whose server is a dictionary: metrics by name and step, each sent once."""

    runs: ClassVar[dict[str, SimpleNamespace]] = {}

    def get_experiment_by_name(self, name: str) -> None:
        assert name == "irgdistill"

    def create_experiment(self, name: str) -> str:
        return "1"

    def create_run(self, experiment: str, run_name: str) -> Any:
        identity = f"{experiment}-{len(self.runs)}"
        self.runs[identity] = SimpleNamespace(
            name=run_name, params={}, metrics={}, images=[], texts={}, status=["RUNNING"]
        )
        return SimpleNamespace(info=SimpleNamespace(run_id=identity))

    def log_batch(self, identity: str, metrics: Sequence[Any] = (), params: Sequence[Any] = ()) -> None:
        assert len(params) <= 100
        self.runs[identity].params |= dict(params)
        for name, value, _, step in metrics:
            assert (name, step) not in self.runs[identity].metrics, f"{name} doubled at {step}"
            self.runs[identity].metrics[name, step] = value

    def log_text(self, identity: str, text: str, name: str) -> None:
        self.runs[identity].texts[name] = text

    def log_image(self, identity: str, image: Any, key: str, step: int) -> None:
        self.runs[identity].images.append((key, step))

    def update_run(self, identity: str, status: str) -> None:
        self.runs[identity].status.append(status)

    def set_terminated(self, identity: str) -> None:
        self.runs[identity].status.append("FINISHED")


@pytest.fixture
def mlflow(monkeypatch: pytest.MonkeyPatch) -> dict[str, SimpleNamespace]:
    """Runs of a stand-in for the package, which brings fifty others."""
    entities = SimpleNamespace(
        Metric=namedtuple("Metric", "key value timestamp step"), Param=namedtuple("Param", "key value")
    )
    monkeypatch.setitem(sys.modules, "mlflow", SimpleNamespace(MlflowClient=FakeClient, entities=entities))
    monkeypatch.setitem(sys.modules, "mlflow.entities", entities)
    monkeypatch.setattr(base, "find_spec", lambda package: package == "mlflow" or find_spec(package))
    monkeypatch.setattr(FakeClient, "runs", {})
    return FakeClient.runs


@pytest.mark.usefixtures("blank")
@pytest.mark.parametrize(("where", "every"), [("step", 2), ("evaluation", 3)])
def test_mlflow_holds_what_metrics_jsonl_holds_of_a_run_that_died(
    run: Run,
    teacher: Path,
    folder: Path,
    tmp_path: Path,
    mlflow: dict[str, SimpleNamespace],
    where: str,
    every: int,
) -> None:
    output = tmp_path / "run"
    with pytest.MonkeyPatch.context() as patch:
        die(patch, where)
        with pytest.raises(Killed):
            run(*arguments(teacher, folder, output, "--log", "mlflow", "--save-every-steps", every, *PICTURES))
    resumed = run("distill", "--resume", output)
    assert resumed.code == 0 and "warning" not in resumed.err, resumed.err
    ((identity, logged),) = mlflow.items()
    assert json.loads((output / "mlflow.json").read_text())["id"] == identity and logged.name == "run"
    same(logged.metrics, expected(output))
    assert len(set(logged.images)) == len(logged.images) and ("graphs/stage-4", 6) in logged.images
    assert logged.params["optim.lr"] == "0.1" and "student:" in logged.texts["config.yaml"]
    assert logged.status == ["RUNNING", "FINISHED", "RUNNING", "FINISHED"]


def test_overwriting_a_run_begins_another_in_mlflow(
    run: Run, teacher: Path, folder: Path, tmp_path: Path, mlflow: dict[str, SimpleNamespace]
) -> None:
    for _ in range(2):
        options = ("--log", "mlflow", "--epochs", 1, "--overwrite")
        assert run(*arguments(teacher, folder, tmp_path / "run", *options)).code == 0
    assert len(mlflow) == 2
    same(mlflow["1-1"].metrics, expected(tmp_path / "run"))
