"""From what a person names (a folder, a table, a Hub id, a built-in) to splits with one label map, checked.

`load_splits` is for training, `load_labelled` for scoring a finished run, `load_inputs` for prediction. Every data set
they return has the same columns: `id`, then that of its modality (`image`, or `text` and perhaps `text_pair`, …), then
`label` (the class id, or what `labels_of` says).
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import repeat
from pathlib import Path
from typing import Any, TypeVar

import datasets
import numpy as np

from hftl.builtin import builtin_dataset
from hftl.errors import UsageError, did_you_mean
from hftl.hub import check_hub
from hftl.modality import FILES, TEXT, Modality, is_missing
from hftl.problems import LabelCells, Problem, SingleLabel
from hftl.sources import AT_ONCE, file_key, in_threads, source_of
from hftl.suffixes import TABLE_SUFFIXES, is_stray
from hftl.tables import decoded, read_columns
from hftl.words import CONLL_SUFFIXES, as_words, is_tagged, joined, lines, read_conll, split_words

SPLIT_ROLES = {
    "train": "train",
    "training": "train",
    "val": "validation",
    "valid": "validation",
    "validation": "validation",
    "dev": "validation",
    "test": "test",
    "testing": "test",
}
# fmt: off

# Names that people give to columns, likeliest first; compared without case.
PAIR_COLUMNS = [
    ("sentence1", "sentence2"), ("premise", "hypothesis"), ("question1", "question2"), ("question", "sentence"),
    ("question", "passage"), ("question", "answer"), ("query", "passage"), ("query", "document"),
    ("text", "text_pair"), ("text1", "text2"), ("text_a", "text_b"), ("sentence_a", "sentence_b"),
]
LABEL_COLUMNS = [
    "label", "labels", "class", "category", "target", "sentiment", "intent", "emotion", "topic", "classes",
    "categories", "y", "rating", "score",
]
# fmt: on

#: roles whose column several others may stand for, and the argument that names these
JOINED = {"label": "label_columns", "choices": "choice_columns"}
CHOICES_COLUMNS = ("choices", "endings", "options", "answers", "candidates", "alternatives", "solutions")

PathType = TypeVar("PathType", str, Path)

_IN_TABLES = ("text", "text_pair", "choices", "numbers", "categories")  # inputs that are no files
FULL_DECODE_LIMIT = 5000  # above so many files reading all of them whole takes minutes: headers only


@dataclass
class Splits:
    """The data of a training run: each part has the columns `id`, that of the modality (`image`, …), and `label`."""

    train: datasets.Dataset
    validation: datasets.Dataset
    test: datasets.Dataset | None
    label_names: list[str]
    """Of the classes or labels; the index is the class id."""
    columns: dict[str, str]
    """From a role (that of the modality, text_pair, label) to the column that it was read from."""
    source: str = ""
    """What was read, as it was named."""
    notes: list[str] = field(default_factory=list)
    """What was found and checked."""
    validation_is_drawn: bool = False
    """Whether validation is a part of what was given to train on."""
    problem: Problem = field(default_factory=SingleLabel)
    """What the labels are."""

    @property
    def report(self) -> list[str]:
        """What a person sees of it, in at most about 20 lines."""
        return [f"data: {self.source}", *self.notes, *self.problem.table(self._labels(), self.label_names)]

    @property
    def scored(self) -> datasets.Dataset:
        """What a finished run is scored on: test, else validation."""
        return self.validation if self.test is None else self.test

    def found(self) -> dict[str, Any]:
        """The notes, without the folders of this machine, and of each split the rows of every class by name."""
        names, labels = self.label_names, self._labels()
        rows = {role: self.problem.classes(part, names) for role, part in labels.items()}
        notes = [_without_folders(note, self.source) for note in self.notes]
        notes += self.problem.notes(labels["train"], names)
        return {"notes": notes, "rows": rows, "scored": self.scored_digest}

    @functools.cached_property
    def train_labels(self) -> np.ndarray[Any, Any]:
        """As `labels_of`."""
        return labels_of(self.train)

    @property
    def counts(self) -> list[int]:
        """Training rows of each class or label."""
        return self.problem.counts(self.train_labels, self.label_names)

    def _labels(self) -> dict[str, np.ndarray[Any, Any]]:
        """The labels of each split that is there."""
        parts = {"train": self.train, "validation": self.validation, "test": self.test}
        return {role: labels_of(part) for role, part in parts.items() if part is not None}

    @functools.cached_property
    def scored_digest(self) -> str:
        """A name for the rows that a run is scored on, with the content of their files."""
        digest = hashlib.blake2b(self.fingerprint(self.scored).encode(), digest_size=8)
        for content in self.contents(self.scored):
            digest.update(content.encode("utf-8", "surrogatepass"))
        return digest.hexdigest()

    def contents(self, part: datasets.Dataset) -> list[str]:
        """What stands for the input of each row: its texts, or of a file its size, beginning and end."""
        names = [name for name in part.column_names if name not in ("id", "label")]
        texts = [part[name][:] for name in names if name in _IN_TABLES]
        written = [repr(row) for row in zip(*texts, strict=True)] if texts else [""] * len(part)
        files = [name for name in names if name not in _IN_TABLES]
        if not files:
            return written
        keys = in_threads(_undated_key, column_of(part, files[0]))
        return [key.hex() + text for key, text in zip(keys, written, strict=True)]

    def fingerprint(self, *parts: datasets.Dataset) -> str:
        """A name for rows, else for what is trained and validated on: ids, labels, texts; not the content of images."""
        digest = hashlib.blake2b(digest_size=8)
        for part in parts or (self.train, self.validation):
            names = [name for name in ("id", "label", *_IN_TABLES) if name in part.column_names]
            for rows in part.select_columns(names).iter(10_000):
                digest.update(repr(rows).encode("utf-8", "surrogatepass"))
        return digest.hexdigest()


@dataclass
class _Rows:
    """One split as read, before roles are given to its columns."""

    origin: str
    """What messages call it: a file, a folder, a split of a Hub data set."""
    data: dict[str, list] | datasets.Dataset
    ids: list[str]
    folder: Path | None = None
    """Where relative image paths start."""
    class_folders: bool = False
    label_columns: list[str] | None = None
    """Names of the labels, where columns of their own held them."""
    skipped: Counter[str] = field(default_factory=Counter)


@dataclass
class _Source:
    """What a person named: its splits by their own names, read when they are called."""

    name: str
    splits: dict[str, Callable[[], _Rows]]
    others: list[str] = field(default_factory=list)
    """What lies beside the splits and is not one."""


# ---- the three entrances -------------------------------------------------------------------------------------------


def load_splits(arguments: Any, modality: Modality, problem: Problem | None = None) -> Splits:
    """Read, split, label and check the data set that `arguments` names; `problem` says what its labels are."""
    problem = problem or SingleLabel()
    seed = _option(arguments, "seed", 42)
    source = _open_source(arguments, modality)
    roles = _assign_roles(source, arguments)
    rows = {role: source.splits[name]() for role, name in roles.items()}
    label_columns = _option(arguments, "label_columns")
    untold = [name for name in label_columns or () if "test" in rows and name not in _column_names(rows["test"].data)]
    if untold and not _option(arguments, "test_split"):
        del rows["test"]
    rows = {role: _with_joined_labels(part, label_columns) for role, part in rows.items()}
    rows = {role: _with_joined_choices(part, _option(arguments, "choice_columns")) for role, part in rows.items()}
    columns, guessed = _resolve_columns(rows["train"], arguments, modality)
    notes = [*_columns_note(columns, guessed, rows["train"]), *_unused_note(source, roles), *_skipped_note(rows)]
    notes += [f"test: it has no column {untold[0]!r} and is left out"] if untold else []
    _require_columns(rows, columns, arguments, notes)

    cells = {role: _label_cells(part, columns) for role, part in rows.items()}
    notes += problem.look_at(cells["train"])
    row_labels = {role: problem.read(column) for role, column in cells.items()}
    if "test" in rows and not any(label is not None for label in row_labels["test"]):
        notes.append(f"test: {rows['test'].origin} has no labels and is left out")
        del rows["test"], row_labels["test"]
    label_names = problem.names(row_labels["train"], cells["train"])
    labels = {role: problem.encode(row_labels[role], label_names, cells[role]) for role in rows}
    problem.require_enough(labels["train"], label_names, rows["train"].origin)
    parts = {role: _canonical(part, columns, labels[role], modality) for role, part in rows.items()}
    for role in parts if modality.has_words else ():
        _require_aligned(parts[role], row_labels[role], rows[role], cells[role])
    parts = {role: _with_others(part, rows[role], arguments, strict=True) for role, part in parts.items()}

    if not modality.is_text:
        # Before anything is drawn: the draw is then the same as if the bad files had not been there.
        parts = _check_files(parts, modality, bool(_option(arguments, "skip_bad_files", False)), notes)
        problem.require_enough(labels_of(parts["train"]), label_names, rows["train"].origin)
    shots = _option(arguments, "shots")
    if shots is not None:
        parts |= _take_shots(parts, shots, label_names, seed, notes)
    elif "validation" not in parts:
        fraction = _option(arguments, "validation_fraction", 0.1)
        parts |= _take_validation(parts["train"], problem, fraction, seed, notes, columns["label"])
    for role in parts:
        limit = _option(arguments, "max_train_samples" if role == "train" else "max_eval_samples")
        parts[role] = _limited(parts[role], problem, limit, seed)
    left = "with --max_train_samples" if _option(arguments, "max_train_samples") else "without its validation rows"
    problem.require_enough(labels_of(parts["train"]), label_names, f"{rows['train'].origin} {left}")
    parts = {role: parts[role] for role in ("train", "validation", "test") if role in parts}
    for role in ("validation", "test"):
        if role in parts:
            problem.require_scorable(labels_of(parts[role]), rows[role].origin if role in rows else role)
    notes += _content_notes(parts, modality)
    drawn = "validation" not in rows
    return Splits(
        parts["train"], parts["validation"], parts.get("test"), label_names, columns, source.name, notes, drawn, problem
    )


def load_labelled(
    arguments: Any,
    split: str | None,
    label_names: Sequence[str],
    modality: Modality,
    known: Mapping[str, str | None],
    problem: Problem | None = None,
) -> tuple[datasets.Dataset, str]:
    """One split to score a finished run on, labelled by the run's own map, and the name of the split.

    Without `split` it is test, else validation, else the only one. `known` are the columns of the training data by
    role, taken where they are there too and `arguments` names none.
    """
    problem = problem or SingleLabel()
    source = _open_source(arguments, modality)
    name = _find_split(split, source, "--split") if split else _default_split(source)
    rows = _with_joined_labels(source.splits[name](), _option(arguments, "label_columns"))
    rows = _with_joined_choices(rows, _option(arguments, "choice_columns"))
    given = {role: _option(arguments, f"{role}_column") for role in ("label", *input_roles(modality))}
    columns, _ = _resolve_columns(rows, _like_training(rows, given, known, arguments), modality, known=True)
    _require_same_pair(rows, columns, known)
    cells = _label_cells(rows, columns)
    row_labels = problem.read(cells)
    labels = problem.encode(row_labels, label_names, cells)
    part = _canonical(rows, columns, labels, modality)
    if modality.has_words:
        _require_aligned(part, row_labels, rows, cells)
    part = _with_others(part, rows, arguments, strict=True)
    part = _limited(part, problem, _option(arguments, "max_eval_samples"), _option(arguments, "seed", 42))
    if not modality.is_text:
        part = _check_files({name: part}, modality, bool(_option(arguments, "skip_bad_files", False)), [])[name]
    problem.require_scorable(labels_of(part), rows.origin)
    return part, name


def load_inputs(
    path: str | os.PathLike,
    modality: Modality,
    given: Mapping[str, str | None],
    known: Mapping[str, str | None],
    follow_links: bool = False,
    others: Any = None,
) -> datasets.Dataset:
    """What to predict on, without labels: files (one, or a folder), texts (one a line or one a file), or a table.

    The columns of a table are `given` by role, else those `known` from training where it has them, else guessed.
    Links in a folder may lead out of it where `follow_links`. `others` are arguments with `number_columns` and
    `category_columns`, which need not be there.
    """
    place = Path(os.path.expanduser(path))
    if not os.path.exists(place):
        raise _not_there(str(path))
    tables = _tables_of(modality) - {".txt"}
    is_table = place.suffix.lower() in tables or (
        modality.has_words and place.suffix.lower() == ".txt" and is_tagged(place)
    )
    if is_table and place.is_file():
        rows = _with_joined_choices(
            _read_table(place, modality.has_words, tagged=False), _option(others, "choice_columns")
        )
        asked = _like_training(rows, given, known, others)
        columns, _ = _resolve_columns(rows, asked, modality, labelled=False, known=True)
        _require_same_pair(rows, columns, known)
        return _with_others(_canonical(rows, columns, None, modality), rows, others, strict=False)
    if modality.has_choices:
        raise _not_a_table(place, modality)
    if place.is_dir():
        return datasets.Dataset.from_list(list(iter_folder(place, modality, follow_links)))
    if not modality.is_text:
        if not modality.names_file(place):
            raise UsageError(f"{place} is none of the {modality.plural} that are read ({_suffixes(modality.suffixes)})")
        return datasets.Dataset.from_list([{"id": place.name, modality.name: os.path.abspath(place)}])
    if place.suffix.lower() != ".txt":
        raise UsageError(f"{path}: give a .txt file with one text a line, or a table ({_suffixes(tables)})")
    texts = [(str(number), line.rstrip("\r")) for number, line in enumerate(decoded(place).split("\n"))]
    texts = [(number, line) for number, line in texts if line.strip()]
    if not texts:
        raise UsageError(f"{path} has no text in it")
    return datasets.Dataset.from_list([{"id": number, "text": as_text(line, modality)} for number, line in texts])


def _not_a_table(place: Path, modality: Modality) -> UsageError:
    return UsageError(f"{place}: {modality.plural} stand in a table ({_suffixes(_tables_of(modality))})")


def as_text(text: str, modality: Modality) -> str:
    """A text that nobody has split as it stands in the column of texts."""
    return joined(split_words(text)) if modality.has_words else text


def _tables_of(modality: Modality) -> set[str]:
    """Endings of the files that hold rows."""
    return TABLE_SUFFIXES | CONLL_SUFFIXES if modality.has_words else TABLE_SUFFIXES


def iter_folder(path: str | os.PathLike, modality: Modality, follow_links: bool = False) -> Iterator[dict[str, Any]]:
    """The rows of `load_inputs` for a folder of files or texts, in its order, each found when it is asked for.

    Of a million files only the names of one folder are held at a time, which the order needs.

    Raises:
        UsageError: there is nothing to predict on in the folder, a text in another encoding, or a link that leads out
            of the folder, without `follow_links`.
    """
    place = Path(os.path.expanduser(path))
    root = _root(place, follow_links)
    if modality.has_choices:
        raise _not_a_table(place, modality)
    if not modality.is_text:
        start = os.path.abspath(place)
        found = _walk_files(place, modality, Counter(), root)
        rows = ({"id": _below(start, file), modality.name: file} for file in found)
        otherwise = f"{place} holds no {modality.plural} ({_suffixes(modality.suffixes)})"
    else:
        with os.scandir(place) as entries:
            files = (
                entry for entry in entries if entry.name.lower().endswith(".txt") and not os.path.isdir(entry.path)
            )
            names = sorted(entry.name for entry in files if not is_stray(entry.name))
        texts = ((_utf8(name), decoded(_inside(place / name, root)).strip()) for name in names)
        rows = ({"id": name, "text": as_text(text, modality)} for name, text in texts if text)
        otherwise = f"{path}: the folder has no .txt files with text in them"
    first = next(rows, None)
    if first is None:
        raise UsageError(otherwise)
    yield first
    yield from rows


def _below(start: str, path: str) -> str:
    """The part of a path below a folder, with / on every system."""
    return path[len(start) :].lstrip(os.sep).replace(os.sep, "/")


def _like_training(
    rows: _Rows, given: Mapping[str, str | None], known: Mapping[str, str | None], others: Any
) -> dict[str, Any]:
    """Options for `_resolve_columns`: the given columns, else those of the training data that this table has too."""
    names = _column_names(rows.data)
    chosen = {role: name for role, name in known.items() if name in names}
    chosen |= {role: name for role, name in given.items() if name}
    several = ("number_columns", "category_columns", "label_columns", "choice_columns")
    read_too = {name: _option(others, name, []) for name in several}
    return {**{f"{role}_column": str(name) for role, name in chosen.items()}, **read_too}


def _require_same_pair(rows: _Rows, columns: dict[str, str], known: Mapping[str, str | None]) -> None:
    """A model of pairs needs both texts; one of single texts takes one."""
    if not known.get("text_pair"):
        columns.pop("text_pair", None)
    elif "text_pair" not in columns:
        raise UsageError(
            f"{rows.origin}: the model was trained on pairs of texts; say --text_pair_column NAME. "
            f"{_listed(_column_names(rows.data))}"
        )


def _option(arguments: Any, name: str, default: Any = None) -> Any:
    """An argument, or `default` where a task has no such argument or nobody set it."""
    value = arguments.get(name) if isinstance(arguments, dict) else getattr(arguments, name, None)
    return default if value is None else value


# ---- sources -------------------------------------------------------------------------------------------------------


def input_roles(modality: Modality) -> list[str]:
    """The roles of the columns that inputs are read from."""
    if modality.is_text:
        others = ["choices"] if modality.has_choices else []
        return ["text", *others] if modality.has_words or others else ["text", "text_pair"]
    return [modality.name, "text"] if modality.has_texts else [modality.name]


def _open_source(arguments: Any, modality: Modality) -> _Source:
    name = _option(arguments, "dataset_name")
    if not name:
        raise UsageError("no data: say which with --dataset (a folder, a table, a Hub id or builtin:NAME)")
    name = str(name)
    if name.startswith("builtin:"):
        return _dataset_source(name, builtin_dataset(name.removeprefix("builtin:")))
    path = Path(os.path.expanduser(name))
    if os.path.isdir(path):  # unlike Path, without an error for an endless name
        return _folder_source(path, modality, _root(path, bool(_option(arguments, "follow_links", False))))
    if os.path.isfile(path):
        return _Source(name, {"train": functools.partial(_read_table, path, modality.has_words)})
    if name.startswith((".", "/", "~")) or path.suffix.lower() in _tables_of(modality) | modality.suffixes:
        raise _not_there(name)
    return _dataset_source(name, _load_from_hub(name, _option(arguments, "dataset_config_name")))


def _dataset_source(name: str, splits: dict[str, datasets.Dataset]) -> _Source:
    def read(split: str, data: datasets.Dataset) -> _Rows:
        if not len(data):
            raise UsageError(f"{name}: the split {split!r} has no rows")
        return _Rows(f"{name} ({split})", data, [f"{split}-{row}" for row in range(len(data))])

    return _Source(name, {split: functools.partial(read, split, data) for split, data in splits.items()})


def _load_from_hub(name: str, config: str | None) -> dict[str, datasets.Dataset]:
    check_hub()
    try:
        loaded = datasets.load_dataset(name, config)
    except (OSError, ValueError, RuntimeError) as error:
        # Not found, not reached, offline, a config that has to be named, a data set that is a script.
        reason = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        offline = " (offline)" if datasets.config.HF_HUB_OFFLINE else ""
        near = did_you_mean(Path(name).name, _neighbours(Path(name)))
        raise UsageError(
            f"--dataset {name!r}: no local file or folder, and it could not be loaded from the Hub{offline}: "
            f"{reason}{near}"
        ) from error
    return dict(loaded)


def _not_there(name: str) -> UsageError:
    path = Path(os.path.expanduser(name))
    near = did_you_mean(path.name, _neighbours(path))
    return UsageError(f"no such file or folder: {name!r}{'.' + near if near else ''}")


def _neighbours(path: Path) -> list[str]:
    return [other.name for other in path.parent.iterdir()] if path.parent.is_dir() else []


def _root(folder: Path, follow_links: bool) -> str | None:
    """Where the files of a data folder must lie, links resolved; None where links may lead anywhere."""
    return None if follow_links else os.path.realpath(folder)


def _inside(path: PathType, root: str | None) -> PathType:
    """The path itself.

    Raises:
        UsageError: a link in it leads out of the root.
    """
    if root is not None and os.path.commonpath([root, os.path.realpath(path)]) != root:
        raise UsageError(f"{str(path)!r} leads by a link out of {root!r}: --follow_links reads it all the same.")
    return path


def _entries(folder: Path) -> tuple[list[Path], list[Path]]:
    """The sub-folders and the files of a folder, sorted by name, without hidden and system ones."""
    entries = sorted((entry for entry in folder.iterdir() if not is_stray(entry.name)), key=lambda entry: entry.name)
    return [entry for entry in entries if entry.is_dir()], [entry for entry in entries if not entry.is_dir()]


def _folder_source(folder: Path, modality: Modality, root: str | None) -> _Source:
    folders, files = _entries(folder)
    if not folders and not files:
        layout = "" if modality.is_text or modality.has_texts else f"class folders with {modality.plural}, or "
        raise UsageError(f"{folder} is empty: it should hold {layout}tables")
    tables = [file for file in files if file.suffix.lower() in _tables_of(modality)]
    # A folder named like a split that holds files itself is a class: trains and buses, say.
    named = [entry for entry in folders if entry.name.lower() in SPLIT_ROLES]
    split_folders = [entry for entry in named if _entries(entry)[0]] or (named if named == folders else [])
    class_folders = split_folders or (folders if len(folders) > 1 else [])
    needs_table = modality.is_text or modality.has_texts
    if tables and (needs_table or not class_folders or any(_role(table.stem) for table in tables)):
        return _tables_source(folder, [_inside(table, root) for table in tables], modality.has_words)
    if needs_table:
        raise _no_tables(folder, modality)
    if not split_folders:
        return _Source(str(folder), {"train": functools.partial(_read_class_folders, folder, folder, modality, root)})
    others = [entry.name for entry in [*folders, *files] if entry not in split_folders]
    splits: dict[str, Callable[[], _Rows]] = {
        entry.name: functools.partial(_read_class_folders, entry, folder, modality, root) for entry in split_folders
    }
    return _Source(str(folder), splits, others)


def _no_tables(folder: Path, modality: Modality) -> UsageError:
    if modality.has_texts:
        return UsageError(
            f"{folder} holds no table: {modality.plural} with texts stand in one, such as train.csv with the columns "
            f"{modality.name}, text and label"
        )
    otherwise = f"{folder} holds no table: this task reads {_suffixes(_tables_of(modality))}, such as train.csv"
    return _of_another_task(folder, modality) or UsageError(otherwise)


def _of_another_task(folder: Path, modality: Modality) -> UsageError | None:
    """What to use for a folder whose files are of another kind; None where they are not."""
    for path in folder.rglob("*"):
        for task, kind in FILES.items():
            if kind is not modality and kind.names_file(path):
                return UsageError(f"{folder} holds {kind.plural}, not {modality.plural}: use {_with_recipe(task)}")
    return None


def _with_recipe(task: str) -> str:
    """A task with the file of its recipe."""
    return f"{task} ({task.replace('-', '_')}.py)"


def _suffixes(suffixes: Collection[str]) -> str:
    return ", ".join(sorted(suffixes))


def _tables_source(folder: Path, tables: list[Path], has_words: bool) -> _Source:
    files: dict[str, list[Path]] = {}
    for table in tables:
        files.setdefault(re.sub(r"-\d+-of-\d+$", "", table.stem), []).append(table)  # shards of one split
    if len(files) > 1 and not any(map(_role, files)):
        names = ", ".join(table.name for table in tables)
        raise UsageError(f"{folder} holds several tables ({names}): name one, or name them train.csv, test.csv …")
    for name, shards in files.items():
        if len({shard.suffix for shard in shards}) > 1:
            names = ", ".join(shard.name for shard in shards)
            raise UsageError(f"{folder} holds {name!r} in several formats ({names}): keep one")
    splits: dict[str, Callable[[], _Rows]] = {
        name: functools.partial(_read_tables, shards, has_words) for name, shards in files.items()
    }
    return _Source(str(folder), splits)


def _role(name: str) -> str | None:
    """The role that a split's name tells: `val`, `Validation` and `movies_dev` are validation."""
    roles = {SPLIT_ROLES[word] for word in re.split(r"[-_. ]+", name.lower()) if word in SPLIT_ROLES}
    return roles.pop() if len(roles) == 1 else None


