"""The default recipe fits the student, and gives way to what is given."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from support import SMALL, Run, interrupted, position
from torch import nn

from irgdistill.config.loading import load_config, read_yaml
from irgdistill.training.recipe import needs_adamw, with_recipe
from irgdistill.training.state import changes


@pytest.mark.parametrize(
    ("name", "adaptive"),
    [
        ("vit_tiny_patch16_224", True),
        ("aimv2_large_patch14_224", True),  # RMS norms alone
        ("mixer_s32_224", True),
        ("convnext_atto", True),
        ("poolformer_s12", True),  # group norms of one group
        ("xcit_nano_12_p16_224", True),  # some batch norms
        ("resnet18", False),
        ("mobilenetv3_small_050", False),
        ("levit_128s", True),  # attention and batch norms alone
        ("mobilevit_xxs", True),  # more batch norms than layer norms
        ("skresnet18", False),  # weighs channels by what timm calls `SelectiveKernelAttn`
        ("resnetv2_50x1_bit", False),  # group norms
        ("vgg11", False),  # no norms
    ],
)
def test_networks_are_told_by_their_layers(name: str, adaptive: bool) -> None:
    with torch.device("meta"):
        assert needs_adamw(timm.create_model(name)) == adaptive


LAYERED, BATCHED = nn.LayerNorm(4), nn.BatchNorm2d(4)


def recipe(model: nn.Module, **flags: Any) -> tuple[tuple[str, float, float, float], str]:
    """Optimizer, rate, decay and warm-up of a network, and the line for the log."""
    config, line = with_recipe(load_config(flags={"data.batch_size": 128, "schedule.epochs": 20, **flags}), model)
    assert not config.left_open - {"runtime.amp"} and with_recipe(config, model) == (config, ""), "chosen once"
    optim, warmup = config.optim, config.schedule.warmup_epochs
    assert optim.lr is not None and optim.weight_decay is not None and warmup is not None
    return (optim.name, optim.lr, optim.weight_decay, warmup), line


def test_the_optimizer_fits_the_network_and_the_rest_the_optimizer() -> None:
    values, line = recipe(LAYERED)
    assert values == ("adamw", 2.5e-4, 0.05, 2.0)
    assert line.startswith(
        "recipe: adamw, learning rate 0.00025, weight decay 0.05, 2 epochs of warm-up, for a network"
    )
    assert "(--opt sgd for the other recipe)" in line
    values, line = recipe(BATCHED)
    assert values == ("sgd", 0.1, 5e-4, 0.0) and "--opt adamw" in line
    assert recipe(LAYERED, **{"optim.name": "sgd"})[0] == ("sgd", 0.1, 5e-4, 0.0)
    assert recipe(BATCHED, **{"optim.name": "lamb"})[0] == ("lamb", 2.5e-4, 0.05, 2.0)
    assert recipe(LAYERED, **{"optim.accumulate": 4, "schedule.epochs": 300})[0] == ("adamw", 5e-4, 0.05, 5.0)


def test_what_is_given_stays() -> None:
    given = {"optim.lr": 0.01, "optim.weight_decay": 0.0, "schedule.warmup_epochs": 0}
    values, line = recipe(LAYERED, **given)
    assert values == ("adamw", 0.01, 0.0, 0.0) and "adamw, learning rate 0.01" in line
    values, line = recipe(LAYERED, **given, **{"optim.name": "momentum"})
    assert values == ("momentum", 0.01, 0.0, 0.0) and line == "", "nothing was chosen"


def test_settings_left_open_differ_from_no_choice() -> None:
    asked = load_config()
    chosen, _ = with_recipe(asked, LAYERED)
    assert not changes(asked, chosen) and not changes(chosen, asked)
    assert changes(load_config(flags={"optim.lr": 0.1}), chosen) == ["optim.lr = 0.1, was 0.00025"]
    assert len(changes(with_recipe(asked, BATCHED)[0], chosen)) == 4


VIT = ("--set", "student.args={depth: 2, embed_dim: 32, num_heads: 2, patch_size: 4}")


def test_a_run_records_its_recipe_and_resumes_with_it(run: Run, folder: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    words = ("train", "--model", "vit_tiny_patch16_224", "--data", folder, *SMALL, *VIT, "--epochs", 2)
    with interrupted(lambda trainer: position(trainer) == 1):
        stopped = run(*words, "--output", output)
    assert stopped.code == 130 and stopped.err.count("recipe: adamw") == 1, stopped.err
    before = read_yaml(output / "config.yaml")
    assert before["optim"]["name"] == "adamw" and before["optim"]["lr"] == pytest.approx(5e-4 * (24 / 512) ** 0.5, 0.01)
    assert before["schedule"]["warmup_epochs"] == 0.2
    resumed = run("train", "--resume", output)
    assert resumed.code == 0 and "recipe:" not in resumed.err, resumed.err
    assert read_yaml(output / "config.yaml") == before


def test_a_comparison_goes_on_with_the_recipe_that_it_chose(run: Run, folder: Path, tmp_path: Path) -> None:
    output = tmp_path / "runs"
    words = ("--student", "vit_tiny_patch16_224", "--data", folder, *SMALL, *VIT, "--epochs", 1, "--output", output)
    first = run("compare", "--methods", "none", "--seeds", 1, *words)
    assert first.code == 0 and "recipe: adamw" in first.err, first.err
    assert run("compare", "--methods", "none", "--seeds", 2, *words).code == 0
    path = output / "none" / "3" / "config.yaml"
    path.write_text(re.sub("name: adamw", "name: sgd", path.read_text()))
    other = run("compare", "--methods", "none", "--seeds", 3, *words)
    assert other.code == 2 and "other settings (optim.name = adamw, was sgd)" in other.err, other.err
