"""Text that is not ours: what is shown of it, and where nothing of it is markup."""

from __future__ import annotations

import io

import pytest
from matplotlib.figure import Figure
from rich.console import Console

from irgdistill.commands.inspect.figures import render
from irgdistill.io import Report, code_span, markdown, markdown_table, table, visible, visible_values

SHOWN = {
    "plain name.png": "plain name.png",
    "größe 图像 🐈": "größe 图像 🐈",
    "\x1b]0;title\x07": r"\x1b]0;title\x07",
    "two\nlines\r\tend": r"two\nlines\r\tend",
    "\x9b2J\x7f": r"\x9b2J\x7f",
    "gpj\u202e.exe": r"gpj\u202e.exe",
    "a\u2028b\u2066c\ufeff": r"a\u2028b\u2066c\ufeff",
    "caf\udce9": r"caf\xe9",
    "\ud800": r"\ud800",
    "👩\u200d🔬": "👩\u200d🔬",
}


@pytest.mark.parametrize(("text", "shown"), SHOWN.items(), ids=range(len(SHOWN)))
def test_hidden_characters_are_shown_as_escapes(text: str, shown: str) -> None:
    assert visible(text) == shown
    assert visible(shown) == shown and shown.encode()
    assert visible_values({text: [(text, 1)]}) == {shown: [[shown, 1]]}


@pytest.mark.parametrize("text", ["[red]x[/]", "[/]x", "[bold]", "\x1b[31m\n\udcff"])
def test_console_prints_text_as_it_is(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    report = Report(stdout=True)
    report.line(f"line {text}")
    report.warn(f"warn {text}")
    table(f"title {text}", ["", f"column {text}"], [["cell", f"cell {text}"]])
    out = capsys.readouterr().out
    for word in ("line", "warn", "title", "column", "cell"):
        assert f"{word} {visible(text)}" in out
    assert "\x1b" not in out and out.encode()


def test_title_of_a_table_keeps_its_style(monkeypatch: pytest.MonkeyPatch) -> None:
    file = io.StringIO()
    console = Console(file=file, force_terminal=True, color_system="standard", width=80)
    monkeypatch.setattr("irgdistill.io.console.Console", lambda **_: console)
    table("title", ["name"], [["[red]x"]])
    assert "\x1b[3mtitle" in file.getvalue() and "[red]x" in file.getvalue()


def test_text_of_a_figure_is_no_formula() -> None:
    figure = Figure(figsize=(2, 2))
    figure.suptitle(r"$\nosuchcommand$")
    axes = figure.subplots()
    axes.set_xticks([0.0], ["$x^$"])
    axes.plot([0, 1], label="$_{$")
    axes.legend()
    assert render(figure, "svg").startswith(b"<?xml")


def test_markdown() -> None:
    assert markdown("[a](b) <i> *c*\n") == r"\[a\](b) \<i\> \*c\*" + r"\\n"
    assert code_span("a `b` c") == "``a `b` c``" and code_span("`") == "`` ` ``"
    assert markdown_table([["a", "b"], ["x|y", "z"]]) == "| a | b |\n|---|---|\n| x\\|y | z |\n"