# ---- splits --------------------------------------------------------------------------------------------------------


def _assign_roles(source: _Source, arguments: Any) -> dict[str, str]:
    """From train, validation and test to the names of the splits that play them; validation and test may lack."""
    roles = {}
    for role in ("train", "validation", "test"):
        asked = _option(arguments, f"{role}_split")
        if asked:
            roles[role] = _find_split(asked, source, f"--{role}_split")
    asked = list(roles.values())
    twice = [f"--{role}_split" for role, name in roles.items() if asked.count(name) > 1]
    if twice:
        raise UsageError(f"{' and '.join(twice)} name the same split, {roles[twice[0][2:-6]]!r}: leave one out")
    for role in ("train", "validation", "test"):
        free = [name for name in source.splits if name not in roles.values()]
        if role not in roles and (name := _split_for(role, free, source.name)):
            roles[role] = name
    only = list(source.splits)
    if "train" not in roles and not roles and len(only) == 1:
        roles["train"] = only[0]
    if "train" not in roles:
        raise UsageError(f"{source.name} has no train split, only {', '.join(only)}: name one with --train_split")
    return roles


def _split_for(role: str, names: list[str], source: str) -> str | None:
    """The split whose name tells `role`; one that is called just so goes before `my_train`."""
    exact = [name for name in names if SPLIT_ROLES.get(name.lower()) == role]
    fitting = exact or [name for name in names if _role(name) == role]
    if len(fitting) > 1:
        raise UsageError(f"{source}: {' and '.join(fitting)} could both be the {role} split: say --{role}_split NAME")
    return fitting[0] if fitting else None


