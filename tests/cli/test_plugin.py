"""Plug-in files: their terms and methods on the command line, in run folders, in a comparison, and refusals."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import yaml
from support import Run

from irgdistill.config.loading import load_plugin, validate
from irgdistill.config.methods import METHODS, TERMS
from irgdistill.config.schema import refresh
from irgdistill.errors import UserError
from irgdistill.plugins import snapshot

PLUGIN = '''
import torch
from irgdistill.losses import Batch, Term, TermSettings, method, term


@term("gap", weight=0.7, compares="logits", source="a test")
class Gap(Term):
    """Mean absolute difference of the logits."""

    class Settings(TermSettings):
        margin: float = 0.0
        """Differences below it count as none."""

    def __call__(self, batch: Batch) -> torch.Tensor:
        difference = (batch.student.logits - batch.teacher.logits).abs()
        return (difference - self.settings.margin).clamp(min=0).mean()


method("gap+kd", {"gap": 0.5, "kd": 1.0}, fades={"gap": (0.0, 0.5)})
'''


@pytest.fixture(autouse=True)
def _registries() -> Iterator[None]:
    """No plug-in outlives its test."""
    restore = snapshot()
    yield
    restore()
    refresh()


@pytest.fixture
def plugin(tmp_path: Path) -> Path:
    path = tmp_path / "gap.py"
    path.write_text(PLUGIN)
    return path


@pytest.fixture
def recipe(plugin: Path, folder: Path, teacher: Path) -> tuple[object, ...]:
    options = (
        "--plugin",
        plugin,
        "--data",
        folder,
        "--teacher-checkpoint",
        teacher,
        "--student",
        "cifar_resnet14_x0_5",
    )
    options += ("--epochs", 1, "--batch-size", 8, "--device", "cpu", "--workers", 0, "--skip-teacher-check")
    return (*options, "--set", "runtime.log_every=1")


def test_a_term_of_a_plugin_trains_with_its_own_setting_and_is_in_the_record(
    run: Run, recipe: tuple[object, ...], plugin: Path, tmp_path: Path
) -> None:
    output = tmp_path / "run"
    options = ("--method", "gap", "--set", "losses.gap.margin=0.25", "--set", "losses.gap.weight=0.3")
    result = run("distill", *recipe, *options, "--set", "runtime.share_every=1", "--output", output)
    assert result.code == 0, result.err
    records = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    steps = [record for record in records if record["kind"] == "train"]
    assert all(set(step["terms"]) == {"ce", "gap"} for step in steps)
    for step in steps:
        assert step["loss"] == pytest.approx(step["terms"]["ce"] + 0.3 * step["terms"]["gap"], rel=1e-5)
    shares = [record["share"] for record in records if record["kind"] == "gradient"]
    assert shares and all(set(share) == {"ce", "gap"} and sum(share.values()) == pytest.approx(1) for share in shares)
    config = yaml.safe_load((output / "config.yaml").read_text())
    assert config["losses"]["gap"] == {"weight": 0.3, "fade": None, "rise": None, "margin": 0.25}
    assert [set(entry) for entry in config["plugins"]] == [{"path", "sha256"}]
    assert config["plugins"][0]["path"] == str(plugin)
    assert run("export", output, "--check-images", 2).code == 0
    recipe_yaml = yaml.safe_load((output / "hub/recipe.yaml").read_text())
    assert recipe_yaml["plugins"] == [{"path": plugin.name, "sha256": config["plugins"][0]["sha256"]}]


SOURCE = '''
from irgdistill.config import source


@source("copies/")
def open_copies(config, val_only=False):
    """The folder NAME of `--data copies/NAME`."""
    from pathlib import Path
    from irgdistill.data import open_splits
    return open_splits(config.replaced({"source": str(Path(config.root) / config.source.removeprefix("copies/"))}))
'''


def test_a_checkpoint_knows_the_plugin_of_its_data(run: Run, folder: Path, tmp_path: Path) -> None:
    """`eval` and `inspect-graph` of a student whose data source is a plug-in's, in processes without it."""
    (tmp_path / "copies.py").write_text(SOURCE)
    options = ("--data", f"copies/{folder.name}", "--data-root", folder.parent, "--method", "none", "--epochs", 1)
    options += ("--student", "cifar_resnet14_x0_5", "--batch-size", 8, "--workers", 0, "--device", "cpu")
    trained = run("distill", "--plugin", tmp_path / "copies.py", *options, "--output", tmp_path / "run")
    assert trained.code == 0, trained.err
    command = [sys.executable, "-m", "irgdistill", "eval", str(tmp_path / "run"), "--json", "--workers", "0"]
    shown = subprocess.run(command, capture_output=True, text=True)
    assert shown.returncode == 0, shown.stderr
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    assert json.loads(shown.stdout)["top1"] == pytest.approx(summary["top1"])
    (tmp_path / "copies.py").unlink()
    gone = subprocess.run(command, capture_output=True, text=True)
    assert gone.returncode == 2 and gone.stderr == f"irgdistill: --plugin {tmp_path / 'copies.py'}: no such file\n"


