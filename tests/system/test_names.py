"""Hostile names of classes, files, runs and data sets: every command shows them whole, as one line, without effect."""

from __future__ import annotations

import json
import os
import re
import sys
from pathlib import Path

import pytest
from matplotlib.figure import Figure
from support import SMALL, Result, Run, command, write_images

from irgdistill.io import read_metadata

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="other systems do not allow these names")
NOT_UTF8 = os.fsdecode(b"\xff")
CLASSES = ("[red]x", f"[bold]{NOT_UTF8}", "\x1b]0;title\x07", "new\nline", "$x^$\u202e", "a|<b>`")
NAME = f"[bold]$x^$ {NOT_UTF8}\n\x1b[2J"
DATA = f"[/]x/{NAME}"
SHOWN = r"[bold]$x^$ \xff\n\x1b[2J"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data set and the run folders `[bold]…` of a teacher and `[/]x…` of its student, all with such names."""
    root = tmp_path_factory.mktemp("made")
    write_images(root / DATA / "train", dict.fromkeys(CLASSES, 4))
    write_images(root / DATA / "val", dict.fromkeys(CLASSES, 2), seed=1)
    options = ("--student", "cifar_resnet14_x0_5", "--data", root / DATA, "--epochs", 1, *SMALL)
    assert command("distill", *options, "--method", "none", "--output", root / DATA / "run") == 0
    teacher = ("--teacher-checkpoint", root / DATA / "run", "--skip-teacher-check", "--levels", 1)
    assert command("distill", *options, *teacher, "--output", root / f"[/]x{NOT_UTF8}") == 0
    return root


@pytest.fixture
def student(made: Path) -> Path:
    return made / f"[/]x{NOT_UTF8}"


def _safe(result: Result) -> Result:
    """The command did its work, and nothing in its words reaches the terminal but as text."""
    assert result.code == 0, result.err
    words = result.out + result.err
    assert words.encode() and not re.search("[\x00-\x09\x0b-\x1f\x7f-\x9f\u202e]", words)
    assert "Traceback" not in words
    return result


def test_training_and_dry_run(run: Run, made: Path, student: Path, tmp_path: Path) -> None:
    options = ("--student", "cifar_resnet14_x0_5", "--method", "none", "--data", made / DATA, *SMALL)
    planned = _safe(run("distill", *options, "--dry-run"))
    assert json.loads(_safe(run("distill", *options, "--dry-run", "--json")).out)["config"]["data"]["source"]
    (tmp_path / "again.yaml").write_text(planned.out)
    again = _safe(run("distill", "--preset", tmp_path / "again.yaml", "--dry-run"))
    assert again.out == planned.out and "[/]x" in planned.out
    assert read_metadata(student / "last.safetensors")["classes"] == sorted(CLASSES)  # type: ignore[index]
    _safe(run("doctor", *options))


def test_evaluation(run: Run, made: Path, student: Path) -> None:
    shown = _safe(run("eval", student, made / DATA / "run", "--workers", 0))
    assert r"[/]x\xff" in re.sub(r"\s", "", shown.out)
    result = json.loads(_safe(run("eval", student, "--workers", 0, "--json")).out)
    assert result["name"] == str(student) and result["data"] == str(made / DATA)


def test_inspection(run: Run, student: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = ("inspect-graph", student, "--images", 12, "--neighbours", 2, "--workers", 0, "--terminal")
    assert json.loads(_safe(run(*options, "--json", "--output", tmp_path)).out)
    facts = json.loads((tmp_path / "graph.json").read_text())
    assert facts["classes"] == sorted(CLASSES)  # exact
    page = (tmp_path / "report.html").read_text()
    assert "\\\\xff" in page and "\\udcff" not in page and "\\u001b" not in page
    for name in ("stage_figure", "transformation_figure", "overview_figure"):  # drawn above
        monkeypatch.setattr(f"irgdistill.commands.inspect.results.{name}", lambda *_: Figure(figsize=(1, 1)))
    shown = _safe(run(*options, "--output", tmp_path))
    assert SHOWN.replace(" ", "") in re.sub(r"\s", "", shown.out) and r"[/]x\xff" in shown.err


def test_export(run: Run, made: Path, student: Path, tmp_path: Path) -> None:
    _safe(run("export", student, "--output", tmp_path / "hub", "--check-images", 4))
    card = (tmp_path / "hub" / "README.md").read_text()
    assert f"classes of `{SHOWN}`" in card and NOT_UTF8 not in card and "\x1b" not in card
    assert sorted(CLASSES) == json.loads((tmp_path / "hub" / "config.json").read_text())["label_names"]


def test_comparison_and_cache(run: Run, made: Path, student: Path) -> None:
    options = ("--student", "cifar_resnet14_x0_5", "--data", made / DATA, *SMALL, "--epochs", 1, "--seeds", 1)
    teacher = ("--teacher-checkpoint", made / DATA / "run", "--skip-teacher-check")
    output = made / f"[i]{NAME}"
    shown = _safe(run("compare", "--methods", "none", *options, *teacher, "--output", output))
    assert SHOWN in shown.out
    text = (output / "compare.md").read_text()
    assert text.startswith(r"cifar\_resnet14\_x0\_5 on \[bold\]\$x^\$ \\xff\\n\\x1b\[2J, 1 epoch")
    assert json.loads((output / "compare.json").read_text())["data"] == str(made / DATA)
    data = ("--data", made / DATA, "--input-size", 16, "--workers", 0)
    _safe(run("cache-teacher", *data, *teacher[:2], "--output", made / DATA / "[cache]"))


@pytest.mark.parametrize("name", ["[/]x", f"a{NOT_UTF8}", "a\nb", "\x1b]0;title\x07", "\u202egpj"])
@pytest.mark.parametrize("words", [("eval",), ("export",), ("presets",), ("models",), ("distill", "--preset")])
def test_refusals_are_one_line(run: Run, words: tuple[str, ...], name: str) -> None:
    result = run(*words, name)
    assert result.code == 2 and result.err.count("\n") == 1 and result.err.rstrip("\n").isprintable(), result.err
    assert "[/]x" in result.err or name != "[/]x"