def _find_split(asked: str, source: _Source, flag: str) -> str:
    if asked in source.splits:
        return asked
    role = SPLIT_ROLES.get(asked.lower())
    name = _split_for(role, list(source.splits), source.name) if role else None
    if name is None:
        names = list(source.splits)
        near = did_you_mean(asked, names)
        raise UsageError(f"{flag} {asked!r}: {source.name} has no such split.{near} It has: {', '.join(names)}")
    return name


def _default_split(source: _Source) -> str:
    names = list(source.splits)
    name = _split_for("test", names, source.name) or _split_for("validation", names, source.name)
    if name is None and len(names) > 1:
        raise UsageError(f"{source.name} has the splits {', '.join(names)}: say --split NAME")
    return name or names[0]


def _take_validation(
    train: datasets.Dataset, problem: Problem, fraction: float, seed: int, notes: list[str], column: str
) -> dict:
    if not 0 < fraction < 1:
        raise UsageError(f"--validation_fraction {fraction}: it must lie between 0 and 1")
    labels = labels_of(train)
    if len(labels) == 1:
        raise UsageError(
            "train has a single row, and no validation part can be taken of it: add rows or a validation split (in "
            "CoNLL files an empty line ends a row)"
        )
    taken, share = problem.held_out(labels, fraction, seed)
    if not len(taken):
        raise UsageError(
            f"{problem.nothing_to_spare} (classes by {column!r}), so no validation part can be taken: add rows or a "
            "validation split, or name another --label_column"
        )
    kept = np.setdiff1d(np.arange(len(labels)), taken)
    notes.append(f"validation: {len(taken)} of {len(labels)} train rows, {share} (seed {seed})")
    return {"train": train.select(kept), "validation": train.select(taken)}


