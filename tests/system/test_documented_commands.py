"""Every command and Python example of README, docs and `--help` runs as it stands, in a folder that has what it names.

What is downloaded or large elsewhere is small here: `./imagenet` holds three classes of small images, `resnet50` and
the other pretrained names are small networks with weights of their own, epochs, seeds and views are cut to one.
"""

from __future__ import annotations

import re
import shlex
import shutil
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
from safetensors.torch import load_file, save_file
from support import Run, write_images
from timm.models import _registry
from timm.models.resnet import BasicBlock, _create_resnet

from irgdistill.cli.app import commands as command_line
from irgdistill.plugins import snapshot

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
FEWER = {
    "distill": ("--epochs", 1),
    "train": ("--epochs", 1),
    "compare": ("--epochs", 1, "--seeds", 1, "--jobs", 1),
    "cache-teacher": ("--views", 1),
    "inspect-graph": ("--images", 12),
}
ELSEWHERE = ("--gpus ", "--resume ")
"""Processes and resuming: commands/test_workers.py, system/test_interrupted.py."""
WEIGHTS = Path("earlier/runs/resnet50/last.safetensors")
ENCODER = "vit_small_patch16_dinov3"
STUDENTS = ("mobilenetv2_100", "mobilenetv3_small_100", "mobilenetv3_large_100", "resnet18")


def commands(page: Path) -> list[str]:
    """Those of a page in their order: consoles and indented lines."""
    text = re.sub(r"\\\n\s+", "", page.read_text(encoding="utf-8"))
    return [line for line in re.findall(r"^(?:    )?(irgdistill .*)$", text, re.M) if not line.endswith("…")]


HELP = {
    "help": [
        line
        for command in command_line().values()
        for line in command.epilog.split("\n\n")
        if line.startswith("irgdistill ")
    ]
}
PRESET = ("--set", "data.train_images=40", "--set", "data.views=1", "--batch-size", 16)


def first_of_each(flows: dict[str, list[str]]) -> dict[str, list[str]]:
    """The lines of each page that no page before it shows. Caches are made for every page that reads them."""
    seen: set[str] = set()
    found = {}
    for page, lines in flows.items():
        found[page] = [line for line in lines if line not in seen or " cache-teacher " in line]
        seen |= set(lines)
    return {page: lines for page, lines in found.items() if lines}


FLOWS = first_of_each({page.stem: lines for page in PAGES if (lines := commands(page))} | HELP)
EXAMPLES = {
    page.stem: found for page in PAGES if (found := re.findall(r"```python\n(.*?)```", page.read_text("utf-8"), re.S))
}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a user who has images, a teacher, and runs of an earlier day."""
    return tmp_path_factory.mktemp("user")


@pytest.fixture(autouse=True)
def small_networks(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Under the names of the documentation: four residual blocks, 64×64 pixels, three classes."""

    def builder(name: str) -> Callable[..., Any]:
        def build(pretrained: bool = False, **kwargs: Any) -> Any:
            kwargs = {"num_classes": 3, **kwargs}
            return _create_resnet(
                name, pretrained, block=BasicBlock, layers=(1,) * 4, channels=(8, 8, 16, 16), **kwargs
            )

        return build

    def encoder(pretrained: bool = False, **kwargs: Any) -> Any:
        return builder(ENCODER)(pretrained, **{"num_classes": 0, **kwargs})

    bare = replace(_registry._model_pretrained_cfgs["resnet50"], url="", hf_hub_id=None, num_classes=0)
    bare = replace(bare, input_size=(3, 64, 64), test_input_size=None, pool_size=(2, 2), architecture=ENCODER)
    bare = replace(bare, file=str(place / "earlier/encoder.safetensors"), tag="lvd1689m")
    for name in (ENCODER, f"{ENCODER}.lvd1689m"):
        monkeypatch.setitem(_registry._model_pretrained_cfgs, name, bare)
    monkeypatch.setitem(_registry._model_entrypoints, ENCODER, encoder)
    for name in ("resnet50", *STUDENTS):
        real = _registry._model_pretrained_cfgs["resnet50"]
        small = replace(real, url="", hf_hub_id=None, input_size=(3, 64, 64), test_input_size=None, num_classes=3)
        small = replace(small, file=str(place / WEIGHTS), pool_size=(2, 2), architecture=name)
        monkeypatch.setitem(_registry._model_pretrained_cfgs, name, small)
        monkeypatch.setitem(_registry._model_entrypoints, name, builder(name))


class Hub:
    """`HfApi` without a network."""

    def __init__(self, **_: Any) -> None: ...

    def create_repo(self, repo_id: str, exist_ok: bool) -> SimpleNamespace:
        return SimpleNamespace(repo_id=repo_id)

    def file_exists(self, repo_id: str, filename: str) -> bool:
        return False

    def upload_folder(self, **options: Any) -> None:
        assert (Path(options["folder_path"]) / "model.safetensors").exists()


