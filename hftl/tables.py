"""Tables: read as columns from CSV and TSV, JSON lines, Parquet; written as CSV, or for the eye."""

from __future__ import annotations

import csv
import io
import json
import re
import sys
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from hftl.errors import UsageError
from hftl.inert import as_cell, on_one_line
from hftl.suffixes import TABLE_SUFFIXES

if TYPE_CHECKING:
    import datasets


def as_csv(lines: Iterable[Sequence[object]]) -> str:
    """Lines of cells as CSV, in which a spreadsheet finds no formula and a terminal nothing to obey."""
    rows = (["" if cell is None else as_cell(str(cell)) for cell in line] for line in lines)
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue()


def aligned(lines: Sequence[Sequence[str]], left: Collection[int]) -> list[str]:
    """Lines of cells with their columns one below the other, those whose numbers are in `left` to the left."""
    lines = [[on_one_line(cell) for cell in line] for line in lines]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    cells = [
        [
            cell.ljust(width) if place in left else cell.rjust(width)
            for place, (cell, width) in enumerate(zip(line, widths, strict=True))
        ]
        for line in lines
    ]
    return ["  ".join(line).rstrip() for line in cells]


def read_columns(path: Path) -> dict[str, list] | datasets.Dataset:
    """The columns of a table by name; of a Parquet file as a memory-mapped data set.

    Raises:
        UsageError: the file is empty, in another encoding, damaged, or of another kind.
    """
    suffix = path.suffix.lower()
    if suffix not in TABLE_SUFFIXES:
        raise UsageError(f"{path}: hftl reads tables as {', '.join(sorted(TABLE_SUFFIXES))}, and images in folders")
    if not path.stat().st_size:
        raise UsageError(f"{path} is empty")
    if suffix == ".parquet":
        return _read_parquet(path)
    return _read_csv(path, "," if suffix == ".csv" else "\t") if suffix in (".csv", ".tsv") else _read_json(path)


def decoded(path: Path) -> str:
    """The text of a UTF-8 file, with or without a byte order mark."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        content = path.read_bytes()
        line = content[: error.start].count(b"\n") + 1
        encoding = "UTF-16" if content[:2] in (b"\xff\xfe", b"\xfe\xff") else "CP1252"  # its byte order mark
        raise UsageError(
            f"{path} is not UTF-8 (line {line}): convert it, for example with iconv -f {encoding} -t UTF-8"
        ) from error
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror}") from error


def _read_csv(path: Path, delimiter: str) -> dict[str, list]:
    """All values as text: "null" and "NA" are ordinary words, and 007 is not 7.

    The csv module, because pandas fills up or cuts off rows of the wrong length without a word.
    """
    csv.field_size_limit(min(sys.maxsize, 2**31 - 1))
    reader = csv.reader(io.StringIO(decoded(path), newline=""), delimiter=delimiter)
    header = [name.strip() for name in next(reader, [])]
    twice = [name for name, count in Counter(header).items() if count > 1]
    if twice:
        raise UsageError(f"{path}: the header has the column {twice[0]!r} more than once")
    other = next((mark for mark in ";\t|," if mark in header[0]), None) if len(header) == 1 else None
    if other:
        raise UsageError(
            f"{path}: the only column is {header[0]!r}: the separator seems to be {other!r}, and a "
            f"{path.suffix.lower()} file has {delimiter!r}"
        )
    rows = []
    try:
        for row in reader:
            if not row:
                continue
            if len(row) != len(header):
                raise UsageError(
                    f"{path}: line {reader.line_num} has {len(row)} fields, the header {len(header)}: "
                    f"the separator is {delimiter!r}; texts with it or line breaks need quotes"
                )
            rows.append(row)
    except csv.Error as error:
        raise UsageError(f"{path}: line {reader.line_num} cannot be read: {error}") from error
    columns: dict[str, list] = dict(zip(header, map(list, zip(*rows, strict=True)), strict=True)) if rows else {}
    columns.pop("", None)  # the row numbers that pandas writes
    return columns


def _read_json(path: Path) -> dict[str, list]:
    """One object a line, or one list of objects."""
    text = decoded(path)
    whole = text.lstrip().startswith("[")
    pieces = [(1, text)] if whole else [(number, line) for number, line in enumerate(text.split("\n"), 1)]
    rows: list[dict] = []
    for number, piece in pieces:
        if not piece.strip():
            continue
        try:
            value = json.loads(piece)
        except json.JSONDecodeError as error:
            line = number + error.lineno - 1
            raise UsageError(f"{path}: line {line} is not valid JSON: {error.msg} (column {error.colno})") from error
        except ValueError as error:  # a number with more digits than Python reads
            raise UsageError(f"{path}: line {number} cannot be read: {str(error).partition(';')[0]}") from error
        except RecursionError as error:
            raise UsageError(f"{path}: line {number} is nested too deeply to be rows of a table") from error
        found = value if whole else [value]
        rows += found
        if not all(isinstance(row, dict) for row in found):
            raise UsageError(f'{path}: line {number} is not an object such as {{"text": "…", "label": "…"}}')
        if any(_has_half_character(value) for row in found for value in row.values()):
            raise UsageError(
                f"{path}: line {number} has half a character (one of \\ud800 to \\udfff by itself): mend it"
            )
    names = {name: None for row in rows for name in row}
    return {name: [row.get(name) for row in rows] for name in names}


def _has_half_character(value: object) -> bool:
    """Whether a text has one half of a surrogate pair, which JSON can say and no file can hold."""
    return isinstance(value, str) and not value.isascii() and re.search("[\ud800-\udfff]", value) is not None


def _read_parquet(path: Path) -> datasets.Dataset:
    import datasets  # half a second, for this kind of table alone

    bars = not datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        # Memory-mapped from the datasets cache, so that images inside the file do not fill the memory.
        data = datasets.Dataset.from_parquet(str(path))
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetGenerationError) as error:
        cause = str(error.__cause__ or error).splitlines()[0]
        raise UsageError(f"{path} cannot be read as Parquet: {cause}") from error
    finally:
        if bars:
            datasets.enable_progress_bars()
    assert isinstance(data, datasets.Dataset)
    return data.remove_columns([name for name in data.column_names if name.startswith("__index_level_")])