def _take_shots(
    parts: dict[str, datasets.Dataset], shots: int, label_names: list[str], seed: int, notes: list[str]
) -> dict[str, datasets.Dataset]:
    """So many rows of each class to train on, and no more to validate on.

    A validation split of the usual size would be the larger part of the labels (Gao et al. 2021 take as many as train
    has; Perez et al. 2021 show what larger ones pretend). Without one, validation is drawn from what train has left.
    """
    train = parts["train"]
    drawn = _draw_of_each_class(train, shots, len(label_names), seed)
    for name, rows in zip(label_names, drawn, strict=True):
        if len(rows) < shots:
            count = len(rows)
            raise UsageError(
                f"--shots {shots}: train has {count} row{'' if count == 1 else 's'} of the class {name!r}. Take fewer, "
                "or add rows."
            )
    taken = np.sort(np.concatenate(drawn))
    source = parts.get("validation", train.select(np.setdiff1d(np.arange(len(train)), taken)))
    held_out = np.sort(np.concatenate(_draw_of_each_class(source, shots, len(label_names), seed)))
    if not len(held_out):
        raise UsageError(f"--shots {shots}: train has no rows left for validation. Take fewer, or add rows.")
    origin = "the validation split" if "validation" in parts else "the other train rows"
    notes.append(
        f"few-shot: {shots} rows of each class to train on, and to validate {len(held_out)} of {origin}, at most "
        f"{shots} of each class too (seed {seed})"
    )
    return {"train": train.select(taken), "validation": source.select(held_out)}


def _draw_of_each_class(part: datasets.Dataset, count: int, classes: int, seed: int) -> list[np.ndarray]:
    """Positions of at most `count` rows of each class; more rows a class begin with those that fewer would have."""
    labels = np.asarray(part["label"][:], dtype=np.int64)
    generator = np.random.default_rng(seed)
    return [generator.permutation(np.flatnonzero(labels == index))[:count] for index in range(classes)]


def _limited(part: datasets.Dataset, problem: Problem, limit: int | None, seed: int) -> datasets.Dataset:
    if limit is None or limit >= len(part):
        return part
    if limit < 1:
        raise UsageError(f"{limit} samples cannot be taken: --max_train_samples and --max_eval_samples start at 1")
    return part.select(problem.part(labels_of(part), limit, seed))


# ---- reading files in folders --------------------------------------------------------------------------------------


def _read_class_folders(folder: Path, whole: Path, modality: Modality, root: str | None) -> _Rows:
    """The rows of one split; ids start below the `whole` data folder."""
    name, plural = modality.name, modality.plural
    folders, files = _entries(folder)
    skipped: Counter[str] = Counter()
    skipped["hidden or system file"] += sum(is_stray(entry.name) for entry in folder.iterdir())
    for file in files:
        skipped[f"{name} outside the class folders" if modality.names_file(file) else _kind(file.name)] += 1
    columns: dict[str, list] = {name: [], "label": []}
    for class_folder in folders:
        found = list(_walk_files(class_folder, modality, skipped, root))
        if not found:
            skipped[f"folder without {plural} ({class_folder.name})"] += 1
        columns[name] += found
        columns["label"] += [class_folder.name] * len(found)
    if not columns[name]:
        direct = any(modality.names_file(file) for file in files)
        there = f"{plural} but no class folders" if direct else f"no {plural} in class folders"
        otherwise = f"{folder} holds {there}: put the {plural} of each class into a folder named after it"
        raise (None if direct else _of_another_task(folder, modality)) or UsageError(otherwise)
    start = os.path.abspath(whole)
    ids = [Path(os.path.relpath(file, start)).as_posix() for file in columns[name]]
    return _Rows(str(folder), columns, ids, folder=folder, class_folders=True, skipped=skipped)


