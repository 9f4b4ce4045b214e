"""What comes from data does nothing where it is shown."""

from __future__ import annotations

import pytest

from hftl.inert import as_cell, from_cell, in_markdown, visible


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
        ("", ""),
    ],
)
def test_a_spreadsheet_finds_no_formula_and_the_text_comes_back(text: str, cell: str) -> None:
    assert as_cell(text) == cell
    assert from_cell(cell) == text


def test_a_cell_holds_nothing_that_a_terminal_obeys() -> None:
    assert as_cell("a\x1b[31m\rb") == "a\\x1b[31m\\rb"


def test_a_terminal_obeys_nothing() -> None:
    assert visible("a\x1b[31m\x9b2J\r\x7f\u202eb\nc\td") == "a\\x1b[31m\\x9b2J\\r\\x7f\\u202eb\nc\td"
    assert visible("Grüße, 猫 🐈") == "Grüße, 猫 🐈"


def test_a_page_shows_a_name_as_it_is() -> None:
    name = "a|b\n<script>alert(1)</script>\x1b"
    assert in_markdown(name) == "a&#124;b &lt;script&gt;alert(1)&lt;/script&gt;\\x1b"
