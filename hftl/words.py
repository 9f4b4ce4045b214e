"""Words in a row, and the tags of each: how they stand in tables, in texts and in files of the CoNLL kind."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hftl.errors import UsageError
from hftl.tables import decoded

#: files of the CoNLL kind
CONLL_SUFFIXES = {".conll", ".conllu", ".bio", ".iob", ".iob2", ".txt"}
#: a word with what belongs into it (don't, U.S, e-mail), or a single sign
_WORD = re.compile(r"\w+(?:[-'\u2019.]\w+)*|[^\w\s]")
#: the columns of CoNLL-U (universaldependencies.org/format.html)
_CONLLU = ("id", "tokens", "lemma", "upos", "xpos", "feats", "head", "deprel", "deps", "misc")


def split_words(text: str) -> list[str]:
    """The words and signs of a text that nobody has split."""
    return _WORD.findall(text)


def as_words(cell: Any, plain: bool) -> list[str]:
    """The words in the cell of a table: a list, one written as JSON, or a text.

    Args:
        cell: as said; None is no words.
        plain: whether a text is split as one that nobody has split, else at white space.

    Raises:
        ValueError: it is nothing of the kind.
    """
    if isinstance(cell, str) and cell.lstrip().startswith("[") and cell.rstrip().endswith('"]'):
        cell = json.loads(cell)
    if isinstance(cell, str):
        return split_words(cell) if plain else cell.split()
    if cell is None:
        return []
    if not isinstance(cell, list | tuple) or any(isinstance(word, list | tuple | dict) for word in cell):
        raise ValueError(f"{type(cell).__name__} values")
    return [" ".join(str(word).split("\n")) or " " for word in cell]


def joined(words: list[str]) -> str:
    """Words as one text, one a line, which `lines` takes apart again."""
    return "\n".join(words)


def lines(text: str) -> list[str]:
    """The words of a text that `joined` made."""
    return text.split("\n") if text else []


def read_conll(path: Path) -> dict[str, list[list[str]]]:
    """A file with a word a line, its tags behind it, and an empty line between sentences, as columns of lists.

    `tokens` is the first field of a line, `tags` the last; those between are `column_2` and so on. Of CoNLL-U the
    fields have their own names.

    Raises:
        UsageError: a line has another number of fields than the first, or no tag.
    """
    is_universal = path.suffix.lower() == ".conllu"
    sentences: list[list[list[str]]] = [[]]
    width = 0
    for number, line in enumerate(decoded(path).splitlines(), start=1):
        fields = line.split("\t") if is_universal else line.split()
        if not line.strip():
            sentences.append([])
        elif _is_comment(fields, width, at_start=not sentences[-1]) or (is_universal and not fields[0].isdigit()):
            continue  # what is no number in CoNLL-U is a word written as one of two, or one that is not written
        else:
            width = width or len(fields)
            if len(fields) != width or width < 2:
                raise UsageError(
                    f"{path}: line {number} has {len(fields)} field{'s' * (len(fields) != 1)}, and "
                    f"{'a word and its tag are two' if width < 2 else f'the first line has {width}'}: write a word and "
                    "its tags a line, an empty line between sentences"
                )
            sentences[-1].append(fields)
    found = [sentence for sentence in sentences if sentence]
    if not found:
        raise UsageError(f"{path} has no words in it")
    names = _CONLLU if is_universal else ("tokens", *(f"column_{place}" for place in range(2, width)), "tags")
    return {name: list(_column(found, place)) for place, name in enumerate(names[:width])}


def _is_comment(fields: list[str], width: int, at_start: bool) -> bool:
    """Whether a line says something about what follows: `# …` before a sentence, or -DOCSTART-."""
    about = at_start and fields[0].startswith("#") and len(fields) > 1
    tagged = re.match(r"([BIESLUM]-.|O$)", fields[-1]) or (width == len(fields) and fields[-1].isupper())
    return fields[0] == "-DOCSTART-" or bool(about and not tagged) or (at_start and fields[0] == "#" and not width)


def _column(sentences: list[list[list[str]]], place: int) -> Iterator[list[str]]:
    for sentence in sentences:
        yield [fields[place] for fields in sentence]