def _walk_files(folder: Path, modality: Modality, skipped: Counter[str], root: str | None) -> Iterator[str]:
    """Absolute paths of the modality's files at any depth, in an order that does not depend on the disk."""
    seen: set[str] = set()
    for place, folders, files in os.walk(os.path.abspath(folder), followlinks=True):
        if os.path.realpath(place) in seen:  # a link back to a folder above
            folders[:] = []
            continue
        seen.add(os.path.realpath(_inside(place, root)))
        skipped["hidden or system file"] += sum(is_stray(name) for name in [*folders, *files])
        folders[:] = sorted(name for name in folders if not is_stray(name))
        for name in sorted(name for name in files if not is_stray(name)):
            if modality.names_file(name):
                path = _utf8(os.path.join(place, name))
                yield _inside(path, root) if os.path.islink(path) else path
            else:
                skipped[_kind(name)] += 1


def _utf8(path: str) -> str:
    """The path, which tables of rows and the predictions can hold.

    Raises:
        UsageError: its name is in another encoding.
    """
    try:
        path.encode()
    except UnicodeEncodeError as error:
        raise UsageError(f"the file name {path!r} is not UTF-8: rename it") from error
    return path


def _kind(name: str) -> str:
    suffix = os.path.splitext(name)[1].lower()
    return f"{suffix} file" if suffix else "file without a suffix"


# ---- reading tables ------------------------------------------------------------------------------------------------


def _read_tables(shards: list[Path], has_words: bool) -> _Rows:
    """The rows of one split, which may stand in several files."""
    parts = [_read_table(shard, has_words) for shard in shards]
    if len(parts) == 1:
        return parts[0]
    origin = f"{parts[0].origin} … {shards[-1].name}"
    names = [_column_names(part.data) for part in parts]
    if any(sorted(other) != sorted(names[0]) for other in names):
        raise UsageError(f"{origin}: the files have different columns")
    data: dict[str, list] | datasets.Dataset
    if isinstance(parts[0].data, datasets.Dataset):
        data = datasets.concatenate_datasets([part.data for part in parts])
    else:
        data = {name: [value for part in parts for value in part.data[name][:]] for name in names[0]}
    return _Rows(origin, data, [str(row) for row in range(sum(len(part.ids) for part in parts))], parts[0].folder)


def _read_table(path: Path, has_words: bool, tagged: bool = True) -> _Rows:
    is_conll = has_words and path.suffix.lower() in CONLL_SUFFIXES
    data: Any = read_conll(path, tagged) if is_conll else read_columns(path)
    count = len(data) if isinstance(data, datasets.Dataset) else len(next(iter(data.values()), []))
    if not count:
        raise UsageError(f"{path} has no rows")
    return _Rows(str(path), data, [str(row) for row in range(count)], folder=path.parent)


# ---- columns -------------------------------------------------------------------------------------------------------


def _column_names(data: dict[str, list] | datasets.Dataset) -> list[str]:
    return data.column_names if isinstance(data, datasets.Dataset) else list(data)


def _feature(rows: _Rows, column: str) -> Any:
    """The type that a Dataset declares for a column; None for a table that declares none."""
    return rows.data.features[column] if isinstance(rows.data, datasets.Dataset) else None


def _resolve_columns(
    rows: _Rows, arguments: Any, modality: Modality, labelled: bool = True, known: bool = False
) -> tuple[dict[str, str], list[str]]:
    """From roles to columns, and which of them were guessed; where training has said how they are called, fewer are."""
    names = _column_names(rows.data)
    wanted = [*input_roles(modality), "label"] if labelled else input_roles(modality)
    columns = {role: name for role in wanted if (name := _option(arguments, f"{role}_column"))}
    for role, several in JOINED.items():
        if role in wanted and (joint := _option(arguments, several)):
            columns[role] = _joined_name(joint)
    for role, name in columns.items():
        if name not in names:
            near = did_you_mean(name, names)
            raise UsageError(f"--{role}_column {name!r}: {rows.origin} has no such column.{near} {_listed(names)}")
    twice = [name for name, count in Counter(columns.values()).items() if count > 1]
    if twice:
        raise UsageError(f"the column {twice[0]!r} is named twice: {', '.join(f'--{role}_column' for role in columns)}")
    given = set(columns)
    others = [*_option(arguments, "number_columns", []), *_option(arguments, "category_columns", [])]

    def free() -> list[str]:
        return [name for name in names if name not in columns.values() and name not in others]

    if labelled and "label" not in columns and (name := _guess((*modality.label_columns, *LABEL_COLUMNS), free())):
        columns["label"] = name
    if not rows.class_folders and (labelled or not modality.has_texts):  # one may be missing in prediction
        _refuse_others(rows, columns, names, modality)
    if modality.has_choices and "choices" not in columns and (name := _guess(CHOICES_COLUMNS, free())):
        columns["choices"] = name
    if modality.is_text:
        columns |= _guess_texts(columns, free(), not labelled or len(names) == 2, modality)
    elif modality.name not in columns and (
        name := _guess_file(rows, free(), modality, labelled and "label" not in columns)
    ):
        columns[modality.name] = name
    if modality.has_texts:
        _add_text(rows, columns, free(), modality, known)
    if labelled and "label" not in columns and len(names) == 2 and len(free()) == 1:
        columns["label"] = free()[0]
    needed = [role for role in wanted if role != "text_pair"]
    if modality.has_texts and not labelled and columns:
        needed = []
    for role in needed:
        if role not in columns:
            several = ", or --choice_columns NAME NAME …" if role == "choices" and not known else ""
            raise UsageError(
                f"{rows.origin}: which column is the {role}? Say --{role}_column NAME{several}. {_listed(names)}"
            )
    ordered = {role: columns[role] for role in wanted if role in columns}
    return ordered, [role for role in ordered if role not in given]


def _listed(names: list[str]) -> str:
    return f"The columns are: {', '.join(repr(name) for name in names)}"


def _guess(likely: Sequence[str], names: list[str]) -> str | None:
    by_lower_case = {name.lower(): name for name in reversed(names)}
    return next((by_lower_case[name] for name in likely if name in by_lower_case), None)


def _guess_texts(columns: dict[str, str], names: list[str], other_one: bool, modality: Modality) -> dict[str, str]:
    """The text column, and the pair column where two names belong together."""
    if "text" in columns:
        return {}
    if "text_pair" not in columns and not modality.has_words and not modality.has_choices:
        for first, second in PAIR_COLUMNS:
            text, pair = _guess([first], names), _guess([second], names)
            if text and pair:
                return {"text": text, "text_pair": pair}
    others = [name for name in names if name.lower() not in LABEL_COLUMNS]
    name = _guess(modality.columns, names) or (others[0] if other_one and len(others) == 1 else None)
    return {"text": name} if name else {}


def _add_text(rows: _Rows, columns: dict[str, str], names: list[str], modality: Modality, known: bool) -> None:
    """The column of the texts beside the files, by its name, or in training as the only one left.

    Raises:
        UsageError: the two are named the wrong way round.
    """
    alone = names[0] if len(names) == 1 and not known else None
    if "text" not in columns and (name := _guess(TEXT.columns, names) or alone):
        columns["text"] = name
    file, text = (columns.get(role) for role in (modality.name, "text"))
    if file and text and not _holds(rows, file, modality) and _holds(rows, text, modality):
        raise UsageError(
            f"{rows.origin}: {text!r} holds names of {modality.plural} and {file!r} does not: say "
            f"--{modality.name}_column {text} --text_column {file}"
        )


