"""README and docs show the tables of the records in benchmarks/results; sittings are joined rightly."""

from __future__ import annotations

import importlib.util
import statistics
from pathlib import Path
from typing import Any

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "tables.py"
spec = importlib.util.spec_from_file_location("tables", SCRIPT)
assert spec is not None and spec.loader is not None
tables = importlib.util.module_from_spec(spec)
spec.loader.exec_module(tables)


def row(method: str, top1: dict[int, float], **losses: Any) -> dict[str, Any]:
    values = list(top1.values())
    return {
        **{"method": method, "seeds": list(top1), "weights": {"ce": 1.0}, "fades": {}},
        **{"seconds": 10.0, "images_per_second": 5.0, **losses},
        **{"top1": values, "best": values, "agreement": values, "curves": [[value] for value in values]},
        **{"top1_mean": statistics.fmean(values), "top1_std": None},
    }


def test_readme_and_docs_show_what_was_recorded() -> None:
    found = tables.tables()
    assert {path.name: list(marks) for path, marks in found.items()} == {
        "README.md": ["front"],
        "results.md": [
            *("cifar_resnet20_x0_5", "cifar_resnet14_x0_5", "cifar_resnet56", "full"),
            *("flowers5", "flowers5-tenth", "flowers5-no-labels"),
        ],
    }
    for path, marks in found.items():
        text = path.read_text(encoding="utf-8")
        assert tables.with_tables(text, marks) == text, f"{path.name}: run benchmarks/tables.py"


def test_seeds_of_another_sitting_are_added(capsys: pytest.CaptureFixture[str]) -> None:
    old = [row("none", {0: 70.0, 1: 71.0, 2: 69.0}), row("kd", {0: 73.0})]
    new = [row("none", {0: 70.0}), row("kd", {0: 74.0, 2: 71.5, 1: 72.0}), row("at", {1: 72.0})]
    alone, kd, at = tables.merged(old, new)
    assert alone["seeds"] == [0, 1, 2] and "difference" not in alone
    assert kd["seeds"] == [0, 1, 2] and kd["top1"] == [73.0, 72.0, 71.5] and kd["curves"] == [[73.0], [72.0], [71.5]]
    assert kd["top1_mean"] == pytest.approx(72.1667, abs=1e-4) and kd["top1_std"] == pytest.approx(0.7638, abs=1e-4)
    # 3, 1 and 2.5 apart; 4.303 is Student's t with two degrees of freedom
    assert kd["difference"] == pytest.approx(6.5 / 3)
    assert kd["half_width_95"] == pytest.approx(4.303 * statistics.stdev([3, 1, 2.5]) / 3**0.5)
    assert at["seeds"] == [1] and "difference" not in at
    assert "kd, seed 0: recorded 73.00, again 74.00" in capsys.readouterr().out


def test_runs_without_labels_have_no_student_alone() -> None:
    def by_neighbours(seeds: dict[int, float]) -> dict[str, Any]:
        found = row("kd", seeds)
        found["knn_top1"] = found.pop("top1")
        return found

    (kd,) = tables.merged([by_neighbours({0: 60.0})], [by_neighbours({1: 62.0})])
    assert kd["seeds"] == [0, 1] and kd["knn_top1"] == [60.0, 62.0] and kd["knn_top1_mean"] == 61.0
    assert "difference" not in kd
    for name, columns in (
        ("flowers5", "top-1 | from the student alone | best"),
        ("flowers5-no-labels", "k-NN top-1 | best"),
    ):
        assert tables._page_table(tables.record(name)).startswith(f"| method | runs | {columns} |\n")


@pytest.mark.parametrize("losses", [{"weights": {"ce": 2.0}}, {"fades": {"kd": [0.3, 0.6]}}])
def test_runs_of_other_losses_are_not_added(losses: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"kd: {next(iter(losses))} .*, recorded are runs with"):
        tables.merged([row("none", {0: 70.0}), row("kd", {0: 73.0})], [row("kd", {1: 73.0}, **losses)])


def test_runs_of_another_pair_are_not_added() -> None:
    content = tables.record("small-cifar_resnet14_x0_5")
    tables.check_same(content, dict(content))
    with pytest.raises(ValueError, match="student cifar_resnet20, recorded is cifar_resnet14_x0_5"):
        tables.check_same(content, content | {"student": "cifar_resnet20"})


def test_a_page_without_the_mark_is_refused() -> None:
    with pytest.raises(ValueError, match="0 places marked small"):
        tables.with_tables("no table here", {"small": "| a |"})
