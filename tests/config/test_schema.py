"""The schema: settings do not change after validation."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from irgdistill.config import Config, load_config


@pytest.mark.parametrize("path", ["optim.lr", "runtime.device", "losses.kd.weight", "student.name", "data.source"])
def test_settings_cannot_be_assigned(path: str) -> None:
    section: object = load_config()
    *names, last = path.split(".")
    for name in names:
        section = getattr(section, name)
    with pytest.raises(ValidationError, match="frozen"):
        setattr(section, last, getattr(section, last))


def test_a_changed_copy_leaves_the_original_alone() -> None:
    config = load_config(flags={"optim.lr": 0.5})
    changed = config.replaced({"optim.lr": 1.0, "optim.momentum": 0.0, "seed": 3, "teacher.name": "resnet18"})
    assert (changed.optim.lr, changed.optim.momentum, changed.seed, changed.teacher.name) == (1.0, 0.0, 3, "resnet18")
    assert config == load_config(flags={"optim.lr": 0.5})
    assert changed.losses is config.losses


def test_a_section_that_is_replaced_can_be_changed_further() -> None:
    own = load_config(flags={"teacher.name": "resnet50", "teacher.input_size": 64}).teacher
    teacher = Config().replaced({"teacher": own, "teacher.name": "resnet18"}).teacher
    assert (teacher.name, teacher.input_size) == ("resnet18", (64, 64))