def _guess_file(rows: _Rows, names: list[str], modality: Modality, label_unknown: bool) -> str | None:
    """By type, else by name, else the one column that holds the modality's files or their names."""
    typed = [name for name in names if modality.feature and isinstance(_feature(rows, name), modality.feature)]
    if typed:
        return typed[0]
    named = _guess(modality.columns, names)
    if named:
        return named
    fitting = [name for name in names if _holds(rows, name, modality)]
    alone = modality.has_texts or len(names) <= 1 + label_unknown
    return fitting[0] if len(fitting) == 1 and alone else None


def _holds(rows: _Rows, column: str, modality: Modality) -> bool:
    """Whether a column's type or its first values say that it holds the modality's files, or names of such files."""
    feature = _feature(rows, column)
    if feature is not None and not isinstance(feature, datasets.Value):
        is_file = isinstance(feature, dict) and "bytes" in feature
        return is_file or bool(modality.feature and isinstance(feature, modality.feature))
    values = [value for value in rows.data[column][:20] if not is_missing(value)]
    return bool(values) and all(isinstance(value, bytes) or modality.names_file(str(value)) for value in values)


def _refuse_others(rows: _Rows, columns: dict[str, str], names: list[str], modality: Modality) -> None:
    """A table of another kind of input, told by its columns.

    Raises:
        UsageError: with the task that reads it.
    """
    role = modality.name
    if not modality.is_text and (role in columns or any(_holds(rows, name, modality) for name in names)):
        return
    if modality.is_text and role not in columns and _guess(TEXT.columns, names):
        return  # texts with files beside them
    suspects = [columns[role]] if role in columns else names
    for task, kind in FILES.items():
        if kind is not modality and any(_holds(rows, name, kind) for name in suspects):
            raise UsageError(
                f"{rows.origin} holds {kind.plural}, not {modality.plural}: use {_with_recipe(task)}. {_listed(names)}"
            )
    if not modality.is_text and not _guess(modality.columns, names) and _guess(TEXT.columns, names):
        raise UsageError(
            f"{rows.origin} holds texts, not {modality.plural}: use {_with_recipe('text-classification')}. "
            f"{_listed(names)}"
        )


def _require_columns(rows: dict[str, _Rows], columns: dict[str, str], arguments: Any, notes: list[str]) -> None:
    """Every split has the columns; a test split without labels, as competitions give it, is left out."""
    for role, part in list(rows.items()):
        names = _column_names(part.data)
        missing = [name for name in columns.values() if name not in names]
        if role == "test" and missing == [columns["label"]] and not _option(arguments, "test_split"):
            notes.append(f"test: {part.origin} has no column {columns['label']!r} and is left out")
            del rows[role]
        elif missing:
            raise UsageError(f"{part.origin} has no column {missing[0]!r}, which train has. {_listed(names)}")


# ---- labels --------------------------------------------------------------------------------------------------------


def _label_cells(rows: _Rows, columns: Mapping[str, str]) -> LabelCells:
    """The column of the labels, as its problem reads it."""
    column = columns["label"]
    choices = _choices(rows, columns["choices"]) if "choices" in columns else []
    values = _by_own_names(rows, columns) if choices else rows.data[column][:]
    feature = _feature(rows, column)
    kind = getattr(feature, "feature", feature)  # of a list, else of the column
    declared = list(kind.names) if isinstance(kind, datasets.ClassLabel) else rows.label_columns
    return LabelCells(rows.origin, column, values, declared, rows.ids, rows.class_folders, choices)


def _choices(rows: _Rows, column: str) -> list[list[str]]:
    """The choices of each row.

    Raises:
        UsageError: a cell is no list of choices, or rows have not equally many.
    """
    found = []
    for row, cell in enumerate(rows.data[column][:]):
        if isinstance(cell, dict) and "text" in cell:  # as ARC and CommonsenseQA have them
            cell = cell["text"]
        if isinstance(cell, str) and cell.lstrip().startswith("["):
            with contextlib.suppress(ValueError):
                cell = json.loads(cell)
        if not isinstance(cell, list | tuple) or any(not isinstance(one, str | int | float) for one in cell):
            raise UsageError(
                f"{rows.origin}: {str(cell)[:80]!r} in the column {column!r} is no list of choices (row "
                f"{rows.ids[row]}): give each row a list of texts, or name a column for each choice (--choice_columns)"
            )
        found.append([str(one) for one in cell])
    counts = Counter(map(len, found))
    usual = counts.most_common(1)[0][0]
    other = next((row for row, own in enumerate(found) if len(own) != usual), None)
    if other is not None:
        raise UsageError(
            f"{rows.origin}: row {rows.ids[other]} has {len(found[other])} choices, and most have {usual}: give each "
            "row equally many"
        )
    if usual < 2:
        raise UsageError(f"{rows.origin}: there is nothing to choose from: give each row two choices or more")
    return found


def _by_own_names(rows: _Rows, columns: Mapping[str, str]) -> list[Any]:
    """The labels of rows whose choices bring names of their own (ARC's A to D, 1 to 4), as numbers from 0.

    Raises:
        UsageError: a label is none of the row's names.
    """
    values = rows.data[columns["label"]][:]
    cells = rows.data[columns["choices"]][:] if "choices" in columns else []
    if not all(isinstance(cell, dict) and isinstance(cell.get("label"), list) for cell in cells):
        return values
    names = [[str(name) for name in cell["label"]] for cell in cells]
    if all(own == names[0] for own in names) and names[0] == sorted(names[0]):
        return values  # places, named in order
    for row, (value, own) in enumerate(zip(values, names, strict=True)):
        if value is not None and str(value) not in own:
            raise UsageError(
                f"{rows.origin}: {value!r} is none of the names of its choices (row {rows.ids[row]}): mend it"
            )
    return [None if value is None else own.index(str(value)) for value, own in zip(values, names, strict=True)]


def _with_joined_choices(rows: _Rows, names: list[str] | None) -> _Rows:
    """One column of lists in the place of a column a choice.

    Raises:
        UsageError: there is no such column.
    """
    if not names:
        return rows
    _require_named(rows, names, "--choice_columns")
    lists = [list(row) for row in zip(*(rows.data[name][:] for name in names), strict=True)]
    return _joined_rows(rows, names, lists)


def _require_named(rows: _Rows, names: Sequence[str], flag: str) -> None:
    """Refuse names that are no columns.

    Raises:
        UsageError: as said.
    """
    there = _column_names(rows.data)
    for name in names:
        if name not in there:
            near = did_you_mean(name, there)
            raise UsageError(f"{flag} {name!r}: {rows.origin} has no such column.{near} {_listed(there)}")


def _joined_rows(rows: _Rows, names: Sequence[str], lists: list[list[Any]]) -> _Rows:
    """The rows with one column of lists in the place of some columns."""
    joined_name = _joined_name(names)
    if isinstance(rows.data, datasets.Dataset):
        kind = datasets.Sequence(datasets.Value("string"))
        data: Any = rows.data.remove_columns(list(names)).add_column(joined_name, lists, feature=kind)
    else:
        data = {name: values for name, values in rows.data.items() if name not in names} | {joined_name: lists}
    return replace(rows, data=data)


