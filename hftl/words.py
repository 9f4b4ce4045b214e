"""Words in a row, and the tags of each: how they stand in tables, in texts and in files of the CoNLL kind."""

from __future__ import annotations

import functools
import json
import re
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


def as_words(cell: Any) -> list[str]:
    """The words in the cell of a table: a list, one written as JSON, or a text with spaces between words.

    Raises:
        ValueError: it is nothing of the kind.
    """
    if isinstance(cell, str) and re.fullmatch(r'\s*\[(.*")?\s*\]\s*', cell, re.DOTALL):
        cell = json.loads(cell)
    if isinstance(cell, str):
        return cell.split()
    if cell is None:
        return []
    if not isinstance(cell, list | tuple) or any(isinstance(word, list | tuple | dict) for word in cell):
        raise ValueError(f"{type(cell).__name__} values")
    if any(word is None for word in cell):
        raise ValueError("a list with an empty place (null)")
    return [" ".join(str(word).split("\n")) or " " for word in cell]


def joined(words: list[str]) -> str:
    """Words as one text, one a line, which `lines` takes apart again."""
    return "\n".join(words)


def lines(text: str) -> list[str]:
    """The words of a text that `joined` made."""
    return text.split("\n") if text else []


def read_conll(path: Path, tagged: bool = True) -> dict[str, list[list[str]]]:
    """A file with a word a line, its tags behind it, and an empty line between sentences, as columns of lists.

    `tokens` is the first field of a line, `tags` the last; those between are `column_2` and so on. Of CoNLL-U the
    fields have their own names.

    Args:
        path: the file.
        tagged: whether words must have tags.

    Raises:
        UsageError: a line has another number of fields than the first, or no tag; or there are none.
    """
    is_universal = path.suffix.lower() == ".conllu"
    numbered = [(number, line.strip("\r \ufeff")) for number, line in enumerate(decoded(path).split("\n"), start=1)]
    said = [line for _, line in numbered if _is_said(line)]
    separator = r"\t" if is_universal or (said and all("\t" in line for line in said)) else r"[ \t]+"
    fields_of = functools.partial(re.split, separator)
    tags = {fields_of(line)[-1] for line in said}
    width = len(fields_of(said[0])) if said else 0
    sentences: list[list[list[str]]] = [[]]
    for number, line in numbered:
        fields = fields_of(line)
        is_word = len(fields) == width and fields[-1] in tags and not is_universal
        if not line.strip():
            sentences.append([])
        elif (line.startswith("#") and not sentences[-1] and not is_word) or fields[0] == "-DOCSTART-":
            continue
        elif is_universal and not fields[0].isdigit():
            continue  # a word written as one of two, or one that is not written
        else:
            if len(fields) != width or (width < 2 and tagged):
                raise UsageError(
                    f"{path}: line {number} has {len(fields)} field{'s' * (len(fields) != 1)}, and "
                    f"{'a word and its tag are two' if width < 2 else f'the first line has {width}'}: write a word and "
                    "its tags a line, an empty line between sentences"
                )
            sentences[-1].append(fields)
    found = [sentence for sentence in sentences if sentence]
    if not found:
        raise UsageError(f"{path} has no words in it")
    between = [f"column_{place}" for place in range(2, width)]
    names = _CONLLU if is_universal else ("tokens", *between, "tags")
    return {name: [[fields[place] for fields in one] for one in found] for place, name in enumerate(names[:width])}


def is_tagged(path: Path) -> bool:
    """Whether each line of a text file ends in a tag of an entity, or of none, as those of the CoNLL kind do."""
    said = filter(_is_said, decoded(path).split("\n"))
    found = [re.search(r"\S[ \t]+([BIESLUM]-\S+|O)\s*$", line) is not None for line in said]
    return bool(found) and all(found)


def _is_said(line: str) -> bool:
    """Whether a line is surely one of a word; `#` may be a word too."""
    return bool(line.strip()) and not line.startswith(("#", "-DOCSTART-"))
