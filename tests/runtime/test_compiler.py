"""Settings of `torch.compile`: private to torch, in force while a run trains, and the caller's again afterwards."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch
import torch._dynamo.config as dynamo
import torch._functorch.config as functorch
from torch import Tensor

from irgdistill.runtime import compiler, compiler_settings

SETTINGS = [(dynamo, name) for name in compiler.DYNAMO] + [(functorch, name) for name in compiler.FUNCTORCH]


@pytest.mark.parametrize(("module", "name"), SETTINGS)
def test_torch_has_the_setting(module: Any, name: str) -> None:
    """`compiler_settings` assumes these names; it skips one that torch has renamed, and its purpose is then unmet."""
    assert hasattr(module, name) and callable(module.patch)


def test_settings_are_in_force_inside_and_restored_afterwards() -> None:
    wanted = {**compiler.DYNAMO, **compiler.FUNCTORCH}
    before = {name: getattr(module, name) for module, name in SETTINGS}
    assert before != wanted
    with compiler_settings():
        assert {name: getattr(module, name) for module, name in SETTINGS} == wanted
    assert {name: getattr(module, name) for module, name in SETTINGS} == before
    with compiler_settings(wanted=False):
        assert {name: getattr(module, name) for module, name in SETTINGS} == before


def test_compiled_code_of_the_caller_is_kept() -> None:
    compiled: list[Any] = []

    def backend(graph: Any, _inputs: Any) -> Any:
        compiled.append(graph)
        return graph

    def double(x: Tensor) -> Tensor:
        return 2 * x

    function = torch.compile(double, backend=backend)
    function(torch.ones(2))
    with compiler_settings():
        pass
    function(torch.ones(2))
    assert len(compiled) == 1


def test_torch_alone_is_enough() -> None:
    """The configuration of functorch is a module that `import torch` does not load."""
    code = "from irgdistill.runtime.compiler import compiler_settings as settings\nwith settings(): pass"
    subprocess.run([sys.executable, "-c", code], check=True)
