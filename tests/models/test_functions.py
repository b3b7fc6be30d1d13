"""Networks that a function makes: found by content, path or name, never imported by what a file records."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from irgdistill.config import architecture_of, load_config, public_name, split_function
from irgdistill.config.loading import import_function
from irgdistill.errors import UserError
from irgdistill.models import CheckpointMetadata, NetworkRecord, build_network, build_student, rebuild_network
from irgdistill.plugins import snapshot

FILE = """
from os import system
from torch import nn

def net(num_classes=4, width=8, command=""):
    body = nn.Sequential(nn.Conv2d(3, width, 3, 2, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    return nn.Sequential(body, nn.Linear(width, num_classes)) if num_classes else body

def body():
    return net(0)
"""


@pytest.fixture(autouse=True)
def _forgotten() -> Iterator[None]:
    restore = snapshot()
    yield
    restore()


@pytest.fixture
def file(tmp_path: Path) -> Path:
    (path := tmp_path / "nets.py").write_text(FILE)
    return path


def test_names() -> None:
    assert split_function("a/b.py:net") == (Path("a/b.py"), "net")
    assert split_function("resnet18.a1_in1k") is split_function("hf-hub:timm/x.py") is split_function(None) is None
    assert architecture_of("resnet18.a1_in1k") == "resnet18" and architecture_of("a/b.c.py:net") == "b.c.net"
    assert public_name("/a/b.py:net") == "b.py:net" and public_name("local-dir:/a/b") == "local-dir:b"


def test_a_function_has_the_classes_size_and_arguments_that_are_asked_for(file: Path) -> None:
    name, _ = import_function(str(file) + ":net")
    network = build_network(name, num_classes=7, input_size=(32, 24), args={"width": 16})
    assert (network.name, network.architecture, network.num_classes) == ("nets.py:net", "nets.net", 7)
    assert network.input.shape == (3, 32, 24) and network.embedding_width() == 16
    default = build_network(name)
    assert default.num_classes == 4 and default.input.shape == (3, 224, 224)
    assert default.input.mean == (0.485, 0.456, 0.406) and not default.from_timm


def test_a_record_rebuilds_it_once_the_file_is_named(file: Path, tmp_path: Path) -> None:
    forget = snapshot()
    name, _ = import_function(str(file) + ":net")
    values = build_network(name, num_classes=5, args={"width": 3}).describe()
    record = NetworkRecord.model_validate(values)
    assert rebuild_network(record).describe() == values
    forget()
    with pytest.raises(UserError, match=r"nets.py:net is code, .* add --plugin nets"):
        rebuild_network(record)
    moved = tmp_path / "elsewhere.py"
    moved.write_text(FILE)
    load_config(flags={"plugins": [moved]})
    assert rebuild_network(record).describe() == values, "the content is the same"
    with pytest.raises(UserError, match="is code"):
        build_network(name)


def test_another_content_under_the_same_name_warns(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    forget = snapshot()
    name, _ = import_function(str(file) + ":net")
    record = NetworkRecord.model_validate(build_network(name).describe())
    forget()
    file.write_text(FILE + "\n# edited\n")
    import_function(str(file) + ":net")
    assert rebuild_network(record).num_classes == 4
    assert "nets.py is not the file that made this network (sha256 " in capsys.readouterr().err


def test_a_record_calls_nothing_that_the_file_only_imports(file: Path, tmp_path: Path) -> None:
    name, _ = import_function(str(file) + ":net")
    values = build_network(name).describe()
    args = {"command": f"touch {tmp_path / 'called'}"}
    record = NetworkRecord.model_validate({**values, "architecture": "nets.system", "args": args})
    with pytest.raises(UserError, match="the file defines no function 'system'"):
        rebuild_network(record)
    assert not os.path.exists(tmp_path / "called")


@pytest.mark.parametrize("architecture", ["resnet18", "other.net", "nets.", "../nets.net", "nets.net/x", "nets.a b"])
def test_a_record_names_a_function_of_its_file(architecture: str, file: Path) -> None:
    name, _ = import_function(str(file) + ":net")
    values = {**build_network(name).describe(), "architecture": architecture}
    with pytest.raises(UserError, match=r"expected nets.FUNCTION, got"):
        NetworkRecord.parse(values, file)
    known = {**values, "architecture": "nets.net", "format": 1, "classes": list("abcd")}
    assert CheckpointMetadata.parse(known, file).name == "nets.py:net"


def test_what_a_preset_names_is_not_imported(file: Path, tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(f"student:\n  name: {file}:net\n")
    config = load_config(str(tmp_path / "recipe.yaml"))
    assert config.plugins == () and config.student.name == f"{file}:net"
    with pytest.raises(UserError, match=f"add --plugin {file}"):
        build_student(config.student, list("abcd"))
    typed = load_config(settings=[f"student.name={file}:net"])
    assert [plugin.path for plugin in typed.plugins] == [file]


@pytest.mark.parametrize("function", ["net", "body"])
def test_a_student_without_classes_returns_its_embedding(file: Path, function: str) -> None:
    spec = load_config(flags={"student.name": f"{file}:{function}", "student.input_size": 16}).student
    student, _ = build_student(spec, [])
    assert (student.num_classes, student.embedding_width()) == (0, 8)
    assert student.model(torch.zeros(2, 3, 16, 16)).shape == (2, 8)
