"""What the command line says beside its results: help and its examples, mistakes, completion, --quiet and --json."""

from __future__ import annotations

import io
import json
import os
import re
import select
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import typer
from rich.console import Console
from support import Run
from support.processes import Command

from irgdistill.cli.app import app, commands
from irgdistill.cli.completion import complete_network
from irgdistill.config import options
from irgdistill.io.console import Report, quiet_console, table

COMMANDS: dict[str, Any] = commands()
PANELS = {"Networks", "Data", "Matching", "Method", "Training", "Run", "Result"}
ALONE = ("--preset", "quickstart", "--method", "none", "--student", "cifar_resnet14_x0_5", "--epochs", 1)


def examples(command: str) -> list[str]:
    """Of its help, in their order."""
    return [line for line in COMMANDS[command].epilog.split("\n\n") if line.startswith("irgdistill ")]


@pytest.mark.parametrize("command", COMMANDS)
def test_every_option_is_in_a_panel_and_every_example_is_understood(command: str) -> None:
    for parameter in COMMANDS[command].params:
        if parameter.name != "help" and parameter.param_type_name == "option":
            assert parameter.rich_help_panel in PANELS and parameter.help, parameter.name
    assert examples(command)
    for line in examples(command):
        name, *arguments = shlex.split(line.partition(" > ")[0])[1:]
        COMMANDS[name].make_context(name, arguments, parent=typer.main.get_command(app).make_context("irgdistill", []))


def test_help_of_every_command_starts_without_torch() -> None:
    code = "\n".join(
        [
            "import sys",
            "from irgdistill.cli.app import commands, main",
            "for name in commands():",
            "    sys.argv[1:] = [name, '--help']",
            "    try: main()",
            "    except SystemExit as end: assert not end.code",
            "sys.argv[1:] = ['presets']",
            "try: main()",
            "except SystemExit as end: assert not end.code",
            "assert not {'torch', 'timm', 'torchvision'} & set(sys.modules)",
        ]
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("Usage: irgdistill") == len(COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_help_cuts_no_word_on_a_narrow_terminal(run: Run, monkeypatch: pytest.MonkeyPatch, command: str) -> None:
    monkeypatch.setenv("COLUMNS", "64")
    shown = run(command, "--help-all")
    assert shown.code == 0 and max(map(len, shown.out.splitlines())) <= 64
    options = [name for p in COMMANDS[command].params if p.param_type_name == "option" for name in p.opts]
    assert all(name in shown.out for name in options) and " more options" not in shown.out
    assert not re.findall(r"\w…|<\w", shown.out), "no word is cut, and no type stands for what a value is"


def listed(shown: str) -> list[str]:
    """Options in the panels of a help."""
    return re.findall(r"^│ +(--[a-z-]+)", shown, re.MULTILINE)


@pytest.mark.parametrize("command", ["distill", "train", "compare", "cache-teacher", "doctor", "inspect-graph"])
def test_short_help_leaves_rare_options_to_help_all(run: Run, monkeypatch: pytest.MonkeyPatch, command: str) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    short, whole = run(command, "--help").out, run(command, "--help-all").out
    assert set(listed(short)) < set(listed(whole))
    number = len(listed(whole)) - len(listed(short))
    assert short.strip().splitlines()[-1].strip() == f"{number} more options: irgdistill {command} --help-all"
    marked = {item.flag.name for item in options().values() if item.flag is not None and item.flag.common}
    if command == "distill":
        assert {*marked, "--output", "--resume", "--set", "--gpus"} < set(listed(short)) and len(listed(short)) < 30
        assert "--backend" not in short and "--backend" in whole, "an option that is no setting may be rare too"


def test_help_of_commands_with_the_options_of_distill_leaves_out_those_they_refuse(run: Run) -> None:
    shown = listed(run("compare", "--help-all").out)
    assert {"--methods", "--teacher", "--label-smoothing"} < set(shown)
    assert not {"--method", "--resume", "--overwrite", "--gpus"} & set(shown) and shown.count("--output") == 1


@pytest.mark.parametrize("command", COMMANDS)
def test_help_says_what_each_value_is(command: str) -> None:
    for parameter in COMMANDS[command].params:
        if parameter.param_type_name == "argument":
            assert parameter.metavar and parameter.metavar.isupper(), parameter.name
        elif parameter.is_flag:
            assert parameter.metavar == "", parameter.name
        else:
            assert re.fullmatch(r"[A-Z-]+|[A-Z|/=,]+|[a-zA-Z|]+", parameter.metavar), parameter.name


def test_commands_are_listed_in_the_order_of_work(run: Run) -> None:
    shown = run("--help").out
    work = "train distill compare eval inspect-graph cache-teacher export embed predict models presets doctor"
    assert re.findall(r"^│ ([a-z-]+) ", shown, re.MULTILINE) == work.split() == [*COMMANDS]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("distil",), "no command 'distil'; did you mean distill? (known: train, distill, compare,"),
        (("cach",), "no command 'cach'; did you mean cache-teacher? (known: "),
        (("distill", "--help-al"), "no option --help-al; did you mean --help-all"),
        (("distill", "--studnt", "x"), "no option --studnt; did you mean --student"),
        (("compare", "--sedes", "3"), "no option --sedes; did you mean --seed"),
        (("--vrsion",), "no option --vrsion; did you mean --version?"),
        (("distill", "--epochs", "many"), "--epochs many: "),
        (("distill", "--epochs=1.5"), "--epochs 1.5: "),
        (("distill", "--epochs"), "'--epochs' requires an argument"),
        (("distill", "resnet18"), "unexpected extra argument"),
        (("eval",), "missing argument 'NETWORK'; for example: irgdistill eval runs/student\n"),
        (("predict", "x"), "missing argument 'IMAGE'; for example: irgdistill predict runs/student ./photos"),
        (("embed", "x"), "missing option '--output'; for example: irgdistill embed runs/student"),
        (("distill", "--method", "none"), "missing --student and --data; for example: --teacher"),
        (("train",), "missing --model and --data; for example: --model resnet50 --data ./flowers\n"),
        (("cache-teacher",), "missing --teacher and --data; for example: --teacher resnet50 --data ./imagenet\n"),
    ],
)
def test_mistakes_are_one_line(run: Run, arguments: tuple[str, ...], message: str) -> None:
    result = run(*arguments)
    assert result.code == 2 and not result.out
    assert result.err.startswith("irgdistill: ") and message in result.err and result.err.count("\n") == 1


