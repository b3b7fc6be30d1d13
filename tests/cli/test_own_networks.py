"""Networks FILE.py:FUNCTION by the command line: trained, used, exported, resumed, cached, and what is refused."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from support import Run, command, interrupted, three_colours
from support.interruption import differences, outcome

from irgdistill.config import DataConfig, PluginConfig, data_of
from irgdistill.config.schema import refresh
from irgdistill.errors import UserError
from irgdistill.models import CheckpointMetadata
from irgdistill.plugins import snapshot

FILE = """
import torch
from torch import nn
from torchvision.models import resnet18


def make_teacher():
    torch.manual_seed(1)
    return resnet18(num_classes=3)


def stage(width_in, width):
    return nn.Sequential(nn.Conv2d(width_in, width, 3, 2, 1), nn.BatchNorm2d(width), nn.ReLU())


class Net(nn.Module):
    def __init__(self, num_classes=3, width=8):
        super().__init__()
        self.stages = nn.Sequential(stage(3, width), stage(width, 2 * width), stage(2 * width, 4 * width))
        self.head = nn.Linear(4 * width, num_classes)

    def forward(self, x):
        return self.head(self.stages(x).mean((2, 3)))


def make_student(num_classes=7):
    return Net(num_classes)


def broken():
    raise RuntimeError("no weights\\nhere")


def text():
    return "resnet18"


def needs(depth):
    return Net()


def seven():
    return Net(7)


def map_of_classes():
    return nn.Conv2d(3, 3, 1)
