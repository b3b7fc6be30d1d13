"""Terms declare themselves: a new one is one file, and the documentation lists all that are registered."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import irgdistill
from irgdistill.config.losses import LossesConfig
from irgdistill.config.methods import METHODS, STAGE_KINDS, TERMS
from irgdistill.errors import UserError
from irgdistill.plugins import Registry

PACKAGE = Path(irgdistill.__file__).parent

NEW = '''"""A term for a test."""

from __future__ import annotations

from typing import TYPE_CHECKING

from irgdistill.lazy import lazy
from irgdistill.losses.base import Batch, Term, term

if TYPE_CHECKING:
    import torch.nn.functional as F
    from torch import Tensor
else:
    F = lazy("torch.nn.functional")


@term("absolute", weight=0.4, compares="logits")
class Absolute(Term):
    """Mean absolute difference of the logits."""

    def __call__(self, batch: Batch) -> Tensor:
        return F.l1_loss(batch.student.logits, batch.teacher.logits)
'''


def test_a_new_term_of_the_package_is_one_new_file(tmp_path: Path) -> None:
    shutil.copytree(PACKAGE, tmp_path / "irgdistill", ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "irgdistill/losses/terms/absolute.py").write_text(NEW)
    code = (
        "import sys, irgdistill\n"
        "from irgdistill.cli.completion import complete_method\n"
        "from irgdistill.config import keys, load_config\n"
        "config = load_config(settings=['losses.absolute.fade=0.5,1'], flags={'method': 'absolute'})\n"
        "assert irgdistill.__file__.startswith(sys.argv[1]) and 'losses.absolute.weight' in keys()\n"
        "assert config.losses.weights()['absolute'] == 0.4 and config.uses_teacher\n"
        "assert not {'torch', 'timm', 'pydantic.v1'} & set(sys.modules)\n"
        "import irgdistill.models, timm, torch\n"
        "networks = [timm.create_model('cifar_resnet14_x0_5', num_classes=3) for _ in range(2)]\n"
        "distiller = irgdistill.Distiller(*networks, method='absolute')\n"
        "loss, terms = distiller(torch.randn(4, 3, 16, 16), torch.arange(4) % 3)\n"
        "assert set(terms) == {'ce', 'absolute'} and terms['absolute'] > 0\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    command = [sys.executable, "-c", code, str(tmp_path)]
    result = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert result.returncode == 0, result.stderr


def test_the_section_has_a_field_with_a_description_for_each_term() -> None:
    """Assumes that pydantic builds a model anew from `model_fields` in `model_rebuild(force=True)`."""
    assert list(LossesConfig.model_fields) == list(TERMS)
    for name, field in LossesConfig.model_fields.items():
        assert field.description == TERMS[name].summary and field.description.endswith(".")
    with pytest.raises(ValueError, match="nothing"):
        LossesConfig.model_validate({"nothing": {}})


def test_terms_and_methods_keep_their_order() -> None:
    rivals = "dkd fitnet at fsp rocket rkd sp pkt positions dist wttm reviewkd srd crd vrm crld embedding"
    terms = f"ce kd logits edges transform attention {rivals}"
    methods = f"auto none kd irg mtk irg+kd kd+at irg+kd+at relations encoder logits {rivals}"
    assert list(TERMS) == terms.split() and list(METHODS) == methods.split()


def test_methods_consist_of_registered_hints() -> None:
    for name, method in METHODS.items():
        assert {*method.weights, *method.fades} <= set(TERMS) - {"ce"}, name
    assert [name for name, spec in TERMS.items() if spec.weight is not None and name not in METHODS] == []


def test_a_registry_names_what_is_near() -> None:
    with pytest.raises(UserError, match=r"unknown method 'irgkd'; did you mean irg\+kd"):
        METHODS.find("irgkd")
    registry: Registry[int] = Registry("number", "irgdistill.losses.terms")
    registry.add("last", 3)
    registry.add("first", 1, place=0)
    assert list(registry) == ["first", "last"] and registry.find("last") == 3
    with pytest.raises(UserError, match="number 'last' is already registered"):
        registry.add("last", 4)


def test_the_documentation_lists_every_term_and_method() -> None:
    text = (PACKAGE.parent / "docs/methods.md").read_text(encoding="utf-8")
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("|")]
    terms = {row[0].strip("`"): row for row in rows if row[0].strip("`") in TERMS and len(row) == 5}
    assert list(terms) == list(TERMS)
    for name, spec in TERMS.items():
        _, compares, weight, summary, source = terms[name]
        assert set(re.findall(r"\w+", compares)) == spec.compares, name
        assert weight == ("–" if spec.weight is None else f"{spec.weight:g}") and summary == spec.summary
        assert source == (spec.source or "–")
        assert not spec.compares & set(STAGE_KINDS) or "matched stages" in text
    methods = {row[0].strip("`"): row for row in rows if row[0].strip("`") in METHODS and len(row) == 2}
    assert list(methods) == [name for name in METHODS if name not in TERMS or TERMS[name].weight is None]
    for name, row in methods.items():
        found = {term: float(value) for term, value in re.findall(r"`(\w+)` ([\d.]+)", row[1])}
        assert found == dict(METHODS[name].weights), name
