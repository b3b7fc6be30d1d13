"""Presets, precedence, validation."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import get_args

import pytest
import yaml
from pydantic import BaseModel

from irgdistill.config.explain import keys
from irgdistill.config.loading import dump, load_config, presets, validate
from irgdistill.config.schema import Config
from irgdistill.errors import UserError

ROOT = Path(__file__).resolve().parents[2]


def test_every_preset_file_is_found_and_loads() -> None:
    assert set(presets()) == {path.stem for path in (ROOT / "presets").rglob("*.yaml")}
    assert {
        "quickstart",
        "cifar10-paper",
        "cifar100-paper",
        "cifar100-coarse-paper",
        "imagenet-paper",
        "imagenet-modern",
    } <= set(presets())


@pytest.mark.parametrize("name", presets())
def test_presets_are_valid(name: str) -> None:
    config = load_config(name)
    assert config.uses_teacher
    assert validate(yaml.safe_load(dump(config))) == config


def test_the_paper_preset_states_the_authors_weights() -> None:
    """0.005 on Σ(a-b)²/(2N) at B = 64: 0.16 of a mean, half of that for the edge gradient, three stages in one mean."""
    weights = load_config("cifar10-paper").losses.weights()
    assert weights["edges"] == pytest.approx(0.005 * 64 / 2 / 2)
    assert weights["transform"] == pytest.approx(0.005 * 64 / 2 * 3)
    assert "0.005" in presets()["cifar10-paper"].read_text()


@pytest.mark.parametrize(
    ("data", "source"),
    [("cifar10", "torch/cifar10"), ("cifar100", "torch/cifar100"), ("cifar100-coarse", "torch/cifar100-coarse")],
)
def test_the_four_pairs_of_the_paper_differ_in_their_networks_only(data: str, source: str) -> None:
    trees = []
    pairs = {
        "": ("cifar_resnet20", "cifar_resnet20_x0_5"),
        "-resnet14_x0_5": ("cifar_resnet20", "cifar_resnet14_x0_5"),
        "-resnet20_x0_375": ("cifar_resnet20", "cifar_resnet20_x0_375"),
        "-shufflenet": ("cifar_shufflenet_x0_5", "cifar_resnet20_x0_5"),
    }
    for suffix, (teacher, student) in pairs.items():
        config = load_config(f"{data}-paper{suffix}")
        assert (config.teacher.name, config.student.name, config.data.source) == (teacher, student, source)
        trees.append(config.model_copy(update={"teacher": None, "student": None}).model_dump(warnings=False))
    assert trees[0] == trees[1] == trees[2] == trees[3]


def test_a_preset_may_extend_another(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("extends: cifar10-paper\nschedule: {epochs: 3}\nlosses: {edges: {blocks: 2}}\n")
    config, base = load_config(str(file)), load_config("cifar10-paper")
    assert config.schedule.epochs == 3 and config.schedule.milestones == base.schedule.milestones
    assert config.losses.edges.blocks == 2 and config.losses.edges.weight == base.losses.edges.weight
    for wrong, message in (("cifar10-papr", "did you mean cifar10-paper"), ("[1]", "known: ")):
        file.write_text(f"extends: {wrong}\n")
        with pytest.raises(UserError, match=message):
            load_config(str(file))


def test_later_wins_preset_then_set_then_flag(tmp_path: Path) -> None:
    preset = tmp_path / "mine.yaml"
    preset.write_text("seed: 1\nschedule: {epochs: 1, min_lr: 0.001}\noptim: {lr: 1.0}\n")
    config = load_config(str(preset), ["schedule.epochs=2", "optim.lr=2"], {"optim.lr": 3.0})
    assert (config.seed, config.schedule.epochs, config.optim.lr, config.schedule.min_lr) == (1, 2, 3.0, 0.001)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("losses.kd.temprature=2", "unknown key 'losses.kd.temprature'; did you mean losses.kd.temperature"),
        ("schedule.epoch=2", "did you mean schedule.epochs"),
        ("optim.lr.x=2", "optim.lr = {'x': 2}"),
        ("optim.lr=fast", "optim.lr = 'fast'"),
        ("optim.lr=-1", "greater than 0"),
        ("method=irgkd", "; did you mean irg+kd"),
        ("data.val_fraction=1.5", "data.val_fraction = 1.5"),
        ("losses.edges.weight=.nan", "finite"),
        ("losses.kd.fade=[0.6, 0.3]", "losses.kd.fade = [0.6, 0.3]: the weight changes from the first share"),
        ("losses.kd.fade=0.1,1.5", "losses.kd.fade = '1.5': expected a value less than or equal to 1"),
        ("student.input_size=abc", "student.input_size = 'abc': expected pixels, such as 224 or 256x192"),
        ("schedule.epochs=ten", "schedule.epochs = 'ten': expected a whole number"),
        ("losses.ce.class_weights=even", "expected 'balanced' or 'none', or expected a list"),
        ("augment.scale=[0.5]", "augment.scale = [0.5]: expected two values"),
        ("student.preprocessing.mean=[0.5, 0.5]", "mean = [0.5, 0.5]: expected one number, or three: R,G,B"),
        ("teacher.preprocessing.mean=124", "teacher.preprocessing.mean = 124: expected a value less than"),
        ("teacher.preprocessing.std=0", "teacher.preprocessing.std = 0: expected a value greater than 0"),
        ("noequals", "expected key.path=value"),
    ],
)
def test_bad_settings_are_named(setting: str, message: str) -> None:
    with pytest.raises(UserError) as error:
        load_config(settings=[setting])
    assert message in str(error.value) and "\n" not in str(error.value)


def test_unknown_preset_gets_the_nearest() -> None:
    with pytest.raises(UserError, match=r"no preset 'cifar10-papr'; did you mean cifar10-paper"):
        load_config("cifar10-papr")


def test_broken_preset_file(tmp_path: Path) -> None:
    bad = tmp_path / "bad.yaml"
    bad.write_text("a: [1")
    with pytest.raises(UserError, match="not valid YAML"):
        load_config(str(bad))
    bad.write_text("- 1\n")
    with pytest.raises(UserError, match="must hold a mapping"):
        load_config(str(bad))


@pytest.mark.parametrize("given", [224, "224", "224x224", [224, 224]])
def test_sizes(given: object) -> None:
    assert load_config(flags={"student.input_size": given}).student.input_size == (224, 224)


def fields(section: type[BaseModel]) -> Iterator[tuple[str, str | None]]:
    """Every setting below a section, and what is said of it."""
    for name, field in section.model_fields.items():
        parts = [part for part in (field.annotation, *get_args(field.annotation)) if isinstance(part, type)]
        below = [part for part in parts if issubclass(part, BaseModel)]
        for part in below:
            yield from ((f"{name}.{key}", text) for key, text in fields(part))
        if not below:
            yield name, field.description


def test_every_setting_is_explained() -> None:
    texts = dict(fields(Config))
    assert {"losses.kd.temperature", "student.preprocessing.std"} <= texts.keys()
    assert not [name for name, text in texts.items() if not text]
    assert len(set(keys())) == len(list(keys()))