def test_without_a_command_there_is_help(run: Run) -> None:
    shown = run()
    assert shown.code == 2 and "Usage: irgdistill" in shown.out and "presets" in shown.out


def test_quiet_and_json_leave_results_and_warnings(run: Run, tmp_path: Path) -> None:
    shown = run("distill", *ALONE, "--output", tmp_path / "a", "--quiet", "--json")
    assert shown.code == 0 and re.fullmatch(r"best top-1 .*best\.safetensors\n", shown.err)
    (line,) = shown.out.splitlines()
    summary = json.loads(line)
    assert summary.pop("folder") == str(tmp_path / "a")
    assert summary == json.loads((tmp_path / "a" / "summary.json").read_text())

    options = ("--methods", "none", "--seeds", 1, *ALONE[:2], *ALONE[4:], "--output", tmp_path / "b")
    compared = run("compare", *options, "--quiet", "--json")
    assert compared.code == 0 and re.fullmatch(r"best top-1 .*\n", compared.err)
    assert json.loads(compared.out) == json.loads((tmp_path / "b" / "compare.json").read_text())
    again = run("compare", *options, "--quiet")
    assert again.code == 0 and not again.err and "none" in again.out

    dry = run("distill", *ALONE, "--dry-run", "--json")
    assert json.loads(dry.out)["config"]["schedule"]["epochs"] == 1 and json.loads(dry.out)["plan"] is None
    failed = run("distill", *ALONE, "--lr", -1, "--quiet", "--json")
    assert failed.code == 2 and "--lr -1.0: expected" in failed.err and not failed.out


def test_quiet_console_is_over_afterwards(capsys: pytest.CaptureFixture[str]) -> None:
    with quiet_console():
        report = Report()
        report.line("a line")
        report.warn("a warning")
        report.result("a result")
        table("a table", ["column"], [["cell"]], stdout=False)
        table("results", ["column"], [["cell"]])
        with quiet_console(False):
            report.line("another line")
    report.line("a last line")
    shown = capsys.readouterr()
    assert shown.err.splitlines() == ["warning: a warning", "a result", "another line", "a last line"]
    assert "results" in shown.out


def on_terminal(*arguments: object, **environment: str) -> str:
    """What a command writes to a terminal of 60 columns."""
    pty = pytest.importorskip("pty")
    import fcntl
    import struct
    import termios

    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 60, 0, 0))
    clean = {key: value for key, value in os.environ.items() if key not in ("NO_COLOR", "COLUMNS", "LINES")}
    surroundings = {**clean, "TERM": "xterm-256color", **environment}
    process = Command(Path(), *arguments, terminal=os.ttyname(theirs), environment=surroundings)
    shown, ended = b"", False
    while not ended:
        ended = process.poll() is not None
        while select.select([ours], [], [], 0.05)[0]:
            shown += os.read(ours, 4096)
    os.close(ours)
    os.close(theirs)
    assert process.poll() == 0, shown.decode()
    return shown.decode()


