"""What comes from data does nothing where it is shown."""

from __future__ import annotations

import html
import re

import markdown
import pytest

from hftl.inert import as_cell, from_cell, in_markdown, on_one_line, visible, without_home


@pytest.mark.parametrize(
    ("text", "cell"),
    [
        ("=1+1", "'=1+1"),
        ("@SUM(A1)", "'@SUM(A1)"),
        ("+cmd|' /C calc'!A0", "'+cmd|' /C calc'!A0"),
        ("-2+3", "'-2+3"),
        ("\t=1", "'\t=1"),
        ("'=1", "''=1"),
        ("-1", "-1"),
        ("+2.5e-3", "+2.5e-3"),
        ("-inf", "-inf"),
        ("'quoted'", "'quoted'"),
        ("a=b", "a=b"),
        ("\n=1+1", "'\n=1+1"),
        ("\uff1d1+1", "'\uff1d1+1"),
        ("", ""),
    ],
)
def test_a_spreadsheet_finds_no_formula_and_the_text_comes_back(text: str, cell: str) -> None:
    assert as_cell(text) == cell
    assert from_cell(cell) == text


def test_the_home_folder_is_not_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/janedoe")
    text = (
        "no such file: '/home/janedoe/data', /home/janedoe2, /srv/home/janedoe/x, /home/janedoe, file:///home/janedoe/m"
    )
    assert without_home(text) == "no such file: '~/data', /home/janedoe2, /srv/home/janedoe/x, ~, file://~/m"


def test_a_cell_holds_nothing_that_a_terminal_obeys() -> None:
    assert as_cell("a\x1b[31m\rb") == "a\\x1b[31m\\rb"


def test_a_terminal_obeys_nothing() -> None:
    assert visible("a\x1b[31m\x9b2J\r\x7f\u202eb\nc\td") == "a\\x1b[31m\\x9b2J\\r\\x7f\\u202eb\nc\td"
    assert visible("Grüße, 猫 🐈") == "Grüße, 猫 🐈"


def test_a_page_shows_a_name_as_it_is() -> None:
    name = "a|b\n<script>alert(1)</script>\x1b"
    assert shown_by_markdown(name) == "a|b <script>alert(1)</script>\\x1b"


@pytest.mark.parametrize(
    "name",
    [
        "![x](https://evil.example/p.png)",
        "[log in](https://evil.example) **x** __y__ _z_",
        "`code` ~~gone~~ [x][y] <https://evil.example>",
        "# heading",
        "https://evil.example www.evil.example me@evil.example xmpp:me@evil.example //evil.com",
        r"back\\slash \[x\](y) &amp; a_b_c",
    ],
)
def test_a_page_obeys_no_name(name: str) -> None:
    assert shown_by_markdown(name) == name
    # GitHub's Markdown makes links of bare addresses too.
    assert not re.search(r"//|@\w|www\.", in_markdown(name))


def shown_by_markdown(name: str) -> str:
    """What stands in the cell of a table, without anything but text in it."""
    page = markdown.markdown(f"| a | b |\n| --- | --- |\n| {in_markdown(name)} | 1 |\n", extensions=["tables"])
    (cell,) = re.findall("<td>(.*?)</td>\\s*<td>1</td>", page, flags=re.DOTALL)
    cell = cell.replace("<span></span>", "")
    assert "<" not in cell
    return html.unescape(cell)


def test_a_name_is_one_line() -> None:
    assert on_one_line("a\nb: 1\tc\u2028d\x1b") == "a\\nb: 1\\tc\\u2028d\\x1b"
