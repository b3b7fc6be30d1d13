"""The real commands, in-process, on small real data: what they leave, and what they say when they cannot."""

from __future__ import annotations

import json
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support import SMALL, Result, Run, interrupted, position, records, write_images

import irgdistill.models  # noqa: F401  registers the CIFAR networks
from irgdistill.io.run_folder import RunFolder
from irgdistill.io.tensors import read_metadata, save_tensors
from irgdistill.runtime.signals import Stopped
from irgdistill.training.state import load_state

TINY = ("--input-size", 8, "--teacher-input-size", 8)
"""A CPU takes its time over float16."""


def distill(run: Run, teacher: Path, folder: Path, output: Path, *options: object) -> Result:
    checkpoint = ("--teacher-checkpoint", teacher / "best.safetensors")
    student = ("--student", "cifar_resnet14_x0_5", "--data", folder, "--output", output)
    return run("distill", *checkpoint, *student, *SMALL, *options)


def test_distil_then_eval_without_another_flag(run: Run, teacher: Path, folder: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    result = distill(run, teacher, folder, output, "--epochs", 2, "--set", "runtime.gradient_shares_every=2")
    assert result.code == 0, result.err
    assert {path.name for path in output.iterdir()} == {
        "best.safetensors",
        "last.safetensors",
        "config.json",
        "config.yaml",
        "metrics.jsonl",
        "summary.json",
        "state",
    }
    assert "matched stages" in result.err and "teacher cifar_resnet14_x0_5: top-1" in result.err

    train = records(output, "train")
    assert len(train) == 6 and set(train[0]["terms"]) == {"ce", "kd", "edges", "transform", "attention"}
    weights = {"ce": 1, "kd": 1, "edges": 2.5, "transform": 0.5, "attention": 100}
    assert train[0]["loss"] == pytest.approx(sum(weights[k] * v for k, v in train[0]["terms"].items()), rel=1e-5)
    assert all(sum(r["share"].values()) == pytest.approx(1) for r in records(output, "gradient"))
    assert len(records(output, "gradient")) == 3

    summary = json.loads((output / "summary.json").read_text())
    assert {"top1", "top5", "epoch", "seconds", "images_per_second"} <= set(summary)
    metadata = read_metadata(output / "best.safetensors")
    assert metadata is not None
    assert metadata["classes"] == ["blue", "green", "red"] and metadata["seed"] == 3
    assert metadata["teacher"]["architecture"] == "cifar_resnet14_x0_5" and len(metadata["plan"]["pairs"]) == 3
    assert {"torch", "timm", "irgdistill"} <= set(metadata["versions"])

    evaluated = run("eval", output, "--json")
    values = json.loads(evaluated.out)
    assert {"top1", "top5", "loss", "images", "params", "macs", "images_per_second"} <= set(values)
    assert values["top1"] == pytest.approx(summary["top1"]) and values["images"] == 24

    against = json.loads(run("eval", output / "best.safetensors", "--against", teacher, "--json").out)
    assert 0 <= against["agreement"] <= 100 and against["kl"] >= 0
    table = run("eval", output, teacher)
    assert table.code == 0 and "top-1 %" in table.out


def test_the_saved_student_has_exactly_the_networks_keys(teacher: Path) -> None:
    import timm

    model = timm.create_model("cifar_resnet14_x0_5", num_classes=3)
    assert set(load_file(teacher / "best.safetensors")) == set(model.state_dict())


def test_a_seed_fixes_every_number(run: Run, teacher: Path, folder: Path, tmp_path: Path) -> None:
    weights = []
    for name, workers in (("a", 0), ("b", 2)):
        result = distill(run, teacher, folder, tmp_path / name, "--epochs", 1, "--mixup", 0.2, "--workers", workers)
        assert result.code == 0, result.err
        weights.append(load_file(tmp_path / name / "last.safetensors"))
    assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[0])


