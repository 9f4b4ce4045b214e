"""Names and texts from data, made harmless where they are shown: in a terminal, a spreadsheet, a page, shared files."""

from __future__ import annotations

import html
import os
import re
from typing import Any

#: what a terminal obeys instead of showing it, and what turns the order of the letters around it (Unicode TR 36, 3.1)
_OBEYED = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069]")
_BREAKS = re.compile("[\t\n\u2028\u2029]")
#: what Markdown reads as more than a letter; within words an underscore is one
_MARKS = re.compile(r"[\\`*{}\[\]()#!~|]|(?<![^\W_])_|_(?![^\W_])")
#: behind what names become addresses, which GitHub's Markdown and others make links of: `//`, `@`, `www.`
_ADDRESS = re.compile(r"/(?=/)|@|www(?=\.)", re.IGNORECASE)
#: beginnings that a spreadsheet takes for a formula (OWASP, CSV injection; in full width too), behind
#: the quotes that `as_cell` puts there
_FORMULA = re.compile("'*[=+\\-@\t\n\uff1d\uff0b\uff0d\uff20]")
_NUMBER = re.compile(r"[+-]?(\d[\d_,.]*|inf|nan)(e[+-]?\d+)?$", re.IGNORECASE)
#: beginnings of names that mean the same on every machine
EVERYWHERE = ("builtin:", "torchvision:", "torchhub:", "pytorchvideo:", "keras:", "random:")


def visible(text: str) -> str:
    """The text with what a terminal would obey written out (`\\x1b`), line breaks and tabs as they are."""
    return _OBEYED.sub(lambda found: found.group().encode("unicode_escape").decode(), text)


def without_home(text: str) -> str:
    """The text with `~` for the home folder, whose name is that of the person."""
    home = os.path.expanduser("~").rstrip("/")
    return re.sub(rf"(?<![\w.~-]){re.escape(home)}(?![\w.-])", "~", text) if len(home) > 1 else text


def public_name(name: str | None) -> str:
    """A name of a model or data set without the folders of this machine."""
    text = str(name)
    where, colon, function = text.rpartition(":")
    if colon and where.endswith(".py"):
        return f"{os.path.basename(where)}:{function}"
    path = os.path.expanduser(text)
    return os.path.basename(os.path.abspath(path)) if os.path.isabs(path) or os.path.exists(path) else text


def public_value(value: Any) -> Any:
    """A setting, or a list of them, as `public_name`; what is no text stays."""
    if isinstance(value, list):
        return [public_value(entry) for entry in value]
    return public_name(value) if isinstance(value, str) else value


def as_cell(text: str) -> str:
    """The text, `visible`, with a quote before it where a spreadsheet would take it for a formula; numbers stay."""
    text = visible(text)
    return f"'{text}" if _FORMULA.match(text) and not _NUMBER.match(text) else text


def from_cell(cell: str) -> str:
    """The text, as `visible` gives it, of which `as_cell` made the cell."""
    return cell[1:] if cell.startswith("'") and _FORMULA.match(cell) else cell


def on_one_line(name: str) -> str:
    """The name, `visible`, with line breaks and tabs written out too, so that it cannot pass for a line of its own."""
    return _BREAKS.sub(lambda found: found.group().encode("unicode_escape").decode(), visible(name))


def in_markdown(name: str) -> str:
    """The name on one line, of which nothing is taken for Markdown (CommonMark, 2.4), HTML or an address."""
    text = html.escape(" ".join(visible(name).split()), quote=False)
    return _ADDRESS.sub(r"\g<0><span></span>", _MARKS.sub(lambda found: f"&#{ord(found.group())};", text))
