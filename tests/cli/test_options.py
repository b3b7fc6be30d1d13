"""Options of the command line: each comes from the schema, and Python takes the same ones."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import typer
from support import Run

from irgdistill import distill
from irgdistill.cli.app import PADDING, USAGE_ERROR, app, commands, usage
from irgdistill.cli.options import is_unknown_option, with_settings
from irgdistill.config import changeable_on_resume, keys, options, settings, values_of
from irgdistill.errors import UserError

COMMANDS: dict[str, Any] = commands()
OF_THE_COMMAND = {
    *("gpus", "backend", "preset", "settings", "output", "overwrite", "resume", "previous_state", "dry_run"),
    *("quiet", "as_json"),
}
"""Options of `distill` that are not settings: what to do with the run, not what it is."""


def test_options_of_distill_are_the_flags_of_the_schema() -> None:
    shown = {parameter.name: parameter for parameter in COMMANDS["distill"].params if parameter.name != "help"}
    assert shown.keys() - OF_THE_COMMAND == options().keys(), "an option without a key, or a flag without an option"
    for name, setting in options().items():
        assert setting.flag is not None and shown[name].opts == [setting.flag.name]
    assert len({setting.key for setting in options().values()}) == len(options()) > 45


def test_python_takes_the_options_of_the_command_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Every option of the command reaches its setting by the same name."""
    given: list[Any] = []
    (tmp_path / "plugin.py").write_text("")
    monkeypatch.setattr("irgdistill.api.start", lambda request: given.append(request.config) or {})
    for name, setting in options().items():
        assert setting.flag is not None
        value: Any = {bool: True, int: 2, float: 0.5}.get(setting.field.annotation, "cifar_resnet20")
        value = {
            "teacher_input_size": 64,
            "input_size": "64x32",
            "data": "digits",
            "val_fraction": 0.5,
            "skip_level": [4],
            "levels": 2,
            **{f"{role}_{name}": 0.5 for role in ("teacher", "student") for name in ("mean", "std", "crop_pct")},
            **{f"{role}_interpolation": "box" for role in ("teacher", "student")},
            "method": "none",
            "amp": "none",
            "graph_scope": "local",
            "log": ["wandb"],
            "plugin": [tmp_path / "plugin.py"],
            **{name: 0.5 for name in ("ema", "lr", "warmup_epochs", "weight_decay")},
            "patience": 2,
            "clip_grad": 0.5,
            "data_root": "there",
            "kd_weight": 0.25,
            "logits_weight": 0.25,
            "edges_weight": 0.25,
            "transform_weight": 0.25,
            "label_smoothing": 0.5,
        }.get(name, value)
        rest = {"student": "cifar_resnet20", "data": "digits", "method": "kd", "teacher": "cifar_resnet20"}
        if name in ("student_checkpoint", "teacher_checkpoint", "teacher_cache"):
            value = __file__
        distill(**{**rest, name: value})
        found: Any = given[-1]
        for part in setting.key.split("."):
            found = getattr(found, part)
        assert found != setting.default or name in ("method", "workers"), name


@pytest.mark.parametrize(("option", "key"), [("no_labels", "data.labels"), ("skip_teacher_check", "teacher.check")])
def test_negative_options_work_in_python_too(option: str, key: str) -> None:
    assert values_of({option: True}) == {key: False}
    assert values_of({option: None, "epochs": 3, "skip_level": []}) == {"schedule.epochs": 3}


def test_two_starting_points_are_refused_in_python_too() -> None:
    with pytest.raises(UserError, match="--student-pretrained and --student-checkpoint: a network starts from one"):
        distill(student="resnet18", data="digits", method="none", student_pretrained=True, student_checkpoint="a.pth")


def test_the_help_shows_the_default_of_the_schema(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    shown = run("distill", "--help").out
    for line in (
        "--lr                    RATE        Peak learning rate; default: by the optimizer.",
        "--epochs    EPOCHS",
        "(default: 100)",
        "(default: auto)",
    ):
        assert " ".join(line.split()) in " ".join(shown.split())
    defaults = {name: setting.default for name, setting in options().items()}
    for parameter in COMMANDS["distill"].params:
        default = defaults.get(parameter.name)
        if default is not None and not isinstance(default, bool) and default != ():
            shown = f"{default:g}" if isinstance(default, float) else str(default)
            assert f"(default: {shown})" in parameter.help, parameter.name


def test_a_command_may_take_a_setting_under_another_flag() -> None:
    from irgdistill.config import RUN, Flag

    got: list[dict[str, Any]] = []
    call = with_settings({"data.eval_batch_size": Flag("--batch-size", RUN, "Images per step."), "data.labels": None})(
        lambda given: got.append(given)
    ).made()
    call(batch_size=4, no_labels=None)
    call(batch_size=None, no_labels=True)
    assert got == [{"data.eval_batch_size": 4}, {"data.labels": False}]


def test_what_a_resumed_run_may_change() -> None:
    assert changeable_on_resume() == {
        *("data.source", "data.root", "data.workers", "data.image_cache_gib", "data.search_limit"),
        *("teacher.checkpoint", "teacher.cache"),
        *("runtime.device", "runtime.save_every_steps", "runtime.save_every_minutes"),
        *("runtime.loggers", "runtime.graph_images_every"),
    }
    assert changeable_on_resume() < set(keys()) and len(list(settings())) == len(keys())


def test_a_new_command_is_one_file() -> None:
    """Every file of the folder but these declares one command; nothing else lists them."""
    folder = Path(sys.modules["irgdistill.cli.app"].__file__ or "").parent
    files = {path.stem for path in folder.glob("*.py")} - {"__init__", "app", "options", "completion", "run"}
    assert len(files) == len(COMMANDS)
    text = (folder / "app.py").read_text()
    assert not [name for name in files if f"cli.{name} " in text or f"cli.{name}\n" in text]


# --- private facts of typer and click that the command line relies on -------------------------------------------------


def test_assumption_typer_bad_parameter_derives_from_clicks_usage_error() -> None:
    assert issubclass(typer.BadParameter, USAGE_ERROR) and USAGE_ERROR.__name__ == "UsageError", (
        "typer.BadParameter no longer derives from click's UsageError: irgdistill.cli.app.USAGE_ERROR"
    )
    with pytest.raises(USAGE_ERROR) as caught:
        app(["distill", "--epochs"], standalone_mode=False)
    assert usage(caught.value) == "option '--epochs' requires an argument"


def test_assumption_click_names_an_unknown_option_with_possibilities() -> None:
    with pytest.raises(USAGE_ERROR) as caught:
        app(["distill", "--epcohs", "3"], standalone_mode=False)
    assert is_unknown_option(caught.value), (
        "click's NoSuchOption no longer has `possibilities` and `option_name`: irgdistill.cli.options.is_unknown_option"
    )
    assert not is_unknown_option(typer.BadParameter("x"))


def test_assumption_typer_has_the_padding_of_the_options_table() -> None:
    from typer import rich_utils

    assert hasattr(rich_utils, PADDING), f"typer.rich_utils.{PADDING} is gone: help is wider than needed"


def test_assumption_typer_writes_the_page_of_commands() -> None:
    typer_cli = pytest.importorskip("typer.cli")
    assert callable(getattr(typer_cli, "get_docs_for_click", None)), (
        "typer.cli.get_docs_for_click is gone: docs/hooks.py makes the page of commands with it"
    )
