"""Values that no setting expects: each is refused in one line, whichever key it is given to."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import yaml
from support import Run

from irgdistill.config import dump, keys, load_config, read_yaml
from irgdistill.config.plain_yaml import load_yaml
from irgdistill.errors import UserError
from irgdistill.io import visible

HUGE = str(2**63)
EACH = int(os.environ.get("NASTY_VALUES", 3))
"""Values that each key is given, other ones for the next key."""


VALUES = (
    *("!!int z", "!!bool z", "!!timestamp z", "!!float z", "!!null z", "!!python/object:os.system x", "!!binary zz"),
    *("!!set {a, b}", "9" * 5000, HUGE, f"-{HUGE}", "1e999", ".nan", "-1", "0", "2001-01-01", "12:30:00"),
    *("[", "{a: b}", "{1: {2: 3}}", "[[1], [2]]", "[1, 2, 3]", "null", "''", "true", '"\\0"', '"\\ud800"', "&a [*a]"),
    *("hf-hub:", "hf-hub:..", "local-dir:", "../..", "\x1b[2J\n", "x" * 5000, "[" * 1000, '{"a\\0": 1}', "<<: 1"),
)


SECTIONS = ("data", "student", "losses", "losses.kd", "student.preprocessing", "student.args.x", "none", "seed.x", "")


@pytest.mark.parametrize("start", range(EACH))
def test_every_setting_takes_or_refuses_them_in_one_line(start: int) -> None:
    for number, key in enumerate([*keys(), *SECTIONS]):
        value = VALUES[(number + start * len(VALUES) // EACH) % len(VALUES)]
        try:
            config = load_config(settings=[f"{key}={value}"])
        except UserError as error:
            assert "\n" not in visible(error) and len(str(error)) < 700, key
        except OSError as error:  # of a plug-in's path
            assert key == "plugins" and error.strerror
        else:
            assert load_yaml(dump(config)) is not None


@pytest.mark.parametrize(
    "text", ["a: !!int z", "a: !!timestamp z", "a: !!set {b}", "a: " + "9" * 5000, "[" * 1000, "a: &a [*a]"]
)
def test_files_hold_plain_values_only(text: str, tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text(text)
    with pytest.raises(UserError, match=r"a\.yaml is not valid YAML"):
        read_yaml(tmp_path / "a.yaml")


def test_plain_values_are_read_as_yaml_does() -> None:
    text = "{a: [1, 0x1f, 1.5, .inf, true, null, 'x'], b: !!str 1, c: !!float 2, d: &e {f: 1}, g: *e, h: {<<: *e}}"
    assert load_yaml(text) == yaml.safe_load(text)
    assert load_yaml("2001-01-01") == "2001-01-01"


NETWORK_SETTINGS = {
    "student.name='hf-hub:'": "hf-hub:OWNER/NAME",
    "student.name=hf-hub:..": "hf-hub:OWNER/NAME",
    "student.args.features_only=1": "--taps-student",
    "student.args.pretrained_cfg=-1": "student.preprocessing",
    "student.args.num_classes=-1": "--data",
    "student.args.pretrained=1": "--student-pretrained",
    "student.args.pretrained_cfg_overlay=-1": "pretrained_cfg_overlay",
    "student.args.nonsense=-1": "nonsense",
    "student.args.block_size=-1": "block_size",
    "student.args.output_stride=-1": "output_stride",
    f"student.args.stem_width={HUGE}": "at most",
    f"student.input_size={HUGE}": "student.input_size",
    f"data.batch_size={HUGE}": "data.batch_size",
    f"data.views={HUGE}": "data.views",
    "student.args.base_width=[1]": "base_width",
    "student.args.global_pool=[1]": "global_pool",
}


@pytest.mark.parametrize(("setting", "named"), NETWORK_SETTINGS.items())
def test_networks_that_cannot_be_built(run: Run, folder: Path, setting: str, named: str) -> None:
    words = ("student.name=resnet10t", "student.input_size=32", "data.batch_size=24", setting)
    options = [word for value in words for word in ("--set", value)]
    result = run("distill", "--method", "none", "--data", folder, "--workers", 0, *options, "--dry-run")
    assert result.code == 2 and result.err.count("\n") == 1 and named in result.err, result.err


def test_long_values_are_cut_in_messages() -> None:
    with pytest.raises(UserError) as error:
        load_config(settings=[f"data.batch_size={'9' * 5000}"])
    assert str(error.value) == f"data.batch_size = '{'9' * 98}…: expected a whole number"
    with pytest.raises(UserError, match=f"data.views = {HUGE}: expected at most 2147483647"):
        load_config(settings=[f"data.views={HUGE}"])
    with pytest.raises(UserError, match=r"data.source = \[1\]: expected text"):
        load_config(settings=["data.source=[1]"])