def _require_aligned(part: datasets.Dataset, tags: Sequence[Sequence[str]], rows: _Rows, cells: LabelCells) -> None:
    """Refuse rows that have not a tag for every word.

    Raises:
        UsageError: as said.
    """
    counts = [(len(lines(text)), len(own)) for text, own in zip(part["text"][:], tags, strict=True)]
    wrong = [row for row, (words, own) in enumerate(counts) if words != own]
    if wrong:
        words, own = counts[wrong[0]]
        raise UsageError(
            f"{rows.origin}: {len(wrong)} of {len(counts)} rows have not a tag for every word, the first one {words} "
            f"words and {own} tags ({cells.places(wrong)}): give as many tags as words"
        )


def _with_joined_labels(rows: _Rows, names: list[str] | None) -> _Rows:
    """One column of lists in the place of a column a label, each of which says of a row whether it has it.

    Raises:
        UsageError: there is no such column, or a cell says neither.
    """
    if not names:
        return rows
    _require_named(rows, names, "--label_columns")
    said = [[_says(value, name, rows, row) for row, value in enumerate(rows.data[name][:])] for name in names]
    lists = [[name for name, has in zip(names, row, strict=True) if has] for row in zip(*said, strict=True)]
    return replace(_joined_rows(rows, names, lists), label_columns=list(names))


def _joined_name(names: Sequence[str]) -> str:
    """What the column is called that stands for several."""
    return " + ".join(names)


def _says(value: Any, name: str, rows: _Rows, row: int) -> bool:
    """Whether a cell of a label's own column says that the row has it."""
    word = str(value).strip().lower()
    if word in ("1", "1.0", "true", "yes"):
        return True
    if word in ("0", "0.0", "false", "no"):
        return False
    raise UsageError(
        f"{rows.origin}: {str(value)[:80]!r} in the column {name!r} (row {rows.ids[row]}) says neither that a row has "
        "the label nor that it has not: write 1 or 0"
    )


# ---- the canonical data set ----------------------------------------------------------------------------------------


def _canonical(rows: _Rows, columns: dict[str, str], labels: np.ndarray | None, modality: Modality) -> datasets.Dataset:
    """The columns id, that of the modality (and text_pair), and label, whatever the source called them."""
    string = datasets.Value("string")
    features = {"id": string}
    data: dict[str, Any] = {"id": rows.ids}
    if modality.name in columns and not modality.is_text:
        column = columns[modality.name]
        if isinstance(rows.data, datasets.Dataset) and not _holds_paths(rows, column):
            embedded = _canonical_embedded(rows, column, labels, modality)
            texts = _texts(rows, columns["text"], modality) if "text" in columns else None
            return embedded if texts is None else embedded.add_column("text", texts)
        if isinstance(rows.data, datasets.Dataset) and rows.folder is None:
            raise UsageError(
                f"{rows.origin}: the column {column!r} holds names of files, and a data set of the Hub would name "
                f"files of this machine: it must hold the {modality.plural} themselves."
            )
        features[modality.name] = string
        data[modality.name] = [_absolute(value, rows.folder) for value in rows.data[column][:]]
    for role in ("text", "text_pair"):
        if role in columns:
            features[role], data[role] = string, _texts(rows, columns[role], modality)
    if "choices" in columns:
        features["choices"] = datasets.Sequence(string)
        data["choices"] = _choices(rows, columns["choices"])
    if labels is not None:
        features["label"], data["label"] = _label_feature(labels), _as_cells(labels)
    return datasets.Dataset.from_dict(data, features=datasets.Features(features))


def _label_feature(labels: np.ndarray) -> Any:
    """The type of the column `label`."""
    value = datasets.Value(str(labels.dtype))
    return value if labels.ndim == 1 else datasets.Sequence(value, length=labels.shape[1])


def _as_cells(labels: np.ndarray) -> list[Any]:
    return labels.tolist() if labels.ndim == 1 else list(labels)


def labels_of(part: datasets.Dataset) -> np.ndarray[Any, Any]:
    """The labels of a split: class ids of shape (rows,), 0 or 1 of shape (rows, labels), or numbers (rows,)."""
    return np.asarray(part.with_format("numpy", columns=["label"])["label"][:])


def _with_others(part: datasets.Dataset, rows: _Rows, arguments: Any, strict: bool) -> datasets.Dataset:
    """`numbers` and `categories` of a row beside its other inputs, each a list in the order that was asked for.

    Raises:
        UsageError: a column is not there, where `strict`, or a number is none.
    """
    names = _column_names(rows.data)
    for kind, read in (("number", as_number), ("category", as_category)):
        wanted = _option(arguments, f"{kind}_columns", [])
        values = []
        for name in wanted:
            if name not in names and strict:
                near = did_you_mean(name, names)
                raise UsageError(f"--{kind}_columns {name!r}: {rows.origin} has no such column.{near} {_listed(names)}")
            cells = rows.data[name][:] if name in names else [None] * len(part)
            try:
                values.append([read(cell) for cell in cells])
            except ValueError as error:
                raise UsageError(f"{rows.origin}: the column {name!r} holds {error}, which is no number") from error
        if wanted:
            column = [list(row) for row in zip(*values, strict=True)]
            part = part.add_column({"number": "numbers", "category": "categories"}[kind], column)
    return part


def as_number(cell: Any) -> float:
    """A number, NaN where there is none; ValueError with what is there instead."""
    if cell is None or (isinstance(cell, str) and not cell.strip()):
        return float("nan")
    try:
        return float(cell)
    except (TypeError, ValueError) as error:
        raise ValueError(repr(cell)) from error


def as_category(cell: Any) -> str:
    """Its name; empty where there is none."""
    missing = cell is None or (isinstance(cell, float) and np.isnan(cell))
    return "" if missing else str(cell).strip()


def _holds_paths(rows: _Rows, column: str) -> bool:
    feature = _feature(rows, column)
    return isinstance(feature, datasets.Value) and feature.dtype in ("string", "large_string")


def _canonical_embedded(rows: _Rows, column: str, labels: np.ndarray | None, modality: Modality) -> datasets.Dataset:
    """Files inside the data set stay where they are, on disk and undecoded."""
    assert isinstance(rows.data, datasets.Dataset)
    name, data = modality.name, rows.data.select_columns([column])
    if modality.feature and isinstance(_feature(rows, column), modality.feature):
        data = data.cast_column(column, modality.feature(decode=False))
    data = data.rename_column(column, name) if column != name else data
    data = data.add_column("id", rows.ids)
    if labels is None:
        return data.select_columns(["id", name])
    labelled = data.add_column("label", _as_cells(labels), feature=_label_feature(labels))
    return labelled.select_columns(["id", name, "label"])


def _absolute(value: Any, folder: Path | None) -> str:
    """The absolute path that a table's cell names; empty for an empty cell."""
    if value is None or not str(value).strip():
        return ""
    return os.path.abspath(os.path.join(folder or "", os.path.expanduser(str(value).strip())))


def _texts(rows: _Rows, column: str, modality: Modality) -> list[str]:
    values = rows.data[column][:]
    if modality.has_words:
        try:
            return [joined(as_words(value)) for value in values]
        except ValueError as error:
            raise UsageError(f"{rows.origin}: the column {column!r} holds {error}, not lists of words") from error
    strange = next((value for value in values if isinstance(value, (list, dict, bytes))), None)
    if strange is not None:
        raise UsageError(f"{rows.origin}: the column {column!r} holds {type(strange).__name__} values, not texts")
    return ["" if value is None else str(value) for value in values]


# ---- checks --------------------------------------------------------------------------------------------------------


def _columns_note(columns: dict[str, str], guessed: list[str], rows: _Rows) -> list[str]:
    if rows.class_folders:
        return ["columns: label ← the name of the folder"]
    named = (f"{role} ← {name!r}{' (guessed)' if role in guessed else ''}" for role, name in columns.items())
    return [f"columns: {', '.join(named)}"]


def _unused_note(source: _Source, roles: dict[str, str]) -> list[str]:
    unused = [*(name for name in source.splits if name not in roles.values()), *source.others]
    more = f" and {len(unused) - 6} more" if len(unused) > 6 else ""
    return [f"not used: {', '.join(unused[:6])}{more}"] if unused else []


