"""The records of `irgdistill compare`: several sittings as one, and the tables of README and docs.

    python benchmarks/tables.py                                        # write the tables anew, from the records
    python benchmarks/tables.py --add runs/small/compare.json --to small-cifar_resnet20_x0_5   # runs of one more

A run that a record already holds stays as it is; where the new one differs, that is printed.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from irgdistill.commands.compare.statistics import mean_and_deviation, paired_interval
from irgdistill.io import SELECTING

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
BY_RUN = (*SELECTING, "best", "curves")
"""What a row may have of each of its seeds."""
SMALL = ("small-cifar_resnet20_x0_5", "small-cifar_resnet14_x0_5", "small-cifar_resnet56")
FULL = "full-cifar_resnet20_x0_5"
ENCODERS = ("flowers5", "flowers5-tenth", "flowers5-no-labels")
FRONT = {
    "small-cifar_resnet20_x0_5": ("10,000", "`cifar_resnet20` → `cifar_resnet20_x0_5`"),
    "small-cifar_resnet14_x0_5": ("10,000", "`cifar_resnet20` → `cifar_resnet14_x0_5`"),
    "small-cifar_resnet56": ("10,000", "`cifar_resnet56` → `cifar_resnet20`"),
    FULL: ("50,000", "`cifar_resnet20` → `cifar_resnet20_x0_5`"),
}
"""Record -> number of images and pair, in README's table."""
PUBLISHED = ("kd", "logits", "fitnet", "at", "fsp", "rocket", "rkd", "sp", "pkt", "dkd", "irg", "mtk")
OURS = ("kd+at", "irg+kd+at")
Row = Mapping[str, Any]


SAME = ("metric", "teacher", "student", "epochs", "validation_images")
"""What all sittings of a comparison share."""


def check_same(content: Row, more: Row) -> None:
    """Raises ValueError where the runs of `more` are not of the comparison that `content` records."""
    pairs = ((key, more.get(key), content.get(key)) for key in SAME)
    other = [f"{key} {new}, recorded is {old}" for key, new, old in pairs if new != old]
    if other:
        raise ValueError("another comparison: " + "; ".join(other))


def merged(old: Sequence[Row], new: Sequence[Row]) -> list[dict[str, Any]]:
    """Rows of one comparison with the runs of another added, method by method and seed by seed."""
    rows = {row["method"]: dict(row) for row in old}
    for row in new:
        method = row["method"]
        rows[method] = _joined(rows[method], row) if method in rows else dict(row)
    if "none" not in rows:  # without labels there is no student alone
        return list(rows.values())
    alone = dict(zip(rows["none"]["seeds"], rows["none"]["top1"], strict=True))
    for row in rows.values():
        pairs = [top1 - alone[seed] for seed, top1 in zip(row["seeds"], row["top1"], strict=True) if seed in alone]
        if row["method"] != "none" and len(pairs) > 1:
            row["difference"], row["half_width_95"] = paired_interval(pairs)
            row["paired_over"] = "seeds"
    return list(rows.values())


def _joined(old: Row, new: Row) -> dict[str, Any]:
    """One method's row with the seeds of another row of it. Raises ValueError where their losses differ."""
    for key in ("weights", "fades"):
        if old[key] != new[key]:
            raise ValueError(f"{old['method']}: {key} {new[key]}, recorded are runs with {old[key]}")
    by_run = [key for key in BY_RUN if key in old and key in new]
    runs = {seed: {key: old[key][i] for key in by_run} for i, seed in enumerate(old["seeds"])}
    added = {seed: {key: new[key][i] for key in by_run} for i, seed in enumerate(new["seeds"])}
    for seed in runs.keys() & added.keys():
        metric = next(key for key in SELECTING if key in by_run)
        print(f"{old['method']}, seed {seed}: recorded {runs[seed][metric]:.2f}, again {added[seed][metric]:.2f}")
    more = len(added.keys() - runs.keys())
    runs = dict(sorted({**added, **runs}.items()))
    row = dict(old) | {"seeds": list(runs)} | {key: [run[key] for run in runs.values()] for key in by_run}
    for key in by_run:
        if key != "curves":
            row[f"{key}_mean"], row[f"{key}_std"] = mean_and_deviation(row[key])
    for key in ("seconds", "images_per_second"):
        row[key] = (old[key] * len(old["seeds"]) + new[key] * more) / len(runs)
    return row


# --- tables -----------------------------------------------------------------------------------------------------------


def record(name: str) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
    return content


