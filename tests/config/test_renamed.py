"""Old names of settings: each is accepted everywhere, with one warning that gives the new name."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from support import Run

from irgdistill.config import (
    RENAMED_KEYS,
    DataConfig,
    RenamedKeyWarning,
    data_of,
    keys,
    load_config,
    validate,
    validate_saved,
)
from irgdistill.errors import UserError
from irgdistill.io.run_folder import RunFolder
from irgdistill.training.state import changes, open_state

OLD = Path(__file__).parents[1] / "data" / "old"


def test_the_table_names_settings() -> None:
    assert set(RENAMED_KEYS.values()) <= set(keys()) and not RENAMED_KEYS.keys() & set(keys())
    assert all(old.split(".")[0] == new.split(".")[0] for old, new in RENAMED_KEYS.items())


def test_an_old_key_is_accepted_from_everywhere(tmp_path: Path) -> None:
    preset = tmp_path / "mine.yaml"
    preset.write_text("data: {hold_gib: 1.5}\n")
    with pytest.warns(RenamedKeyWarning, match=r"data\.hold_gib is now called data\.image_cache_gib"):
        assert load_config(str(preset)).data.image_cache_gib == 1.5
    with pytest.warns(RenamedKeyWarning, match=r"runtime\.fold is now called runtime\.fold_batch_norm"):
        assert load_config(settings=["runtime.fold=false"]).runtime.fold_batch_norm is False
    with pytest.warns(RenamedKeyWarning):
        assert load_config(flags={"runtime.share_every": 3}).runtime.gradient_shares_every == 3
    with pytest.warns(RenamedKeyWarning):
        assert validate({"data": {"hold_gib": 1.0}}).data.image_cache_gib == 1.0
    with pytest.warns(RenamedKeyWarning):
        recorded = data_of("run", {"source": "digits", "hold_gib": 1.0}, DataConfig(), ())
    assert recorded.image_cache_gib == 1.0


def test_later_wins_whatever_the_name(tmp_path: Path) -> None:
    preset = tmp_path / "mine.yaml"
    preset.write_text("runtime: {fold_batch_norm: false}\n")
    with pytest.warns(RenamedKeyWarning):
        assert load_config(str(preset), ["runtime.fold=true"]).runtime.fold_batch_norm is True


def test_both_names_at_once_are_refused(tmp_path: Path) -> None:
    preset = tmp_path / "mine.yaml"
    preset.write_text("runtime: {fold: true, fold_batch_norm: false}\n")
    with (
        pytest.raises(UserError, match=r"runtime\.fold is now called runtime\.fold_batch_norm; give one"),
        pytest.warns(RenamedKeyWarning),
    ):
        load_config(str(preset))


@pytest.mark.parametrize("name", ["finished", "unfinished"])
def test_the_configuration_of_an_old_run_is_read(name: str) -> None:
    folder = RunFolder(OLD / name)
    with pytest.warns(RenamedKeyWarning):
        from irgdistill.config import read_yaml

        config = validate(read_yaml(folder.config))
    assert config.data.image_cache_gib == 2.0 and config.runtime.gradient_shares_every == 200


def test_an_old_state_agrees_with_its_old_configuration(tmp_path: Path) -> None:
    shutil.copytree(OLD / "unfinished", tmp_path / "run")
    with pytest.warns(RenamedKeyWarning):
        state, config = open_state(RunFolder(tmp_path / "run"))
        assert not changes(config, validate_saved(state.config))


def test_the_command_line_warns_once(run: Run, tmp_path: Path) -> None:
    preset = tmp_path / "mine.yaml"
    preset.write_text("extends: quickstart\nruntime: {share_every: 3}\n")
    options = ("--preset", preset, "--set", "runtime.share_every=5", "--set", "runtime.fold=false")
    alone = ("--method", "none", "--student", "cifar_resnet14_x0_5", "--dry-run", "--json")
    shown = run("distill", *options, *alone)
    assert shown.code == 0, shown.err
    assert shown.err.count("warning: runtime.share_every is now called runtime.gradient_shares_every\n") == 1
    assert shown.err.count("warning: ") == 2 and "runtime.fold_batch_norm" in shown.err
    runtime = json.loads(shown.out)["config"]["runtime"]
    assert runtime["gradient_shares_every"] == 5 and runtime["fold_batch_norm"] is False
    again = run("distill", *options, *alone)
    assert again.err == shown.err, "once for each command"
