"""`auto` is the precision that a device is fast in, and bf16 without units for it is reported."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from support import SMALL, Run

from irgdistill.config import dump
from irgdistill.config.loading import load_config
from irgdistill.runtime import precision
from irgdistill.runtime.precision import (
    autocast,
    bf16_speed,
    compare_precisions,
    instructions,
    resolve_precision,
    slow_precision,
)
from irgdistill.training.precision import precision_of
from irgdistill.training.setup import prepare

CPU, GPU = torch.device("cpu"), torch.device("cuda", 1)
AVX2, AVX512, AMX, ARM = (
    *("flags\t\t: fpu avx2 f16c", "flags: fpu avx2 avx512f avx512_bf16"),
    *("flags: avx2 avx512f avx512_bf16 amx_tile amx_bf16", "Features\t: fp asimd bf16 i8mm"),
)


@pytest.fixture
def cpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Any]:
    """`cpu(flags, speed)`: a processor that lists these instructions and is `speed` times as fast in bf16."""

    def become(flags: str | None, speed: float | None = None) -> None:
        path = tmp_path / "cpuinfo"
        if flags is not None:
            path.write_text(f"processor\t: 0\n{flags}\n\nprocessor\t: 1\n{flags}\n")
        monkeypatch.setattr(precision, "CPUINFO", path)

        def measured(*_: object) -> float:
            assert speed is not None, "nothing to be measured"
            return speed

        for name in ("bf16_speed", "compare_precisions"):
            monkeypatch.setattr(precision, name, measured)

    monkeypatch.delenv("ONEDNN_MAX_CPU_ISA", raising=False)
    yield become


@pytest.mark.parametrize(
    ("flags", "speed", "expected"),
    [
        (AVX2, None, "none"),  # certain, so not measured
        (AMX, 2.5, "bf16"),
        (AMX, 0.7, "none"),
        (AVX512, 1.6, "bf16"),
        (AVX512, 1.05, "none"),  # a tie
        (AVX512, 0.7, "none"),
        (ARM, 1.9, "bf16"),
        (None, 0.1, "none"),  # not Linux: measured
        (None, 2.0, "bf16"),
        ("model name : x", 0.1, "none"),
    ],
)
def test_auto_on_a_cpu(cpu: Any, flags: str | None, speed: float | None, expected: str) -> None:
    cpu(flags, speed)
    assert resolve_precision("auto", CPU) == expected
    assert [resolve_precision(amp, CPU) for amp in ("none", "bf16", "fp16")] == ["none", "bf16", "fp16"]
    with autocast("auto", CPU):
        assert torch.is_autocast_enabled("cpu") == (expected == "bf16")


def test_instructions_are_those_that_onednn_may_use(cpu: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    cpu(AVX512)
    assert instructions() == ["avx2", "avx512f", "avx512_bf16"]
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "avx512_core")
    assert instructions() == ["avx2", "avx512f"] and resolve_precision("auto", CPU) == "none"
    cpu(None)
    (precision.CPUINFO).unlink()
    assert instructions() is None


@pytest.mark.parametrize(("native", "expected"), [(True, "bf16"), (False, "fp16")])
def test_auto_on_a_gpu(monkeypatch: pytest.MonkeyPatch, native: bool, expected: str) -> None:
    asked: list[Any] = []
    monkeypatch.setattr(torch.cuda, "device", lambda device: asked.append(device) or nullcontext())

    def supported(including_emulation: bool = True) -> bool:
        return including_emulation or native

    monkeypatch.setattr(torch.cuda, "is_bf16_supported", supported)
    assert resolve_precision("auto", GPU) == expected and asked == [GPU]


def test_only_a_slow_bf16_is_reported(cpu: Any) -> None:
    cpu(AVX2, 0.08)
    text = slow_precision("bf16", CPU)
    assert text is not None and "a convolution takes 12.5 times as long as in float32; --amp auto" in text
    assert slow_precision("none", CPU) is slow_precision("auto", CPU) is slow_precision("bf16", GPU) is None
    cpu(None, 1.7)
    assert slow_precision("bf16", CPU) is None
    cpu(AVX512)
    assert slow_precision("bf16", CPU) is None


def test_the_measurement_touches_no_generator() -> None:
    bf16_speed.cache_clear()
    before = torch.get_rng_state()
    with torch.no_grad():
        assert 0 < bf16_speed() < 100
        assert 0 < compare_precisions(lambda: torch.rand(3)) < 100
    assert torch.equal(torch.get_rng_state(), before)


def test_a_measured_step_is_faster_in_one_precision() -> None:
    slow = lambda bf16: lambda: time.sleep(0.02 * (torch.is_autocast_enabled("cpu") == bf16))  # noqa: E731
    assert compare_precisions(slow(True)) < 0.5 and compare_precisions(slow(False)) > 2


@pytest.mark.parametrize(("enough", "times"), [(60, 5), (0, 1)])
def test_a_long_step_is_not_repeated(monkeypatch: pytest.MonkeyPatch, enough: float, times: int) -> None:
    monkeypatch.setattr(precision, "ENOUGH", enough)
    seen: list[bool] = []
    compare_precisions(lambda: seen.append(torch.is_autocast_enabled("cpu")))
    assert seen == [False, True] * times


def test_auto_measures_the_networks_of_the_run(cpu: Any, monkeypatch: pytest.MonkeyPatch, teacher: Path) -> None:
    """Once: student and teacher together, which stay as they were."""
    cpu(AVX512)
    seen: list[tuple[bool, bool]] = []

    def measured(step: Any) -> float:
        setup.student.model.register_forward_hook(lambda model, *_: seen.append((True, model.training)))
        setup.teachers[0].network.model.register_forward_hook(lambda model, *_: seen.append((False, model.training)))
        step()
        return 1.6

    monkeypatch.setattr(precision, "compare_precisions", measured)
    flags = {"teacher.checkpoint": teacher, "student.name": "cifar_resnet14_x0_5", "data.source": "digits"}
    setup = prepare(load_config(None, flags=flags))
    before = {name: value.clone() for name, value in setup.student.model.state_dict().items()}
    assert precision_of(setup, CPU) == "bf16" and seen == [(True, True), (False, False)]
    assert all(torch.equal(value, before[name]) for name, value in setup.student.model.state_dict().items())
    assert all(weight.grad is None for weight in setup.student.model.parameters())


def test_a_run_remembers_what_auto_was(cpu: Any, run: Run, folder: Path, tmp_path: Path) -> None:
    """Chosen once, kept when resumed where the choice would be another one, and named in the log."""
    options = ("--data", folder, "--method", "none", "--student", "cifar_resnet14_x0_5", *SMALL)
    cpu(AVX512, 1.6)
    result = run("distill", *options, "--epochs", 1, "--output", tmp_path / "run")
    assert result.code == 0 and "precision bf16, the fastest of cpu here (--amp auto)" in result.err
    assert yaml.safe_load((tmp_path / "run/config.yaml").read_text())["runtime"]["amp"] == "bf16"
    cpu(AVX2, 0.1)
    (tmp_path / "run/summary.json").unlink()
    again = run("distill", "--resume", tmp_path / "run")
    assert again.code == 0, again.err
    assert yaml.safe_load((tmp_path / "run/config.yaml").read_text())["runtime"]["amp"] == "bf16"
    assert "this CPU has no bf16 instructions, a convolution takes 10.0 times" in again.err
    result = run("distill", *options, "--epochs", 1, "--output", tmp_path / "other")
    assert result.code == 0 and "precision" not in result.err
    assert yaml.safe_load((tmp_path / "other/config.yaml").read_text())["runtime"]["amp"] == "none"


def test_runs_of_a_comparison_have_one_precision(
    cpu: Any, run: Run, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """That of the runs that are there already."""
    found: list[str] = []

    def train(run: Any, *_: Any) -> None:
        found.append(run.config.runtime.amp)
        run.folder.path.mkdir(parents=True, exist_ok=True)
        run.folder.config.write_text(dump(run.config))

    monkeypatch.setattr("irgdistill.commands.compare.run._train", train)
    monkeypatch.setattr("irgdistill.commands.compare.run.write_table", lambda *_: None)
    options = ("--data", folder, "--student", "cifar_resnet14_x0_5", "--methods", "none", *SMALL)
    for seeds, speed in ((1, 1.6), (2, 0.5)):
        cpu(AVX512, speed)
        result = run("compare", *options, "--seeds", seeds, "--output", tmp_path / "cmp")
        assert result.code == 0, result.err
    assert found == ["bf16"] * 3