"""
SMALL = ("--input-size", 16, "--workers", 0, "--batch-size", 24, "--device", "cpu", "--set", "runtime.log_every=1")
TAUGHT = (*SMALL, "--teacher-input-size", 48, "--skip-teacher-check", "--lr", 0.01)


@pytest.fixture(autouse=True)
def _forgotten() -> Iterator[None]:
    """Every test begins like a new process: no file was imported."""
    restore = snapshot()
    yield
    restore()
    refresh()


def networks(folder: Path) -> tuple[object, ...]:
    file = folder / "my_nets.py"
    return ("--teacher", f"{file}:make_teacher", "--student", f"{file}:make_student")


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """data/, my_nets.py, and the run folder of a student of its own network that such a teacher taught."""
    home, restore = tmp_path_factory.mktemp("home"), snapshot()
    three_colours(home / "data")
    (home / "my_nets.py").write_text(FILE)
    words = ("distill", *networks(home), "--data", home / "data", *TAUGHT, "--epochs", 1, "--output", home / "run")
    assert command(*words) == 0
    restore()
    refresh()
    return home


def test_a_run_records_file_function_and_checksum(home: Path) -> None:
    metadata = CheckpointMetadata.read(home / "run/last.safetensors")
    assert metadata is not None and metadata.code is not None and metadata.teacher is not None
    assert (metadata.architecture, metadata.num_classes) == ("my_nets.make_student", 3)
    assert (metadata.code.path, metadata.file) == (Path("my_nets.py"), home / "my_nets.py")
    assert metadata.code.sha256 == metadata.plugins[0].sha256
    assert metadata.teacher.name == f"{home / 'my_nets.py'}:make_teacher"
    assert not (home / "run/config.json").exists(), "it is that of a timm network"


def test_other_commands_run_the_code_only_if_the_file_is_named(home: Path, run: Run, tmp_path: Path) -> None:
    for words in (("eval", home / "run"), ("predict", home / "run", home / "data"), ("export", home / "run")):
        refused = run(*words)
        advice = (
            f"my_nets.py:make_student is code, which runs only if you name its file: add --plugin {home}/my_nets.py"
        )
        assert (refused.code, refused.err) == (2, f"irgdistill: {advice}\n")
    summary, named = json.loads((home / "run/summary.json").read_text()), ("--plugin", home / "my_nets.py")
    shown = run("eval", home / "run", "--workers", 0, "--json", *named, "--against", f"{home}/my_nets.py:make_teacher")
    assert shown.code == 0, shown.err
    measured = json.loads(shown.out)
    assert measured["top1"] == pytest.approx(summary["top1"]) and measured["agreement"] >= 0
    assert measured["params"] == 6243 and measured["architecture"] == "my_nets.make_student"
    predicted = run("predict", home / "run", home / "data/val/red", *named)
    assert predicted.code == 0 and {line.split(",")[1] for line in predicted.out.splitlines()[1:]} <= {
        "red",
        "green",
        "blue",
    }
    embedded = run("embed", home / "run", "--data", home / "data", *named, "--output", tmp_path / "e.safetensors")
    assert embedded.code == 0 and "96 embeddings of 32 numbers" in embedded.err


def test_it_is_exported_as_a_graph_and_not_for_timm(home: Path, run: Run, tmp_path: Path) -> None:
    named = ("--plugin", home / "my_nets.py", "--check-images", 3)
    exported = run("export", home / "run", *named, "--format", "program", "--output", tmp_path / "net.pt2")
    assert exported.code == 0 and "logits within" in exported.err, exported.err
    refused = run("export", home / "run", *named)
    assert refused.code == 2 and refused.err.count("\n") == 1
    assert "my_nets.py:make_student is no network of timm, which --format hub needs: give --format onnx" in refused.err


@pytest.mark.usefixtures("no_figures")
def test_its_graphs_are_inspected(home: Path, run: Run, tmp_path: Path) -> None:
    words = ("inspect-graph", home / "run", "--images", 6, "--neighbours", 2, "--workers", 0)
    refused = run(*words)
    assert refused.code == 2 and refused.err.count("\n") == 1 and f"add --plugin {home / 'my_nets.py'}" in refused.err
    shown = run(*words, "--plugin", home / "my_nets.py", "--json", "--output", tmp_path / "graphs")
    assert shown.code == 0, shown.err
    assert [stage["name"] for stage in json.loads(shown.out)["stages"]] == ["/4", "stage 2", "logits"]


def test_a_stopped_run_ends_bit_for_bit_like_the_whole_one_and_refuses_a_changed_file(
    home: Path, run: Run, tmp_path: Path
) -> None:
    (file := tmp_path / "my_nets.py").write_text(FILE)
    words = ("distill", *networks(tmp_path), "--data", home / "data", *TAUGHT, "--epochs", 1)
    with interrupted(lambda trainer: trainer.progress.update == 2):
        assert run(*words, "--output", tmp_path / "run").code == 130
    file.write_text(FILE + "\n# edited\n")
    refused = run("distill", "--resume", tmp_path / "run")
    assert refused.code == 2 and refused.err.count("\n") == 1 and f"the plugin {file} has changed" in refused.err
    file.unlink()
    resumed = run("distill", "--resume", tmp_path / "run", "--plugin", home / "my_nets.py")
    assert resumed.code == 0, resumed.err
    assert f"next: irgdistill eval {tmp_path / 'run'} --plugin {home / 'my_nets.py'}\n" in resumed.err
    assert f"irgdistill export {tmp_path / 'run'} --plugin {home / 'my_nets.py'} --format onnx\n" in resumed.err
    found = differences(outcome(home / "run"), outcome(tmp_path / "run"))
    assert [
        name for name in found if not any(word in name for word in ("plugins", "teacher.name", "state config"))
    ] == []


@pytest.mark.slow
def test_two_processes_build_it_too(home: Path, run: Run, tmp_path: Path) -> None:
    words = ("distill", *networks(home), "--data", home / "data", *TAUGHT, "--epochs", 1, "--method", "kd")
    many = run(*words, "--gpus", 2, "--backend", "gloo", "--output", tmp_path / "run")
    assert many.code == 0, many.err
    assert (tmp_path / "run/last.safetensors").exists()


def test_a_cache_of_such_a_teacher_needs_the_file_to_match(home: Path, run: Run, tmp_path: Path) -> None:
    data = ("--data", home / "data", *SMALL, "--student", "cifar_resnet14_x0_5")
    words = (*networks(home)[:2], "--teacher-input-size", 48, "--output", tmp_path / "cache")
    cached = run("cache-teacher", *data, *words)
    assert cached.code == 0, cached.err
    words = ("distill", *data, "--teacher-cache", tmp_path / "cache", "--epochs", 1, "--output", tmp_path / "run")
    named = run(*words, *networks(home)[:2])
    assert named.code == 0, named.err


def test_a_cache_alone_does_not_run_the_code(home: Path, run: Run, tmp_path: Path) -> None:
    data = ("--data", home / "data", *SMALL, "--method", "kd")
    words = (*networks(home)[:2], "--teacher-input-size", 48, "--output", tmp_path / "cache")
    restore = snapshot()
    assert run("cache-teacher", *data, *words).code == 0
    restore()
    words = ("--student", "cifar_resnet14_x0_5", "--teacher-cache", tmp_path / "cache", "--epochs", 1)
    refused = run("distill", *data, *words, "--output", tmp_path / "run")
    assert refused.code == 2 and "add --plugin my_nets.py" in refused.err and refused.err.count("\n") == 1


def test_it_is_trained_alone_and_then_teaches(home: Path, run: Run, tmp_path: Path) -> None:
    """Its checkpoint knows size and classes, and starts another student of the same function too."""
    file, data = home / "my_nets.py", ("--data", home / "data", *SMALL, "--epochs", 1)
    alone = run(
        "train", "--model", f"{file}:make_student", *data, "--output", tmp_path / "alone", "--set", "student.args={}"
    )
    assert alone.code == 0 and "my_nets.py:make_student starts as its function returns it" in alone.err, alone.err
    words = ("--teacher-checkpoint", tmp_path / "alone", "--student-checkpoint", tmp_path / "alone", "--method", "kd")
    taught = run("distill", *words, "--plugin", file, *data, "--skip-teacher-check", "--output", tmp_path / "taught")
    assert taught.code == 0 and f"starts from {tmp_path / 'alone'}" in taught.err, taught.err


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("my_nest.py:make_student", "no file {home}/my_nest.py; did you mean my_nets.py"),
        (
            "my_nets.py:make_studnt",
            "the file defines no function 'make_studnt'; did you mean make_student, make_teacher",
        ),
        ("my_nets.py:resnet18", "the file defines no function 'resnet18'"),
        ("my_nets.py:", "expected {home}/my_nets.py:FUNCTION, with the name of a function in that file"),
        ("my_nets.py", "expected {home}/my_nets.py:FUNCTION, with a function of that file that returns the network"),
        ("my_nets.py:broken", "my_nets.py:broken raises RuntimeError: no weights here"),
        ("my_nets.py:text", "my_nets.py:text returns str, not a torch.nn.Module"),
        ("my_nets.py:needs", "cannot be called with no arguments: missing a required argument: 'depth'"),
        ("my_nets.py:seven", "returns 7 logits, and the data have 3 classes: let the function take num_classes"),
        ("my_nets.py:map_of_classes", "returns (1, 3, 16, 16) for one of images (3, 16, 16): expected logits (1, K)"),
        ("damaged.py:net", "{home}/damaged.py: SyntaxError: "),
    ],
)
def test_what_is_no_network_is_one_line(home: Path, run: Run, name: str, message: str) -> None:
    (home / "damaged.py").write_text("def (")
    words = ("--student", home / name, "--method", "none", "--data", home / "data", "--dry-run")
    refused = run("distill", *words, *SMALL)
    assert refused.code == 2 and refused.err.count("\n") == 1, refused.err
    assert message.format(home=home) in refused.err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--student-pretrained",), "make_student decides its weights itself: leave out --student-pretrained"),
        (("--set", "student.args.depth=3"), "got an unexpected keyword argument 'depth'"),
        (("--method", "rocket"), "rocket trains the teacher's architecture from random weights"),
    ],
)
def test_options_that_do_not_apply_are_one_line(
    home: Path, run: Run, options: tuple[object, ...], message: str
) -> None:
    refused = run("distill", *networks(home), "--data", home / "data", "--dry-run", *TAUGHT, *options)
    assert refused.code == 2 and refused.err.count("\n") == 1 and message in refused.err, refused.err


def test_data_that_have_moved_run_no_code(tmp_path: Path) -> None:
    """A data source of a plug-in is a name; a folder that is gone is none."""
    (code := tmp_path / "code.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    plugin = PluginConfig(path=code, sha256=hashlib.sha256(code.read_bytes()).hexdigest())
    with pytest.raises(UserError, match="is no longer at /gone/photos; give its place with --data"):
        data_of("run", {"source": "/gone/photos"}, DataConfig(), (), [plugin])
    assert not (tmp_path / "ran").exists()
