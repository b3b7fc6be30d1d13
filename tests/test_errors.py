"""Errors that end a command, and their messages."""

from __future__ import annotations

from pathlib import Path

import pytest

from irgdistill.data import UnreadableImages
from irgdistill.errors import DataError, TrainingError, UserError, nearest, nearest_path, one_line, os_reason
from irgdistill.io.tensors import read_tensors


@pytest.mark.parametrize("kind", [DataError, TrainingError])
def test_every_kind_ends_a_command_as_bad_input_does(kind: type[UserError]) -> None:
    assert issubclass(kind, UserError) and issubclass(kind, ValueError)


def test_what_cannot_be_read_is_a_data_error(tmp_path: Path) -> None:
    (tmp_path / "a.safetensors").write_bytes(b"no tensors")
    with pytest.raises(DataError, match="is truncated or not a safetensors file"):
        read_tensors(tmp_path / "a.safetensors")
    unreadable = UnreadableImages(0)
    unreadable.queue.put(("", "a.png", "cut off"))
    with pytest.raises(DataError, match="1 unreadable images, 0 allowed"):
        unreadable.collect()


def test_a_foreign_message_becomes_one_line() -> None:
    assert one_line(ValueError("two\n  lines")) == "two lines"
    assert one_line(ValueError("word " * 100), 20) == "word word word word…"
    assert one_line(KeyboardInterrupt()) == "KeyboardInterrupt", "an error without a message is named"


def test_the_reason_of_a_system_call(tmp_path: Path) -> None:
    with pytest.raises(OSError) as caught:
        (tmp_path / "missing").read_text()
    assert os_reason(caught.value) == f"No such file or directory: {tmp_path / 'missing'}"
    assert os_reason(OSError("no number")) == "no number"


def test_nearest_names() -> None:
    assert nearest("resnt18", ["resnet18", "vit"]) == "; did you mean resnet18?"
    assert nearest("xyz", ["resnet18"]) == ""
    assert nearest("cach", ["compare", "cache-teacher"]) == "; did you mean cache-teacher?"


def test_the_nearest_path_is_beside_the_first_part_that_is_missing(tmp_path: Path) -> None:
    (tmp_path / "tutorial" / "teacher").mkdir(parents=True)
    assert nearest_path(f"{tmp_path}/tutoriall/teacher") == "; did you mean tutorial?"
    assert nearest_path(f"{tmp_path}/tutorial/teach") == "; did you mean teacher?"
    assert nearest_path(f"{tmp_path}/tutorial/teacher/xyz") == ""