@pytest.mark.parametrize(
    "options",
    [
        ("--method", "mtk", "--edge-blocks", 2, "--ema", 0.9, "--clip-grad", 1, "--accumulate", 3),
        ("--method", "irg", "--amp", "bf16", "--channels-last", "--opt", "adamw", "--lr", 0.001),
        (
            "--method",
            "kd",
            "--cutmix",
            1,
            "--auto-augment",
            "rand-m3",
            "--label-smoothing",
            0.1,
            "--set",
            "augment.erase=1",
        ),
        ("--teacher-input-size", 32, "--method", "irg+kd", "--set", "schedule.name=multistep"),
    ],
)
def test_the_usual_machinery(
    run: Run, teacher: Path, folder: Path, tmp_path: Path, options: tuple[object, ...]
) -> None:
    result = distill(run, teacher, folder, tmp_path / "run", "--epochs", 1, *options)
    assert result.code == 0, result.err
    assert all(torch.isfinite(value).all() for value in load_file(tmp_path / "run/last.safetensors").values())


@pytest.mark.parametrize(
    "options",
    [
        ("--mixup", 0.3, "--ema", 0.9, "--set", "student.args={drop_rate: 0.2}"),
        (*("--amp", "fp16", "--clip-grad", 1, "--accumulate", 2, "--batch-size", 12), *TINY),
    ],
)
def test_a_stopped_run_goes_on_to_the_same_student(
    run: Run, teacher: Path, folder: Path, tmp_path: Path, options: tuple[object, ...]
) -> None:
    """Stopped by a signal in the middle of an epoch: bit for bit the same weights, the scale of fp16 too."""

    options = ("--epochs", 2, *options)
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert distill(run, teacher, folder, whole, *options).code == 0

    with interrupted(lambda trainer: position(trainer) == 4):
        result = distill(run, teacher, folder, parts, *options)
    assert result.code == 130
    assert f"resume with: irgdistill distill --resume {parts}" in result.err
    assert "Traceback" not in result.err and (parts / "last.safetensors").exists()

    resumed = run("distill", "--resume", parts)
    assert resumed.code == 0, resumed.err
    for name in ("last", "best"):
        a, b = load_file(whole / f"{name}.safetensors"), load_file(parts / f"{name}.safetensors")
        assert all(torch.equal(a[key], b[key]) for key in a)
    scales = [load_state(RunFolder(path).state)["scaler"] for path in (whole, parts)]
    assert scales[0] == scales[1] and bool(scales[0]) is ("fp16" in options)
    strip = lambda r: {key: value for key, value in r.items() if key != "images_per_second"}  # noqa: E731
    for kind in ("train", "eval"):
        assert list(map(strip, records(whole, kind))) == list(map(strip, records(parts, kind)))

    again = run("distill", "--resume", parts)
    assert again.code == 2 and "holds a finished run" in again.err


def test_networks_of_other_sizes_and_classes(run: Run, folder: Path, tmp_path: Path) -> None:
    """A teacher with a head for other classes and its own input size: terms on logits are refused, relations work."""
    import timm

    save_file(timm.create_model("cifar_resnet20", num_classes=7).state_dict(), tmp_path / "seven.safetensors")
    options = ("distill", "--teacher", "cifar_resnet20", "--teacher-checkpoint", tmp_path / "seven.safetensors")
    options += (
        "--student",
        "cifar_shufflenet_x0_5",
        "--data",
        folder,
        *SMALL,
        "--epochs",
        1,
        "--teacher-input-size",
        32,
        "--method",
        "irg+kd",
    )
    refused = run(*options, "--output", tmp_path / "run")
    assert refused.code == 2 and "the teacher has 7 classes and the data 3" in refused.err
    assert "--set losses.kd.weight=0 --set losses.logits.weight=0" in refused.err
    assert not (tmp_path / "run").exists()
    allowed = run(
        *options, "--output", tmp_path / "run", "--set", "losses.kd.weight=0", "--set", "losses.logits.weight=0"
    )
    assert allowed.code == 0, allowed.err
    assert set(records(tmp_path / "run", "train")[0]["terms"]) == {"ce", "edges", "transform"}