def test_its_settings_are_typed_and_its_method_has_weights_and_fades(run: Run, recipe: tuple[object, ...]) -> None:
    wrong = run("distill", *recipe, "--method", "gap", "--set", "losses.gap.margin=wide", "--dry-run")
    assert wrong.code == 2 and wrong.err == "irgdistill: losses.gap.margin = 'wide': expected a number\n"
    unknown = run("distill", *recipe, "--method", "gap", "--set", "losses.gap.margni=1", "--dry-run")
    assert unknown.code == 2 and "unknown key 'losses.gap.margni'; did you mean losses.gap.margin" in unknown.err
    shown = run("distill", *recipe, "--method", "gap+kd", "--dry-run", "--json")
    losses = json.loads(shown.out)["config"]["losses"]
    assert (losses["gap"]["weight"], losses["gap"]["fade"], losses["kd"]["weight"]) == (0.5, [0.0, 0.5], 1.0)


def _stopped(plugin: Path, recipe: tuple[object, ...], output: Path) -> None:
    """A run of the plug-in's method that ends early, in a process of its own."""
    code = (
        "import os, signal, sys\n"
        "from irgdistill.training.trainer import Trainer\n"
        "step = Trainer.train_step\n"
        "def stopped(self, *args, **kwargs):\n"
        "    os.kill(os.getpid(), signal.SIGTERM)\n"
        "    return step(self, *args, **kwargs)\n"
        "Trainer.train_step = stopped\n"
        "from irgdistill.cli import main\n"
        "main()\n"
    )
    words = ("distill", *recipe, "--method", "gap", "--output", output)
    ended = subprocess.run([sys.executable, "-c", code, *map(str, words)], capture_output=True, text=True)
    assert ended.returncode == 143, ended.stderr


def test_a_resumed_run_imports_its_plugin_and_refuses_another_content(
    run: Run, recipe: tuple[object, ...], plugin: Path, tmp_path: Path
) -> None:
    output = tmp_path / "run"
    _stopped(plugin, recipe, output)
    plugin.write_text(PLUGIN + "# edited\n")
    refused = run("distill", "--resume", output)
    was = yaml.safe_load((output / "config.yaml").read_text())["plugins"][0]["sha256"]
    assert refused.code == 2 and refused.err.count("\n") == 1
    assert f"the plugin {plugin} has changed: its sha256 is " in refused.err and f", was {was}" in refused.err
    assert "gap" not in TERMS
    plugin.write_text(PLUGIN)
    resumed = run("distill", "--resume", output)
    assert resumed.code == 0, resumed.err
    assert json.loads((output / "summary.json").read_text())["epoch"] == 1


def test_a_comparison_takes_its_method_beside_kd(run: Run, recipe: tuple[object, ...], tmp_path: Path) -> None:
    options = ("--methods", "kd,gap", "--seeds", 1, "--output", tmp_path / "both", "--json")
    compared = run("compare", *recipe, *options)
    assert compared.code == 0, compared.err
    rows = {row["method"]: row["weights"] for row in json.loads(compared.out)["rows"]}
    assert rows == {"kd": {"ce": 1.0, "kd": 1.0}, "gap": {"ce": 1.0, "gap": 0.7}}


def test_two_processes_and_runs_at_once_import_it_too(run: Run, recipe: tuple[object, ...], tmp_path: Path) -> None:
    many = run("distill", *recipe, "--method", "gap", "--gpus", 2, "--backend", "gloo", "--output", tmp_path / "two")
    assert many.code == 0, many.err
    options = ("--methods", "kd,gap", "--seeds", 1, "--jobs", 2, "--output", tmp_path / "jobs")
    compared = run("compare", *recipe, *options)
    assert compared.code == 0, compared.err


