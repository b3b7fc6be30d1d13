"""Prints the matched stages of two networks as a table."""

from __future__ import annotations

from irgdistill.io import Report, table
from irgdistill.matching.plan import Plan, ends
from irgdistill.matching.taps import tap_name


def print_plan(plan: Plan | None, stdout: bool = False) -> None:
    """Print the plan as a table, with its notes below."""
    if plan is None:
        return
    rows, notes = [], []
    for pair in plan.pairs:
        for role, level in (("teacher", pair.teacher), ("student", pair.student)):
            span, tap = ends(level), level.exit
            rows.append(
                [
                    pair.name if role == "teacher" else "",
                    role,
                    tap_name(span[0]) if span is not None else "–",
                    tap_name(tap),
                    str(len(level.blocks)),
                    str(tap.channels),
                    f"{tap.height}×{tap.width} {tap.layout}" + (f"+{tap.prefix}" if tap.prefix else ""),
                ]
            )
            if span is not None and (level.kind != "block" or span[1] != tap):
                notes.append(f"{pair.name} {role}: {level.kind}, {tap_name(span[0])} → {tap_name(span[1])}")
    columns = ["stage", "network", "first block", "last block", "blocks", "width", "map"]
    table("matched stages", columns, rows, stdout)
    for note in (*notes, *plan.notes):
        Report(stdout=stdout).line(f"  {note}")
