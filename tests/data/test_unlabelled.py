"""Training without labels: everything comes from the teacher, and where an image lies tells nothing."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support import SMALL, Result, Run, records, write_images

from irgdistill.config import read_yaml, validate_saved
from irgdistill.config.loading import load_config
from irgdistill.config.schema import DataConfig
from irgdistill.data.open import open_splits
from irgdistill.data.unlabelled import UNLABELLED
from irgdistill.errors import UserError
from irgdistill.io.tensors import read_metadata
from irgdistill.losses.base import Batch
from irgdistill.losses.objective import build_loss
from irgdistill.matching.taps import Output

CLASSES = ["blue", "green", "red"]


def plain(root: Path, folders: dict[str, str], seed: int = 0, count: int = 24) -> Path:
    """Images of three colours with names that do not tell them, each colour in the folder given for it."""
    made = write_images(root.parent / f"{root.name}-made", {"red": count, "green": count, "blue": count}, seed=seed)
    for number, path in enumerate(sorted(made.rglob("*.png"))):
        folder = root / folders[path.parent.name]
        folder.mkdir(parents=True, exist_ok=True)
        path.rename(folder / f"image-{number * 31 % 1009:04d}.png")
    shutil.rmtree(made)
    return root


FLAT = {"red": ".", "green": "sub", "blue": "sub/deeper"}


def distill(run: Run, teacher: Path, data: object, output: Path, *options: object) -> Result:
    student = ("--student", "cifar_resnet14_x0_5", "--data", data, "--output", output)
    return run("distill", "--teacher-checkpoint", teacher, *student, "--no-labels", *SMALL, *options)


def test_a_student_learns_from_the_teacher_alone(run: Run, teacher: Path, tmp_path: Path) -> None:
    """No label anywhere: agreement rises from chance, chooses the best weights and is what `eval` measures."""
    data = plain(tmp_path / "data", FLAT, count=60)
    output = tmp_path / "run"
    result = distill(run, teacher, data, output, "--epochs", 10, "--val-fraction", 0.25, "--lr", 0.05)
    assert result.code == 0, result.err
    assert "no labels: the teacher's accuracy is not checked" in result.err and "top-1" not in result.err
    evals = records(output, "eval")
    assert all("top1" not in record and "loss" not in record and record["images"] == 45 for record in evals)
    summary = json.loads((output / "summary.json").read_text())
    best = max(record["agreement"] for record in evals)
    assert summary["agreement"] == pytest.approx(best) and best > 80, "chance is 33"
    assert best > evals[0]["agreement"] + 20
    assert set(records(output, "train")[0]["terms"]) == {"kd", "edges", "transform", "attention"}
    metadata = read_metadata(output / "best.safetensors")
    assert (
        metadata is not None
        and metadata["classes"] == CLASSES
        and metadata["metrics"]["agreement"] == pytest.approx(best)
    )
    assert metadata["data"]["labels"] is False and metadata["losses"]["ce"]["weight"] == 0

    against = run("eval", output, "--against", teacher, "--json", "--workers", 0)
    values = json.loads(against.out)
    assert values["agreement"] == pytest.approx(best) and "top1" not in values
    alone = run("eval", output)
    assert alone.code == 2 and "have no labels: give --against TEACHER" in alone.err

    exported = run("export", output, "--output", tmp_path / "hub")
    assert exported.code == 0 and "45 validation images of data" in exported.err, exported.err
    card = (tmp_path / "hub" / "README.md").read_text()
    assert f"after epoch {metadata['metrics']['epoch']} | {best:.2f} | 45 |" in card and "top-1" not in card
    assert str(tmp_path) not in card + (tmp_path / "hub" / "recipe.yaml").read_text(), "no path of this machine"

    labelled = write_images(tmp_path / "labelled" / "val", {"red": 8, "green": 8, "blue": 8}, seed=5).parent
    (labelled / "train").mkdir()
    measured = run("eval", output, "--data", labelled, "--json", "--workers", 0)
    assert measured.code == 0, measured.err
    assert json.loads(measured.out)["top1"] > 80


def test_from_a_cache(run: Run, teacher: Path, tmp_path: Path) -> None:
    """The cached teacher's answers on unlabelled images are the live one's; the exported recipe names what it needs."""
    data = plain(tmp_path / "data" / "train", FLAT).parent
    write_images(data / "val", {"red": 8, "green": 8, "blue": 8}, seed=1)
    (data / "val" / "red" / "notes.txt").write_text("")
    given = ("--data", data, "--teacher-checkpoint", teacher, "--no-labels", *SMALL)
    cached = run("cache-teacher", *given, "--store", "fp32", "--output", tmp_path / "cache")
    assert cached.code == 0, cached.err
    assert cached.err.count("1 file left out: 1 .txt\n") == 1
    from_cache = ("--teacher-cache", tmp_path / "cache")
    for name, options in (("live", ("--set", "data.views=1")), ("cached", from_cache)):
        result = distill(run, teacher, data, tmp_path / name, "--epochs", 2, *options)
        assert result.code == 0, result.err
    evaluated = run("eval", tmp_path / "live", "--workers", 0)
    assert evaluated.code == 0 and evaluated.err.count("1 file left out: 1 .txt\n") == 1
    live, replayed = (records(tmp_path / name, "train")[-1]["loss"] for name in ("live", "cached"))
    assert replayed == pytest.approx(live, rel=1e-4)
    assert run("export", tmp_path / "cached", "--output", tmp_path / "hub").code == 0
    again = "--data FOLDER --teacher-checkpoint run --teacher-cache cache`"
    assert again in (tmp_path / "hub" / "README.md").read_text()
    assert str(tmp_path) not in (tmp_path / "hub" / "recipe.yaml").read_text()

    plain(tmp_path / "bare" / "train", FLAT)
    plain(tmp_path / "bare" / "val", FLAT, seed=1, count=8)
    refused = distill(run, teacher, tmp_path / "bare", tmp_path / "refused", *from_cache)
    assert (
        refused.code == 2 and "need the live teacher, to measure agreement; put them into class folders" in refused.err
    )


@pytest.mark.usefixtures("no_figures")
def test_inspect_graph_of_such_a_run(run: Run, teacher: Path, tmp_path: Path) -> None:
    data = plain(tmp_path / "data", FLAT)
    assert distill(run, teacher, data, tmp_path / "run", "--epochs", 1, "--val-fraction", 0.25).code == 0
    (data / "notes").write_text("")
    for split, count in (("val", 18), ("train", 54)):
        output = tmp_path / split
        shown = run("inspect-graph", tmp_path / "run", "--images", count, "--split", split, "--output", output)
        assert shown.code == 0, shown.err
        assert shown.err.count("1 file left out: 1 without ending") == 1
        facts = json.loads((output / "graph.json").read_text())
        assert facts["classes"] == ["unlabelled"] and {image["label"] for image in facts["images"]} == {0}
        assert len(facts["images"]) == count and (output / "overview.png").exists()


def test_with_class_folders_to_validate_accuracy_is_measured(run: Run, teacher: Path, tmp_path: Path) -> None:
    plain(tmp_path / "data" / "train", FLAT)
    write_images(tmp_path / "data" / "val", {"red": 8, "green": 8, "blue": 8}, seed=1)
    result = distill(run, teacher, tmp_path / "data", tmp_path / "run", "--epochs", 10, "--mixup", 0.2, "--lr", 0.05)
    assert result.code == 0, result.err
    assert "teacher cifar_resnet14_x0_5: top-1" in result.err
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["top1"] > 60, "chance is 33"
    assert json.loads(run("eval", tmp_path / "run", "--json", "--workers", 0).out)["images"] == 24


def test_where_an_image_lies_changes_nothing(run: Run, teacher: Path, tmp_path: Path) -> None:
    """The same images under other folder names, also under those of other classes: bit for bit the same student."""
    layouts = [FLAT, {"red": "green", "green": "blue", "blue": "red"}, {"red": "x", "green": "x", "blue": "x"}]
    weights = []
    for number, folders in enumerate(layouts):
        plain(tmp_path / str(number) / "train", folders)
        plain(tmp_path / str(number) / "val", dict.fromkeys(folders, "."), seed=1, count=8)
        output = tmp_path / f"run-{number}"
        result = distill(run, teacher, tmp_path / str(number), output, "--epochs", 1, "--cutmix", 1)
        assert result.code == 0, result.err
        weights.append(load_file(output / "last.safetensors"))
    for other in weights[1:]:
        assert all(torch.equal(weights[0][key], other[key]) for key in other)


def test_labels_of_other_sources_are_not_seen(run: Run, folder: Path) -> None:
    splits = open_splits(DataConfig(source="digits", labels=False))
    assert set(splits.train.labels()) == {UNLABELLED} == {splits.train.load(i)[1] for i in range(5)}
    assert set(splits.val.labels()) == set(range(10)) and splits.labelled


def test_terms_on_labels_cannot_be_asked(tmp_path: Path) -> None:
    config = load_config(flags={"data.labels": False, "method": "irg"})
    assert config.losses.weights()["ce"] == 0 and load_config().losses.weights()["ce"] == 1
    student = Output(torch.zeros(2, 3), {})
    with pytest.raises(AssertionError, match="asked for labels"):
        build_loss(load_config(flags={"method": "none"}).losses, None)(Batch(student, None, student))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--method", "none"), "method 'none' learns from labels alone; --method kd, irg"),
        (("--method", "dkd"), "losses.dkd need labels"),
        (("--method", "rocket"), "losses.rocket need labels"),
        (("--set", "losses.ce.weight=1", "--set", "losses.dkd.weight=1"), "losses.ce, losses.dkd need labels"),
        (("--set", "losses.kd.fade=0.2,0.4"), "to the end; leave out losses.kd.fade"),
        (("--method", "irg", "--set", "losses.logits.fade=0,1"), "to the end; leave out losses.logits.fade"),
        (("--balanced",), "--balanced need labels"),
        (("--label-smoothing", 0.1), "--label-smoothing need labels"),
        (("--set", "losses.ce.class_weights=balanced"), "losses.ce.class_weights need labels"),
        (("--set", "data.train_images=9"), "data.train_images need labels"),
        (("--set", "data.val_split=held"), "to hold out a part, give --val-fraction 0.1"),
    ],
)
def test_what_needs_labels_is_refused_in_one_line(
    run: Run, teacher: Path, tmp_path: Path, options: tuple[object, ...], message: str
) -> None:
    result = distill(run, teacher, plain(tmp_path / "data", FLAT), tmp_path / "run", *options)
    assert result.code == 2 and result.err.count("\n") == 1 and message in result.err, result.err
    assert not (tmp_path / "run").exists()


def test_validation_folders_must_be_the_teachers_classes(tmp_path: Path) -> None:
    plain(tmp_path / "train", FLAT)
    write_images(tmp_path / "val", {"red": 1, "green": 1, "pink": 1})
    config = DataConfig(source=str(tmp_path), labels=False)
    with pytest.raises(UserError, match=r"are not the teacher's 3 classes .* put the images into"):
        open_splits(config, classes=CLASSES)
    assert open_splits(config, classes=3).classes == ["0", "1", "2"], "a teacher that does not name its classes"
    (tmp_path / "val" / "more.png").write_bytes((tmp_path / "val" / "red" / "000.png").read_bytes())
    assert not open_splits(config, classes=CLASSES).labelled
    with pytest.raises(UserError, match="no images in"):
        (tmp_path / "empty" / "train").mkdir(parents=True)
        open_splits(DataConfig(source=str(tmp_path / "empty"), labels=False, val_fraction=0.1), classes=3)


def test_a_teacher_without_class_names_gives_numbers(run: Run, teacher: Path, tmp_path: Path) -> None:
    save_file(load_file(teacher / "best.safetensors"), tmp_path / "foreign.safetensors")
    data = plain(tmp_path / "data", FLAT)
    options = ("--teacher", "cifar_resnet14_x0_5", "--epochs", 1, "--val-fraction", 0.25, "--teacher-input-size", 16)
    result = distill(run, tmp_path / "foreign.safetensors", data, tmp_path / "run", *options)
    assert result.code == 0, result.err
    metadata = read_metadata(tmp_path / "run" / "last.safetensors")
    assert metadata is not None and metadata["classes"] == ["0", "1", "2"]
    assert run("eval", tmp_path / "run", "--against", teacher, "--workers", 0).code == 0


def test_such_a_run_goes_on_and_compare_refuses_none(run: Run, teacher: Path, tmp_path: Path) -> None:
    from irgdistill.training.trainer import Trainer

    data = plain(tmp_path / "data", FLAT)
    options = ("--epochs", 2, "--val-fraction", 0.25)
    assert distill(run, teacher, data, tmp_path / "whole", *options).code == 0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "end_epoch", lambda self, metrics: self.stop(15))
        assert distill(run, teacher, data, tmp_path / "parts", *options).code == 143
    resumed = run("distill", "--resume", tmp_path / "parts")
    assert resumed.code == 0 and "best agreement" in resumed.err, resumed.err
    a, b = (load_file(tmp_path / name / "best.safetensors") for name in ("whole", "parts"))
    assert all(torch.equal(a[key], b[key]) for key in a)
    student = ("--student", "cifar_resnet14_x0_5", "--data", data, "--teacher-checkpoint", teacher)
    refused = run("compare", *student, "--no-labels", "--output", tmp_path / "c")
    assert refused.code == 2 and "method 'none' learns from labels alone" in refused.err


@pytest.mark.parametrize(("count", "held_out"), [(2, 1), (6, 1), (19, 1), (40, 2)])
def test_a_plain_folder_holds_out_a_twentieth_by_itself(tmp_path: Path, count: int, held_out: int) -> None:
    """The share that a run remembers, given as `--val-fraction`, holds out the same images."""
    write_images(tmp_path, {"photos": count}, size=2)
    config = DataConfig(source=str(tmp_path / "photos"), labels=False)
    splits = open_splits(config, classes=CLASSES)
    assert len(splits.val_indices) == held_out and len(splits.train_indices) == count - held_out
    assert not splits.labelled and splits.default_fraction == max(0.05, 1 / count)
    again = open_splits(config.model_copy(update={"val_fraction": splits.default_fraction}), classes=CLASSES)
    assert again.val_indices == splits.val_indices and again.notes == []
    half = open_splits(config.model_copy(update={"val_fraction": 0.5}), classes=CLASSES)
    assert len(half.val_indices) == round(count / 2) and half.notes == []


def test_one_photo_is_too_few(tmp_path: Path) -> None:
    write_images(tmp_path, {"photos": 1}, size=2)
    with pytest.raises(UserError, match="holds one image: expected at least two"):
        open_splits(DataConfig(source=str(tmp_path), labels=False), classes=CLASSES)


def test_the_run_remembers_what_it_held_out(run: Run, teacher: Path, tmp_path: Path) -> None:
    from irgdistill.training.setup import prepare

    data = plain(tmp_path / "data", FLAT, count=14)
    shown = distill(run, teacher, data, tmp_path / "run", "--dry-run")
    assert shown.code == 0, shown.err
    assert shown.err.count("5 % of the images are held out for validation; --val-fraction sets another share\n") == 1
    assert "40 images of 3 classes to train on, 2 for validation\n" in shown.err
    assert "  val_fraction: 0.05\n" in shown.out
    (tmp_path / "config.yaml").write_text(shown.out)
    setup = prepare(validate_saved(read_yaml(tmp_path / "config.yaml")), resuming=True)
    assert setup.config.data.val_fraction == 0.05 and len(setup.splits.val_indices) == 2 and not setup.splits.notes