def test_a_teacher_near_chance_stops_the_run(run: Run, folder: Path, tmp_path: Path) -> None:
    import timm

    torch.manual_seed(0)
    save_file(timm.create_model("cifar_resnet20", num_classes=3).state_dict(), tmp_path / "raw.safetensors")
    options = ("distill", "--teacher", "cifar_resnet20", "--teacher-checkpoint", tmp_path / "raw.safetensors")
    options += ("--student", "cifar_resnet14_x0_5", "--data", folder, *SMALL, "--epochs", 1)
    stopped = run(*options, "--output", tmp_path / "a")
    assert stopped.code == 2 and "chance is 33.3" in stopped.err and "--skip-teacher-check" in stopped.err
    assert run(*options, "--output", tmp_path / "b", "--skip-teacher-check").code == 0


def test_dry_run_shows_configuration_and_plan_and_leaves_nothing(
    run: Run, teacher: Path, folder: Path, tmp_path: Path
) -> None:
    result = distill(run, teacher, folder, tmp_path / "run", "--dry-run")
    assert result.code == 0, result.err
    assert "temperature: 4.0" in result.out and "layer3.1" in result.err
    images = [sum(1 for _ in (folder / part).rglob("*.png")) for part in ("train", "val")]
    assert f"{images[0]:,} images of 3 classes to train on, {images[1]:,} for validation" in result.err
    assert not (tmp_path / "run").exists()
    for option, value, message in (
        ("--opt", "sdg", "unknown optimizer 'sdg'; did you mean sgd"),
        ("--device", "tpu", "--device tpu"),
        ("--batch-size", 1000, "--batch-size 1000 is larger than the"),
        ("--output", teacher, "holds a finished run"),
    ):
        refused = distill(run, teacher, folder, tmp_path / "run", "--dry-run", option, value)
        assert refused.code == 2 and message in refused.err


def test_images_that_were_trained_on_are_not_held_out_again(run: Run, folder: Path, tmp_path: Path) -> None:
    options = ("--data", folder / "train", "--val-fraction", 0.25, *SMALL, "--epochs", 1, "--method", "none")
    assert run("distill", *options, "--student", "cifar_resnet14_x0_5", "--output", tmp_path / "run").code == 0
    refused = run("eval", tmp_path / "run", "--val-fraction", 0.5)
    assert refused.code == 2 and "the images its run held out; --val-fraction needs another --data" in refused.err
    assert run("eval", tmp_path / "run", "--val-fraction", 0.25).code == 0


def test_a_finished_run_is_not_overwritten(run: Run, teacher: Path, folder: Path) -> None:
    before = (teacher / "best.safetensors").read_bytes()
    result = distill(run, teacher, folder, teacher)
    assert result.code == 2 and "holds a finished run; give another --output or --overwrite" in result.err
    assert (teacher / "best.safetensors").read_bytes() == before


def test_a_loss_that_is_not_finite_stops_before_the_weights_change(
    run: Run, teacher: Path, folder: Path, tmp_path: Path
) -> None:
    result = distill(run, teacher, folder, tmp_path / "run", "--epochs", 3, "--lr", 1e18, "--method", "kd")
    assert result.code == 2 and "the loss is not finite at update" in result.err and "kd = " in result.err


def test_bad_images_are_named_and_counted(run: Run, teacher: Path, folder: Path, tmp_path: Path) -> None:
    (folder / "train" / "red" / "000.png").write_bytes(b"broken")
    result = distill(run, teacher, folder, tmp_path / "a", "--epochs", 1)
    assert result.code == 0 and "unreadable image skipped (1 of 10 allowed)" in result.err and "000.png" in result.err
    result = distill(run, teacher, folder, tmp_path / "b", "--epochs", 2, "--max-bad-images", 0)
    assert result.code == 2 and "1 unreadable images, 0 allowed (--max-bad-images)" in result.err


