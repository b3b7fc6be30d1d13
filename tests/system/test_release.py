"""The documents of a release agree with the package."""

from __future__ import annotations

import datetime
import re
from pathlib import Path

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