COLOUR = re.compile(r"\x1b\[[0-9;]*3[0-9][0-9;]*m")


@pytest.mark.slow
def test_colour_on_a_terminal_only_and_not_with_no_color(tmp_path: Path) -> None:
    train = ("distill", *ALONE, "--workers", 0, "--set", "data.train_images=64", "--output", tmp_path, "--overwrite")
    assert COLOUR.search(on_terminal(*train)), "otherwise nothing is shown by the rest"
    assert not COLOUR.search(on_terminal(*train, NO_COLOR="1"))
    for arguments in (("eval", "--help"), ("presets",)):
        words = [sys.executable, "-m", "irgdistill", *map(str, arguments)]
        piped = subprocess.run(words, capture_output=True, text=True, check=True)
        assert "\x1b" not in piped.stdout + piped.stderr


def test_progress_keeps_a_value_with_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    report = Report()
    report.console = Console(width=40, force_terminal=True, file=open(os.devnull, "w"))  # noqa: SIM115
    with report.progress(10, 0):
        report.advance(5, "epoch 1/2  top-1 50.00 (best 60.00)", {"loss": 1.0, "transform": 0.123, "edges": 2.0}, 100)
        assert report._bar is not None
        assert report._bar.below.splitlines() == [
            "top-1 50.00 (best 60.00)  loss 1",
            "transform 0.123  edges 2  100 img/s",
        ]


def test_a_line_of_a_log_shows_no_accuracy_of_the_epoch_before(monkeypatch: pytest.MonkeyPatch) -> None:
    report, written = Report(), io.StringIO()
    report.console, report._last_line = Console(width=90, file=written), float("-inf")
    report.advance(5, "epoch 2/3  top-1 50.00 (best 60.00)", {"loss": 1.0}, 100)
    assert written.getvalue() == "epoch 2/3  loss 1  100 img/s\n"


def complete(line: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> list[str]:
    """What bash is offered at the end of `line`."""
    from irgdistill.cli.app import main

    monkeypatch.setenv("_IRGDISTILL_COMPLETE", "complete_bash")
    monkeypatch.setenv("COMP_WORDS", line)
    monkeypatch.setenv("COMP_CWORD", str(len(line.split()) - (not line.endswith(" "))))
    monkeypatch.setattr(sys, "argv", ["irgdistill"])
    with pytest.raises(SystemExit):
        main()
    return capsys.readouterr().out.split()


def test_completion(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("IRGDISTILL_CACHE", str(tmp_path / "cache"))

    def offered(line: str) -> list[str]:
        return complete(line, monkeypatch, capsys)

    assert offered("irgdistill distill --student cifar_shuf") == [], "timm was never there"
    with monkeypatch.context() as patch:
        patch.delenv("_IRGDISTILL_COMPLETE")
        assert run("models", "cifar_shufflenet_x0_5").code == 0
    for line in ("distill --student", "distill --teacher", "inspect-graph --teacher", "doctor --studen"):
        expected = ["cifar_shufflenet_x0_5"] if not line.startswith("doctor") else []
        assert offered(f"irgdistill {line} cifar_shuf") == expected
    assert offered("irgdistill distill --preset imagenet-m") == ["imagenet-modern"]
    assert offered("irgdistill distill --method irg") == ["irg", "irg+kd", "irg+kd+at"]
    assert offered("irgdistill compare --methods none,m") == ["none,mtk"]
    assert offered("irgdistill distill --data h") == ["hfds/", "hfids/"]
    assert offered("irgdistill distill --log w") == ["wandb"]
    assert offered("irgdistill presets qu") == ["quickstart"]
    assert offered("irgdistill do") == ["doctor"]
    assert offered("irgdistill distill --student-ch") == ["--student-checkpoint"]


def test_names_are_not_remembered_where_nothing_can_be_written(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("IRGDISTILL_CACHE", str(tmp_path / "file"))
    assert run("models", "cifar_resnet20").code == 0
    assert complete_network("cifar") == []


def test_completion_is_installed_for_the_shell(tmp_path: Path) -> None:
    pytest.importorskip("shellingham")
    program = f"{sys.executable} -m irgdistill"
    command = f"set -e; {program} --install-completion bash; {program} --show-completion bash; true"  # bash stays
    shown = subprocess.run(
        ["bash", "-c", command], capture_output=True, text=True, env={**os.environ, "HOME": str(tmp_path)}
    )
    assert shown.returncode == 0, shown.stderr
    assert "complete -o default -F _irgdistill_completion irgdistill" in shown.stdout
    assert "irgdistill" in (tmp_path / ".bashrc").read_text()