def test_data_that_moved_is_asked_for(run: Run, teacher: Path, folder: Path, tmp_path: Path) -> None:
    distill(run, teacher, folder, tmp_path / "run", "--epochs", 1)
    folder.rename(tmp_path / "moved")
    result = run("eval", tmp_path / "run")
    assert result.code == 2 and "give its place with --data" in result.err
    assert run("eval", tmp_path / "run", "--data", tmp_path / "moved").code == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("distill",), "missing --teacher, --student and --data; for example: --teacher resnet50 --student"),
        (("distill", "--data", "digits", "--method", "none"), "no student: give --student NAME"),
        (("distill", "--student", "resnet18", "--method", "none"), "no data: give --data"),
        (("distill", "--student", "resnet18", "--data", "digits"), "needs a teacher: give --teacher NAME"),
        (("distill", "--student", "resnt18", "--data", "digits", "--method", "none"), "did you mean resnet18"),
        (("distill", "--student", "resnet18", "--data", "digits", "--method", "nonne"), "did you mean none"),
        (("distill", "--set", "losses.kd.wieght=1"), "did you mean losses.kd.weight"),
        (("distill", "--preset", "quikstart"), "did you mean quickstart"),
        (
            ("distill", "--preset", "quickstart", "--student", "cifar_resnet20", "--teacher", "cifar_resnet56"),
            "--teacher-checkpoint",
        ),
        (
            (
                "distill",
                "--preset",
                "quickstart",
                "--method",
                "none",
                "--student",
                "cifar_resnet20",
                "--batch-size",
                "5000",
            ),
            "larger",
        ),
        (
            ("distill", "--preset", "quickstart", "--method", "none", "--student", "cifar_resnet20", "--opt", "sgdd"),
            "did you mean sgd",
        ),
        (
            ("distill", "--preset", "quickstart", "--method", "none", "--student", "cifar_resnet20", "--device", "tpu"),
            "--device tpu",
        ),
        (("distill", "--resume", "nowhere"), "holds no run that can be resumed"),
        (("distill", "--resume", "nowhere", "--epochs", "3"), "cannot change schedule.epochs"),
        (("distill", "--resume", "nowhere", "--overwrite"), "leave out"),
        (("eval", "nowhere.safetensors"), "no file nowhere.safetensors"),
        (("eval", "resnet1O1"), "unknown model"),
        (("eval", "cifar_resnet20", "--checkpoint", "x.safetensors"), "no file x.safetensors"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(
    run: Run, arguments: tuple[str, ...], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    result = run(*arguments)
    assert result.code == 2
    lines = result.err.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("irgdistill: ") and message in lines[0]
    assert not list(tmp_path.iterdir()), "nothing is left behind"


def test_the_plan_needs_no_data_and_no_weights(run: Run) -> None:
    shown = run("inspect-graph", "--plan-only", "--teacher", "resnet50", "--student", "mobilenetv2_100")
    assert shown.code == 0 and "layer4.2" in shown.out and "block-inner, blocks.5.0 → blocks.5.2" in shown.out
    arguments = (
        "inspect-graph",
        "--plan-only",
        "--teacher",
        "vit_giant_patch14_224",
        "--student",
        "resnet18",
        "--json",
    )
    plan = json.loads(run(*arguments).out)
    assert len(plan["pairs"]) == 4 and plan["pairs"][-1]["student"]["exit"]["module"] == "layer4.1"
    assert plan["pairs"][-1]["teacher"]["exit"] == {
        **{"module": "blocks.39", "channels": 1408, "height": 16, "width": 16},
        **{"layout": "BLC", "prefix": 1, "index": None},
    }


def test_an_input_too_small_for_a_stage_is_refused_with_the_smallest(run: Run) -> None:
    pair = ("inspect-graph", "--plan-only", "--teacher", "resnet18", "--student", "resnet18")
    refused = run(*pair, "--input-size", 32)
    assert refused.code == 2 and "the smallest size that works is --input-size 33" in refused.err
    assert run(*pair, "--input-size", 33).code == 0


def test_models_lists_what_can_be_matched(run: Run) -> None:
    line = json.loads(run("models", "cifar_resnet20_x0_5", "--json").out)
    assert line["params"] == 68_050 and line["levels"] == [1, 2, 4] and line["input_size"] == [32, 32]
    assert "/4 /8 /16 /32" in run("models", "resnet18").out
    assert run("models", "resnut999").code == 2


def test_foreign_and_truncated_checkpoints(run: Run, teacher: Path, tmp_path: Path) -> None:
    save_file({"x": torch.ones(1)}, tmp_path / "foreign.safetensors")
    foreign = run("eval", tmp_path / "foreign.safetensors")
    assert foreign.code == 2 and "was not written by irgdistill" in foreign.err
    (tmp_path / "cut.safetensors").write_bytes((teacher / "best.safetensors").read_bytes()[:3000])
    cut = run("eval", tmp_path / "cut.safetensors")
    assert cut.code == 2 and "truncated" in cut.err and cut.err.count("\n") == 1


USAGE_ERRORS = {
    "no option --nonsense": ["distill", "--nonsense"],
    "no command": ["nope"],
    "no student": ["distill", "--teacher", "resnet50", "--data", "digits"],
    "no data: give": ["distill", "--student", "resnet18", "--method", "none"],
    "no data folder": ["distill", "--student", "resnet18", "--method", "none", "--data", "nowhere"],
    "needs a teacher": ["distill", "--student", "resnet18", "--data", "digits"],
    "no file nowhere.pth": [
        "distill",
        "--student",
        "resnet18",
        "--data",
        "digits",
        "--teacher-checkpoint",
        "nowhere.pth",
    ],
    "--gpus many": ["distill", "--student", "resnet18", "--data", "digits", "--method", "none", "--gpus", "many"],
    "holds no run": ["distill", "--resume", "nowhere"],
    "cannot change": ["distill", "--resume", "nowhere", "--lr", "1"],
    "unknown method": ["compare", "--methods", "kid", "--student", "resnet18"],
    "both must be at least 1": ["compare", "--seeds", "0"],
    "a cache needs a teacher": ["cache-teacher", "--data", "digits"],
    "--store fp8": ["cache-teacher", "--data", "digits", "--teacher", "resnet50", "--store", "fp8"],
    "no file nowhere.safetensors": ["eval", "nowhere.safetensors"],
    "is neither a run folder": ["export", "nowhere"],
    "--images 1:": ["inspect-graph", "--student", "resnet18", "--teacher", "resnet50", "--images", "1"],
    "--backend tcp": ["doctor", "--backend", "tcp"],
}


@pytest.mark.parametrize(
    ("message", "arguments"),
    [("", ["--help"]), ("", ["--version"]), ("", ["distill", "--help"]), *USAGE_ERRORS.items()],
    ids=lambda value: value if isinstance(value, str) else " ".join(value[:2]),
)
def test_help_version_and_usage_errors_start_without_torch(message: str, arguments: list[str]) -> None:
    code = "\n".join(
        [
            f"import sys; sys.argv[1:] = {arguments!r}",
            "from irgdistill.cli import main",
            "try: main()",
            "except SystemExit as end: code = end.code",
            "assert not {'torch', 'timm', 'torchvision'} & set(sys.modules)",
            "sys.exit(code)",
        ]
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == (2 if message else 0), result.stderr
    assert message in result.stderr and result.stderr.count("\n") == bool(message)
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize("option", ["--version", "--help"])
def test_help_is_quick(option: str) -> None:
    """Processor seconds of a process of its own, best of five: under 0.5, whatever else runs on the machine."""
    seconds = []
    for _ in range(5):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run([sys.executable, "-m", "irgdistill", option], capture_output=True, check=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        seconds.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    assert min(seconds) < 0.5


def test_another_teacher_is_refused(run: Run, teacher: Path, folder: Path, tmp_path: Path) -> None:
    """By a run that goes on, whose state remembers the teacher's weights; the same ones elsewhere are taken."""
    from irgdistill.training.trainer import Trainer

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "end_epoch", lambda self, metrics: self.stop(15))
        assert distill(run, teacher, folder, tmp_path / "run", "--epochs", 2).code == 143
    weights = load_file(teacher / "best.safetensors")
    metadata = read_metadata(teacher / "best.safetensors")
    assert metadata is not None
    save_tensors(tmp_path / "same.safetensors", weights, metadata)
    save_tensors(tmp_path / "other.safetensors", {name: value + 1 for name, value in weights.items()}, metadata)
    resume = ("distill", "--resume", tmp_path / "run", "--teacher-checkpoint")
    other = run(*resume, tmp_path / "other.safetensors")
    assert other.code == 2 and "the teacher is not the one that the run learns from" in other.err
    assert run(*resume, tmp_path / "same.safetensors").code == 0


def test_a_run_does_not_replace_its_teacher(run: Run, teacher: Path, folder: Path, tmp_path: Path) -> None:
    own = tmp_path / "own"
    shutil.copytree(teacher, own)
    before = (own / "best.safetensors").read_bytes()
    for option in ("--teacher-checkpoint", "--student-checkpoint"):
        for given in (own, own / "last.safetensors"):
            result = distill(run, teacher, folder, own, "--overwrite", option, given)
            assert result.code == 2 and f"{option} {given} lies in --output" in result.err, result.err
    assert (own / "best.safetensors").read_bytes() == before


def test_stopped_before_it_began_it_speaks_of_no_other_run(
    run: Run, teacher: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(teacher, tmp_path / "old")

    def stopped(*_: Any, **__: Any) -> Any:
        raise Stopped(signal.SIGINT)

    monkeypatch.setattr("irgdistill.commands.distill.prepare", stopped)
    result = distill(run, teacher, folder, tmp_path / "old", "--overwrite")
    assert result.code == 130 and "nothing was trained yet" in result.err and "--resume" not in result.err


def test_images_deeper_than_class_folders_are_named(run: Run, teacher: Path, folder: Path, tmp_path: Path) -> None:
    below = folder / "train" / "red" / "2021"
    below.mkdir()
    shutil.copy(next((folder / "train" / "red").glob("*.png")), below / "a.png")
    result = distill(run, teacher, folder, tmp_path / "run")
    assert result.code == 2 and f"{below} holds images deeper than a class folder" in result.err


def test_eval_of_several_data_sets(run: Run, teacher: Path, tmp_path: Path) -> None:
    """Nothing is measured before all can be opened; each column says on which images it was."""
    one, two = (write_images(tmp_path / n / "val", {"red": c, "green": c, "blue": c}, seed=1).parent for n, c in TWO)
    for number, data in enumerate((one, two)):
        shutil.copytree(data / "val", data / "train")
        shutil.copytree(teacher, tmp_path / f"run{number}")
        path = tmp_path / f"run{number}" / "best.safetensors"
        metadata = read_metadata(path)
        assert metadata is not None
        save_tensors(path, load_file(path), {**metadata, "data": {**metadata["data"], "source": str(data)}})
    result = run("eval", tmp_path / "run0", tmp_path / "run1", "--workers", 0)
    assert result.code == 0 and "different images" in result.out, result.err
    assert "12 images of" in result.out and "24 images of" in result.out
    missing = run("eval", tmp_path / "run0", "no-such-model", "--workers", 0)
    assert missing.code == 2 and not missing.out
    taught = run("eval", tmp_path / "run0", "--against-checkpoint", teacher / "last.safetensors", "--workers", 0)
    assert taught.code == 0 and "agreement" in taught.out, taught.err


TWO = (("one", 4), ("two", 8))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--seed", 2**31), "--seed 2147483648: expected"),
        (("--input-size", 0), "--input-size 0: expected"),
        (("--auto-augment", "rnd-m9"), "augment.auto_augment = 'rnd-m9' is not a timm policy"),
        (("--opt", "fusedadam"), "optimizer 'fusedadam' does not work here"),
        (("--set", "augment.scale=[-1,0]"), "augment.scale"),
        (("--set", "augment.ratio=[2,1]"), "the first cannot be the larger"),
        (("--teacher", "resnet50.a1_in1K"), "unknown weights 'resnet50.a1_in1K'; did you mean resnet50.a1_in1k"),
        (("--device", "meta"), "--device meta"),
        (("--method", "none", "--set", "losses.ce.weight=0"), "no loss term has a weight"),
    ],
)
def test_values_out_of_bounds(
    run: Run, teacher: Path, folder: Path, tmp_path: Path, options: tuple[object, ...], message: str
) -> None:
    student = ("--student", "cifar_resnet14_x0_5", "--data", folder, "--output", tmp_path / "run", *SMALL)
    given = () if "--teacher" in options else ("--teacher-checkpoint", teacher)
    result = run("distill", *student, *given, *options)
    assert result.code == 2 and message in result.err and result.err.count("\n") == 1, result.err
    assert not (tmp_path / "run").exists()


def test_a_state_is_no_checkpoint(run: Run, teacher: Path, tmp_path: Path) -> None:
    for command in (("eval",), ("export",)):
        result = run(*command, teacher / "state" / "state.safetensors")
        assert result.code == 2 and "is the state of a run; its weights are in best.safetensors" in result.err