def test_a_cached_teacher_and_the_doctor_know_its_method(run: Run, recipe: tuple[object, ...], tmp_path: Path) -> None:
    cached = run("cache-teacher", *recipe, "--method", "gap", "--output", tmp_path / "cache")
    assert cached.code == 0, cached.err
    options = ("--method", "gap", "--teacher-cache", tmp_path / "cache", "--output", tmp_path / "run")
    assert run("distill", *recipe, *options).code == 0
    looked = run("doctor", *recipe, "--method", "gap", "--json")
    assert looked.code in (0, 1) and json.loads(looked.out)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (None, "no such file"),
        ("import nothing_of_this_name", "ModuleNotFoundError: No module named 'nothing_of_this_name'"),
        ("def (", "SyntaxError: "),
        (PLUGIN.replace('"gap"', '"kd"'), "term 'kd' is already registered; give it another name"),
        (PLUGIN.replace('"gap"', '"loss"'), "a term cannot be named 'loss'"),
        (PLUGIN.replace('method("gap+kd"', 'method("irg"'), "method 'irg' is already registered"),
        (PLUGIN.replace('{"gap": 0.5', '{"gpa": 0.5'), "method 'gap+kd' has no term 'gpa'; did you mean gap"),
    ],
)
def test_a_plugin_that_cannot_be_imported_is_one_line_and_leaves_nothing(
    run: Run, tmp_path: Path, source: str | None, message: str
) -> None:
    path = tmp_path / "plugin.py"
    if source is not None:
        path.write_text(source)
    before = list(TERMS), list(METHODS)
    result = run("distill", "--plugin", path, "--student", "cifar_resnet14_x0_5", "--data", "digits", "--dry-run")
    assert result.code == 2 and result.err.count("\n") == 1 and not result.out
    assert result.err.startswith(f"irgdistill: --plugin {path}: ") and message in result.err
    assert (list(TERMS), list(METHODS)) == before


def test_the_python_interface_loads_plugins_too(plugin: Path, folder: Path, teacher: Path, tmp_path: Path) -> None:
    import timm

    import irgdistill
    import irgdistill.models  # registers the small networks

    loaded = irgdistill.load_plugin(plugin)
    assert loaded.path == plugin and load_plugin(plugin, loaded.sha256) == loaded
    with pytest.raises(UserError, match=f"its sha256 is {loaded.sha256}, was 0"):
        load_plugin(plugin, "0" * 64)
    networks = [timm.create_model("cifar_resnet14_x0_5", num_classes=3) for _ in range(2)]
    distiller = irgdistill.Distiller(*networks, method="gap", settings={"losses.gap.margin": 0.1})
    loss, terms = distiller(torch.randn(4, 3, 16, 16), torch.arange(4) % 3)
    assert set(terms) == {"ce", "gap"} and loss.item() == pytest.approx(terms["ce"].item() + 0.7 * terms["gap"].item())
    names = {"teacher_checkpoint": teacher, "student": "cifar_resnet14_x0_5", "data": str(folder), "batch_size": 8}
    options = {**names, "plugin": [plugin], "method": "gap", "epochs": 1, "workers": 0, "device": "cpu"}
    irgdistill.distill(**options, skip_teacher_check=True, output=tmp_path / "run")
    config = validate(yaml.safe_load((tmp_path / "run/config.yaml").read_text()))
    assert config.method == "gap" and [entry.sha256 for entry in config.plugins] == [loaded.sha256]


def test_its_methods_are_completed(plugin: Path) -> None:
    words = f"irgdistill distill --plugin {plugin} --method ga"
    environment = {"COMP_WORDS": words, "COMP_CWORD": "5", "_IRGDISTILL_COMPLETE": "complete_bash"}
    code = "from irgdistill.cli import main; import sys; sys.argv = ['irgdistill']; main()"
    import os

    shown = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, **environment}
    )
    assert shown.stdout.split() == ["gap", "gap+kd"], shown.stderr


def test_train_refuses_the_weight_of_a_plugin_s_term(run: Run, plugin: Path) -> None:
    words = ("--model", "cifar_resnet20", "--data", "digits", "--plugin", plugin, "--set", "losses.gap.weight=1")
    result = run("train", *words)
    assert result.code == 2 and "train learns from labels alone, and losses.gap from a teacher" in result.err