def _skipped_note(rows: dict[str, _Rows]) -> list[str]:
    skipped = +sum((part.skipped for part in rows.values()), Counter())
    if not skipped:
        return []
    counts = [f"{count} × {what}" for what, count in skipped.most_common(6)]
    more = len(skipped) - len(counts)
    return [f"skipped: {', '.join(counts)}{f' and {more} more kinds' if more else ''}"]


def column_of(rows: Any, column: str) -> Iterator[Any]:
    """A column of a data set or of a list of rows, "" where there is none.

    It is read a few hundred rows at a time: a part of them may hold the bytes of files.
    """
    if not isinstance(rows, datasets.Dataset):
        yield from (row.get(column, "") for row in rows)
    elif column not in rows.column_names:
        yield from repeat("", len(rows))
    else:
        part = rows.select_columns([column])
        for start in range(0, len(part), AT_ONCE):
            yield from part[start : start + AT_ONCE][column]


def _embedded(part: datasets.Dataset, column: str) -> bool:
    return not isinstance(part.features[column], datasets.Value) or part.features[column].dtype != "string"


def _problems(part: datasets.Dataset, modality: Modality, full: bool) -> list[str | None]:
    """Why the file of a row cannot be read, or that the row has neither a file nor a text; None where all is well."""
    problems = in_threads(lambda value: modality.problem(value, full), column_of(part, modality.name))
    if not modality.has_texts:
        return problems
    gone = map(is_missing, column_of(part, modality.name))
    return [
        f"neither {modality.name} nor text" if lost and not text.strip() else problem
        for problem, lost, text in zip(problems, gone, part["text"][:], strict=True)
    ]


def _check_files(
    parts: dict[str, datasets.Dataset], modality: Modality, skip: bool, notes: list[str]
) -> dict[str, datasets.Dataset]:
    """Look for files that cannot be read: an error, or with `skip` they are dropped and counted."""
    plural = modality.plural
    total = sum(len(part) for part in parts.values())
    # What is left out must be known beforehand, whatever it takes.
    full = total <= FULL_DECODE_LIMIT or skip
    if not full and any(_embedded(part, modality.name) for part in parts.values()):
        notes.append(f"{plural}: {total} inside the data set, not checked")
        return parts
    bad: list[str] = []
    kept = {}
    for role, part in parts.items():
        problems = _problems(part, modality, full)
        rows = [row for row, problem in enumerate(problems) if problem]
        ids = part.select_columns(["id"])
        bad += [f"{ids[row]['id']} ({problems[row]})" for row in rows]
        kept[role] = part.select(np.flatnonzero([not problem for problem in problems])) if rows else part
    named = ", ".join(bad[:5]) + (f" and {len(bad) - 5} more" if len(bad) > 5 else "")
    if bad and not skip:
        raise UsageError(
            f"{len(bad)} of {total} {plural} cannot be read: {named}: repair or remove them, or go on without them "
            "with --skip_bad_files"
        )
    empty = [role for role, part in kept.items() if not len(part)]
    if empty:
        raise UsageError(f"none of the {plural} of {empty[0]} can be read: {named}")
    if bad:
        notes.append(f"{plural}: {len(bad)} of {total} cannot be read and are left out: {named}")
    elif not full:
        notes.append(f"{plural}: {total}, only their headers checked (--skip_bad_files reads them whole)")
    return kept


def _content_notes(parts: dict[str, datasets.Dataset], modality: Modality) -> list[str]:
    notes = []
    if modality.is_text:
        counts = {role: sum(not text.strip() for text in part["text"][:]) for role, part in parts.items()}
        for role, count in counts.items():
            if count == len(parts[role]):
                raise UsageError(f"every text of {role} is empty: is it the right column? (--text_column NAME)")
        found = [f"{count} in {role}" for role, count in counts.items() if count]
        notes += [f"warning: empty texts: {', '.join(found)}"] if found else []
    if modality.has_texts:
        notes += _missing_note(parts, modality)
    keys = _text_keys(parts) if modality.is_text else _file_keys(parts, modality.name)
    if keys is not None and modality.has_texts:  # the same picture with another text is another row
        texts = _text_keys(parts)
        keys = {
            role: [key and (key, text) for key, text in zip(keys[role], texts[role], strict=True)] for role in parts
        }
    if keys is None:
        return [*notes, f"duplicates: not looked for ({modality.plural} inside a large data set)"]
    found = []
    for earlier, later in (("train", "validation"), ("train", "test"), ("validation", "test")):
        if later not in parts:
            continue
        seen = {key for key in keys[earlier] if key is not None}
        count = sum(key in seen for key in keys[later])
        if count:
            found.append(f"{count} of {later} also in {earlier}")
    return [*notes, f"warning: duplicates: {', '.join(found)}" if found else "duplicates across splits: none"]


def _missing_note(parts: dict[str, datasets.Dataset], modality: Modality) -> list[str]:
    """In how many rows of each split there is a file alone, or a text alone."""
    found = []
    for role, part in parts.items():
        files = sum(map(is_missing, column_of(part, modality.name)))
        texts = sum(not text.strip() for text in part["text"][:])
        found += [f"{files} of {role} have no {modality.name}"] if files else []
        found += [f"{texts} of {role} have no text"] if texts else []
    return [f"missing: {', '.join(found)}"] if found else []


def _text_keys(parts: dict[str, datasets.Dataset]) -> dict[str, list]:
    names = [name for name in _IN_TABLES if name in next(iter(parts.values())).column_names]
    if names == ["text"]:
        return {role: part["text"][:] for role, part in parts.items()}
    return {role: list(map(repr, zip(*(part[name][:] for name in names), strict=True))) for role, part in parts.items()}


def _file_keys(parts: dict[str, datasets.Dataset], column: str) -> dict[str, list] | None:
    """A hash of each file's content; None for a file whose size no other split has, which need not be read."""
    if any(_embedded(part, column) for part in parts.values()):
        if sum(len(part) for part in parts.values()) > FULL_DECODE_LIMIT:
            return None
        return {role: in_threads(_content_digest, column_of(part, column)) for role, part in parts.items()}
    paths = {role: part[column][:] for role, part in parts.items()}
    sizes = {role: [os.path.getsize(path) if path else 0 for path in paths[role]] for role in parts}
    splits_with = Counter(size for role in parts for size in set(sizes[role]))
    wanted = {
        role: [path if splits_with[size] > 1 else None for path, size in zip(paths[role], sizes[role], strict=True)]
        for role in parts
    }
    return {role: in_threads(_digest, wanted[role]) for role in parts}


def _undated_key(value: Any) -> bytes:
    if is_missing(value):
        return b""
    source, name = source_of(value, "a file", "or both")
    return file_key(source or b"", name, dated=False)


def _content_digest(value: Any) -> bytes | None:
    return _digest(b"" if is_missing(value) else source_of(value, "a file", "or both")[0])


def _digest(source: str | bytes | None) -> bytes | None:
    if source is None:
        return None
    content = Path(source).read_bytes() if isinstance(source, str) and source else source or b""
    assert isinstance(content, bytes)
    return hashlib.blake2b(content, digest_size=16).digest()


def _without_folders(note: str, source: str) -> str:
    """A note without the places of the data and of this machine: of a path that is left its last part."""
    named = [os.path.expanduser(source)] if source and os.path.exists(os.path.expanduser(source)) else []
    for place in (*map(os.path.abspath, named), *named, os.getcwd(), os.path.expanduser("~")):
        if place.strip("/."):
            note = re.sub(rf"(?<![\w./-]){re.escape(place.rstrip('/'))}/", "", note)
    return re.sub(r"(?<![\w./~])~?/(?:[^/\s]+/)+(?=[^/\s])", "", note)