def tables() -> dict[Path, dict[str, str]]:
    """File -> mark -> the table that stands between `<!-- MARK -->` and `<!-- end MARK -->` in it."""
    pages = {name.removeprefix("small-"): _page_table(record(name)) for name in SMALL}
    pages["full"] = _page_table(record(FULL))
    pages |= {name: _page_table(record(name)) for name in ENCODERS}
    return {ROOT / "README.md": {"front": _readme_table()}, ROOT / "docs" / "results.md": pages}


def with_tables(text: str, found: Mapping[str, str]) -> str:
    """A page with its tables written anew. Raises ValueError where a mark is missing."""
    for mark, table in found.items():
        parts = re.split(rf"(?<=<!-- {mark} -->\n\n).*?(?=\n\n<!-- end {mark} -->)", text, flags=re.DOTALL)
        if len(parts) != 2:
            raise ValueError(f"the page has {len(parts) - 1} places marked {mark}")
        text = table.join(parts)
    return text


def _page_table(content: Row) -> str:
    """A line for each method, the student alone first, the others by what their last epoch reached."""
    metric = content["metric"]
    rows = sorted(content["rows"], key=lambda row: (row["method"] != "none", row[f"{metric}_mean"]))
    last = "agreement" if metric == "top1" and "agreement_mean" in rows[0] else "best"
    titles = {"agreement": "agreement with the teacher", "best": "best"}
    cells = [("method", "runs", SELECTING[metric], "from the student alone", titles[last])]
    for row in rows:
        less = f"{row['difference']:+.2f}" if "difference" in row else ""
        less += f" ± {row['half_width_95']:.2f}" if "half_width_95" in row else ""
        end = f"{row['agreement_mean']:.1f} %" if last == "agreement" else _mean(row, "best")
        cells.append((_name(row), str(len(row["seeds"])), _mean(row, metric), less, end))
    if not any(less for _, _, _, less, _ in cells[1:]):
        cells = [(*first, end) for *first, _, end in cells]
    return _markdown([cells[0], ("---",) * len(cells[0]), *cells[1:]])


def _readme_table() -> str:
    """A line for each pair: the student alone, the best published method, the default without and with relations."""
    cells = [("images, teacher → student", "student alone", "strongest published", *(f"`{it}`" for it in OURS))]
    cells.append(("---",) * len(cells[0]))
    for name, (images, pair) in FRONT.items():
        rows = {row["method"]: row for row in record(name)["rows"]}
        best = max((row for method, row in rows.items() if method in PUBLISHED), key=lambda row: row["top1_mean"])
        found = [_with_runs(rows["none"]), f"{_name(best)} {_with_runs(best)}"]
        found += [_with_runs(rows[method]) if method in rows else "–" for method in OURS]
        cells.append((f"{images}, {pair}", *found))
    return _markdown(cells)


def _with_runs(row: Row) -> str:
    return f"{_mean(row, 'top1')} ({len(row['seeds'])})"


def _name(row: Row) -> str:
    method, *rest = row["method"].split(", ")
    return ", ".join([f"`{method}`", *rest])


def _mean(row: Row, name: str) -> str:
    deviation = row[f"{name}_std"]
    return f"{row[f'{name}_mean']:.2f}" + ("" if deviation is None else f" ± {deviation:.2f}")


def _markdown(cells: Sequence[tuple[str, ...]]) -> str:
    lines = ["|" + "|".join(line) + "|" if line[0] == "---" else "| " + " | ".join(line) + " |" for line in cells]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--add", type=Path, help="compare.json of one more sitting")
    parser.add_argument("--to", choices=[*SMALL, FULL, *ENCODERS], help="the record that it belongs to")
    arguments = parser.parse_args()
    if (arguments.add is None) != (arguments.to is None):
        parser.error("--add and --to go together")
    if arguments.add is not None:
        content, more = record(arguments.to), json.loads(arguments.add.read_text(encoding="utf-8"))
        check_same(content, more)
        had = {(row["method"], seed) for row in content["rows"] for seed in row["seeds"]}
        new = {
            row["method"]: [seed for seed in row["seeds"] if (row["method"], seed) not in had] for row in more["rows"]
        }
        sitting = {"runs": {method: seeds for method, seeds in new.items() if seeds}, "versions": more["versions"]}
        content["rows"] = merged(content["rows"], more["rows"])
        content["later sittings"] = [*content.get("later sittings", []), sitting]
        (RESULTS / f"{arguments.to}.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    for path, found in tables().items():
        path.write_text(with_tables(path.read_text(encoding="utf-8"), found), encoding="utf-8")


if __name__ == "__main__":
    main()
