"""metrics.jsonl is read line by line: what is no record of numbers is skipped."""

from __future__ import annotations

from pathlib import Path

import pytest

from irgdistill.io.metrics_file import records

GOOD = '{"kind": "train", "epoch": 1, "update": 3, "loss": NaN, "terms": {"ce": 1.5, "kd": 2}}'


@pytest.mark.parametrize(
    "line",
    [
        *("{", "[]", "5", "", "[" * 100_000, "\xff", '{"epoch": 1}', '{"kind": 5, "top1": 1.0}'),
        '{"kind": "eval", "top1": "high"}',
        '{"kind": "eval", "top1": [1.0]}',
        '{"kind": "eval", "epoch": -1}',
        '{"kind": "train", "update": 1.5}',
        '{"kind": "train", "terms": {"ce": null}}',
    ],
)
def test_damaged_lines_are_skipped(tmp_path: Path, line: str) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes("\n".join([GOOD, line, GOOD, ""]).encode("latin-1"))
    found = records(path)
    assert len(found) == 2 and found[0].keys() == found[1].keys()
    assert list(found[0]) == ["kind", "epoch", "update", "loss", "terms"] and found[0]["loss"] != found[0]["loss"]
    assert found[0]["update"] == 3 and found[0]["terms"] == {"ce": 1.5, "kd": 2}
