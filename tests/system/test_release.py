"""The documents of a release agree with the package."""

from __future__ import annotations

import datetime
import re
from pathlib import Path

import yaml

from irgdistill import __version__

ROOT = Path(__file__).resolve().parents[2]


def test_the_newest_version_of_the_changelog_is_the_package() -> None:
    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    versions = re.findall(r"^## (.+)$", text, re.MULTILINE)
    assert versions[0].split()[0] == __version__
    for version in versions:
        number, date = re.fullmatch(r"(\d+\.\d+\.\d+) \((.+)\)", version).groups()  # type: ignore[union-attr]
        datetime.date.fromisoformat(date)
        section = text.partition(f"\n## {number} (")[2].partition("\n## ")[0]
        headings = re.findall(r"^### (.+)$", section, re.MULTILINE)
        assert headings == [each for each in ("Breaking", "Features", "Fixes", "Docs", "Internal") if each in headings]


def test_the_citation_names_the_released_version_and_the_paper() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    newest = f"## {citation['version']} ({citation['date-released']})"
    assert newest in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert citation["version"] == __version__
    (paper,) = citation["references"]
    families = [author["family-names"] for author in paper["authors"]]
    assert families == ["Liu", "Cao", "Li", "Yuan", "Hu", "Li", "Duan"] and paper["year"] == 2019


def test_issue_forms_have_what_they_need() -> None:
    forms = sorted((ROOT / ".github/ISSUE_TEMPLATE").glob("*.yml"))
    assert [path.stem for path in forms] == ["bug", "feature"]
    for path in forms:
        form = yaml.safe_load(path.read_text(encoding="utf-8"))
        assert {"name", "description", "body"} <= form.keys()
        assert all(field["attributes"]["label"] for field in form["body"])


def test_what_contributors_are_pointed_to_exists() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    names = re.findall(r"\b(?:irgdistill|tests|docs|benchmarks)/[\w./]*\w", text)
    assert len(names) > 10
    assert all((ROOT / name).exists() for name in names)
    targets = re.findall(r"^    make (\w+)", text, re.MULTILINE)
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert targets and all(f"\n{target}:" in makefile for target in targets)