def furnish(place: Path, run: Run) -> None:
    """Images, weights, and under `earlier` the runs that a page may name."""
    colours = ("red", "green", "blue")
    for data in ("imagenet", "flowers"):
        write_images(place / data / "train", dict.fromkeys(colours, 88))
        write_images(place / data / "val", dict.fromkeys(colours, 8), seed=1)
    write_images(place / "photos", {"album": 140})
    (place / "my_nets.py").write_text(EXAMPLES["choosing"][0])
    tens = [f"class{i}" for i in range(10)]
    write_images(place / "cifar10" / "train", dict.fromkeys(tens, 13), size=32)
    write_images(place / "cifar10" / "val", dict.fromkeys(tens, 4), size=32, seed=1)

    def made(name: str, *arguments: object) -> Path:
        result = run("distill", "--epochs", 1, *arguments, "--output", f"earlier/runs/{name}")
        assert result.code == 0, result.err
        return place / "earlier" / "runs" / name / "last.safetensors"

    alone = ("--method", "none", "--batch-size", 12, "--lr", 0.05, "--workers", 0)
    assert made("resnet50", *alone, "--data", "imagenet", "--student", "resnet50") == place / WEIGHTS
    body = {name: value for name, value in load_file(place / WEIGHTS).items() if not name.startswith("fc.")}
    save_file(body, place / "earlier/encoder.safetensors")
    pair = ("--data", "imagenet", "--teacher", "resnet50", "--student", "mobilenetv2_100")
    made("mobilenetv2_100-1", *pair, "--lr", 0.01)
    small = ("--epochs", 4, "--data", "cifar10", "--input-size", 16)
    for run_of, name in (("none", "cifar_resnet20"), ("deep", "cifar_resnet56")):
        cifar = made(run_of, *alone, *small, "--student", name)
        shutil.copy(cifar, place / f"{name}.safetensors")
    taught = ("--teacher-checkpoint", "cifar_resnet20.safetensors", "--student", "cifar_resnet20_x0_5")
    made("irg-kd", "--data", "cifar10", *taught, "--input-size", 16)
    digits = ("--preset", "quickstart", "--student", "cifar_resnet14_x0_5")
    made("readme/teacher", *digits, "--method", "none")
    made("readme/student", *digits, "--teacher-checkpoint", "earlier/runs/readme/teacher")


def arguments_of(line: str) -> tuple[str, list[object]]:
    """The command as it stands there, and what makes it small."""
    _, name, *arguments = shlex.split(line.partition(" > ")[0])
    fewer: list[object] = [] if "--plan-only" in line else [*FEWER.get(name, ())]
    fewer += ("--lr", 0.01) if name in ("distill", "compare") and "--preset" not in line else ()
    fewer += PRESET if "--preset cifar10-" in line else ()
    fewer += ("--logits", 2) if "--logits" in line else ()
    return name, [*arguments, *fewer]


def bring(arguments: list[object], earlier: Path) -> None:
    """Runs that the command reads and no command of this page made."""
    for before, argument in pairwise(["", *map(str, arguments)]):
        source = earlier / argument
        if argument.startswith("runs/") and before != "--output" and source.exists() and not Path(argument).exists():
            folder = Path(*Path(argument).parts[: 3 if "readme" in argument else 2])
            shutil.copytree(earlier / folder, folder)


@pytest.mark.slow
@pytest.mark.parametrize("page", FLOWS | EXAMPLES)
def test_every_command_runs(
    page: str,
    run: Run,
    place: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    request: pytest.FixtureRequest,
) -> None:
    """Figures are drawn for the README alone."""
    request.addfinalizer(snapshot())
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setattr(huggingface_hub, "HfApi", Hub)
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: "hf_x")
    if page != "README":
        request.getfixturevalue("no_figures")
    for name, seconds in (("STEP_SECONDS", 0.05), ("LOADER_SECONDS", 0.5)):
        monkeypatch.setattr(f"irgdistill.commands.doctor.trial.{name}", seconds)
    if not (place / "imagenet").exists():
        monkeypatch.chdir(place)
        furnish(place, run)
    shutil.copytree(place, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    ran = 0
    for line in FLOWS.get(page, ()):
        if not any(option in line for option in ELSEWHERE):
            name, arguments = arguments_of(line)
            bring(arguments, tmp_path / "earlier")
            result = run(name, *arguments)
            assert result.code == 0, f"{line}\n{result.err}"
            ran += 1
    for code in EXAMPLES.get(page, ()):
        bring(re.findall(r"[\"'](runs/.*?)[\"']", code), tmp_path / "earlier")
        exec(compile(code.replace("num_classes=1000", "num_classes=3"), page, "exec"), {})
        ran += 1
    assert ran or page == "gpus"
