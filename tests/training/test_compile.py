"""`--compile` through the command line, traced and differentiated ahead of time but run without a C++ compiler."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from support import Run
from torch._dynamo.utils import counters

NAME = "cifar_resnet14_x0_5"


def trained(output: Path) -> list[dict[str, Any]]:
    records = map(json.loads, (output / "metrics.jsonl").read_text().splitlines())
    return [record for record in records if record["kind"] == "train"]


def losses(output: Path) -> list[float]:
    return [record["loss"] for record in trained(output)]


@pytest.mark.slow
def test_compiled_runs_are_those_of_eager_ones(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also after a run of the same network without taps, whose code would lack them."""
    compiled: list[Any] = []

    def without_compiler(what: Any, compile_: Callable[..., Any] = torch.compile, **_: Any) -> Any:
        compiled.append(what)
        return compile_(what, backend="aot_eager")

    graphs: list[Any] = []
    own = torch.compile(lambda x: 2 * x, backend=lambda graph, _: graphs.append(graph) or graph)
    own(torch.ones(2))
    limit = torch._dynamo.config.recompile_limit
    monkeypatch.setattr(torch, "compile", without_compiler)
    torch.manual_seed(1)
    save_file(timm.create_model(NAME, num_classes=10).state_dict(), tmp_path / "teacher.safetensors")
    options = ("--preset", "quickstart", "--student", NAME, "--epochs", 1, "--batch-size", 64, "--seed", 3)
    options += (
        "--method",
        "irg+kd+at",
        "--opt",
        "adamw",
        "--lr",
        0.001,
        "--set",
        "runtime.log_every=1",
        "--set",
        "runtime.gradient_shares_every=3",
        "--set",
        "data.train_images=256",
    )
    taught = ("--teacher", NAME, "--teacher-checkpoint", tmp_path / "teacher.safetensors", "--skip-teacher-check")
    runs = {"alone": ("--method", "none", "--compile"), "compiled": (*taught, "--compile"), "eager": taught}
    counters.clear()
    for name, more in runs.items():
        result = run("distill", *options, *more, "--output", tmp_path / name)
        assert result.code == 0, result.err
    assert len(compiled) == 5 and not counters["graph_break"]  # each run's loss and networks
    terms = [set(record["terms"]) for record in trained(tmp_path / "compiled")]
    assert terms[0] - terms[-1] == {"attention"}, "it fades out on the way, and is then left out"
    assert losses(tmp_path / "compiled") == pytest.approx(losses(tmp_path / "eager"), rel=1e-3)
    weights = load_file(tmp_path / "compiled" / "last.safetensors")
    assert set(weights) == set(timm.create_model(NAME).state_dict())
    top1 = [json.loads(run("eval", tmp_path / name, "--json").out)["top1"] for name in ("compiled", "eager")]
    assert top1[0] == pytest.approx(top1[1], abs=1)
    own(torch.ones(2))
    assert len(graphs) == 1, "compiled code of the caller is kept"
    assert torch._dynamo.config.recompile_limit == limit and torch._dynamo.config.skip_nnmodule_hook_guards
