"""A tag for every word of a row: names of people and places, parts of speech."""

from __future__ import annotations

import importlib.util
import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from hftl.errors import UsageError
from hftl.metrics import TAG_METRICS, softmax, tag_metrics
from hftl.problems.base import LabelCells, Problem, class_notes
from hftl.problems.multi_label import MultiLabel
from hftl.problems.single_label import check_known, few_rows, in_order, label_name
from hftl.words import lines

if TYPE_CHECKING:
    import torch

    from hftl.arguments import TransferArguments
    from hftl.losses import Loss

#: in the labels of a row behind its last word, and of tokens that are no word's first; what torch leaves out of a loss
NO_WORD = -100
#: what other programs write where a word, or a part of one, has no tag
_NO_TAGS = ("-100", "-1")
#: the tag of words that belong to nothing
OUTSIDE = "O"
#: in the place of the tag of a word that the model has not read
UNREAD = "_"
#: the place in an entity, as the tags of all schemes (IOB1, IOB2, IOBES, BILOU, BMES) say it, and as seqeval reads it
_PLACES = {"B": "B", "I": "I", "M": "I", "E": "E", "L": "E", "S": "S", "U": "S"}


@dataclass(frozen=True)
class Entity:
    """Words that belong together.

    Attributes:
        kind: what they are.
        start: number of the first word, from 0.
        end: number of the word behind the last one.
        text: the words, with a space between each.
        probability: of the least sure tag.
    """

    kind: str
    start: int
    end: int
    text: str
    probability: float


@dataclass(frozen=True)
class TagsPrediction:
    """What the model says of the words of one input.

    Attributes:
        id: path or position of the input.
        words: of it.
        tags: of each word; `_` of those that the model has not read, since the input is too long or they are no
            tokens to it.
        probabilities: of those tags; 0 of words not read.
        entities: what the tags say together; empty where they are not of that kind (parts of speech).
    """

    id: str
    words: list[str]
    tags: list[str]
    probabilities: list[float]
    entities: list[Entity]

    def cells(self) -> list[str]:
        """Those of `Problem.answer_columns`."""
        least = min(self.probabilities, default=1.0)
        found = [{**asdict(entity), "probability": round(entity.probability, 6)} for entity in self.entities]
        return [
            " ".join(self.tags),
            f"{least:.6f}",
            *(json.dumps(value, ensure_ascii=False) for value in (self.words, found)),
        ]


class WordTags(Problem):
    """A tag for every word of a row; labels of shape (rows, words), `NO_WORD` behind the last word of each."""

    name = "token_classification"
    in_transformers = False
    words = "tags of words"
    share = "drawn by the rarest tag of each"
    metric_names = TAG_METRICS
    headline = (("f1", "F1"), ("accuracy", "accuracy of words"))
    hub_metrics = (
        ("f1", "F1", "f1"),
        ("precision", "Precision", "precision"),
        ("recall", "Recall", "recall"),
        ("accuracy", "Accuracy", "accuracy"),
    )
    losses = ("cross_entropy", "focal")
    activation = ".softmax(-1)"
    without_score = "it has no entities"

    def __init__(self) -> None:
        """Refuse to go without the package that scores entities.

        Raises:
            UsageError: as said.
        """
        if importlib.util.find_spec("seqeval") is None:
            raise UsageError("Tagged words are scored by seqeval, which is not installed: pip install 'hftl[tags]'")

    def check(self, arguments: TransferArguments) -> None:
        """Refuse metrics of others, which take classes."""
        super().check(arguments)
        if arguments.metrics:
            raise UsageError(f"--metrics of other libraries take one class a row, not {self.words}. Leave it out.")

    def read(self, cells: LabelCells) -> list[list[str] | None]:
        """The tags of each row; None where there are none."""
        return [self._tags(value, cells, row) for row, value in enumerate(cells.values)]

    def _tags(self, value: Any, cells: LabelCells, row: int) -> list[str] | None:
        """Those of one cell: a list, one written as JSON, or a text with spaces between them."""
        if value is None or (isinstance(value, float) and np.isnan(value)):
            return None
        try:
            entries = json.loads(value) if isinstance(value, str) and value.lstrip().startswith("[") else value
        except ValueError:
            entries = None
        entries = entries.split() if isinstance(entries, str) else entries
        if not isinstance(entries, list | tuple):
            raise UsageError(
                f"{cells.origin}: {str(value)[:80]!r} in the column {cells.column!r} is no list of tags "
                f"({cells.places([row])}): give each row a tag for every word, as a list or with spaces between them"
            )
        if cells.declared is not None and entries and not isinstance(entries[0], str):  # numbers of a ClassLabel
            entries = [cells.declared[entry] if entry is not None and entry >= 0 else None for entry in entries]
        named = [None if entry is None else label_name(entry, cells) for entry in entries]
        named = [None if name in _NO_TAGS else name for name in named]
        if None in named:
            raise UsageError(
                f"{cells.origin}: the tag of word {named.index(None) + 1} is missing ({cells.places([row])}): "
                "fill it in"
            )
        tags = [str(name) for name in named]
        spaced = next((tag for tag in tags if len(tag.split()) != 1), None)
        if spaced is not None:
            raise UsageError(
                f"{cells.origin}: the tag {spaced!r} has a space in it ({cells.places([row])}): a tag is one word"
            )
        return tags

    def names(self, found: Sequence[list[str] | None], cells: LabelCells) -> list[str]:
        """The tags: as the data set declares them, else those of the training rows.

        Of entities every kind gets all the places that any has: in few rows a name of two words may be missing.
        """
        if cells.declared is not None:
            return cells.declared
        names = in_order({tag for tags in found for tag in tags or ()})
        if not is_entities(names):
            return names
        places = sorted({name[0] for name in names if name != OUTSIDE})
        return [OUTSIDE, *(f"{place}-{kind}" for kind in sorted(kinds_of(names)) for place in places)]

    def encode(
        self, found: Sequence[list[str] | None], names: Sequence[str], cells: LabelCells
    ) -> npt.NDArray[np.int64]:
        """Ids of the tags, shape (rows, words of the longest row)."""
        cells.check_all_there(found)
        index = {name: number for number, name in enumerate(names)}
        rows = [tags or [] for tags in found]
        check_known(rows, index, cells)
        encoded = np.full((len(rows), max(1, *map(len, rows))), NO_WORD, dtype=np.int64)
        for row, tags in enumerate(rows):
            encoded[row, : len(tags)] = [index[tag] for tag in tags]
        return encoded

    def require_enough(self, labels: npt.NDArray[np.int64], names: Sequence[str], origin: str) -> None:
        """Refuse fewer than two tags."""
        present = np.unique(labels[labels >= 0]).tolist()
        if len(present) < 2:
            found = f"one tag only, {names[present[0]]!r}" if present else "no tags left"
            raise UsageError(f"{origin} has {found}: there is nothing to tell apart")

    def strata(self, labels: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """The rarest tag of each row, as `MultiLabel.strata`."""
        return MultiLabel().strata(_presence(labels))

    def counts(self, labels: npt.NDArray[np.int64], names: Sequence[str]) -> list[int]:
        """Words of each tag."""
        return np.bincount(labels[labels >= 0], minlength=len(names)).tolist()

    def classes(self, labels: npt.NDArray[np.int64], names: Sequence[str]) -> dict[str, int]:
        """How many entities of each kind there are, or of tags of another sort how many words."""
        if not is_entities(names):
            return super().classes(labels, names)
        kinds = np.array([name.partition("-")[2] for name in names])
        found = Counter(kinds[labels[_begins(labels, names)]].tolist())
        return {kind: found[kind] for kind in kinds_of(names)}

    def notes(self, train: npt.NDArray[np.int64], names: Sequence[str]) -> list[str]:
        """How long the rows are, kinds that are rare, and entities that begin as none should."""
        lengths = (train >= 0).sum(axis=1)
        unit = "entities" if is_entities(names) else "words"
        said = [f"words a row in train: {lengths.mean():.1f} on average, {lengths.max()} at most; counted: {unit}"]
        if any(name.startswith("B-") for name in names) and is_entities(names):
            usual = [number for number, name in enumerate(names) if name[0] in "BSU"]
            odd = int((_begins(train, names) & ~np.isin(train, usual)).sum())
            said += [f"tags: {odd} entities begin with another tag than B-; they count all the same"] if odd else []
        counts = self.classes(train, names)
        return [*said, *class_notes(list(counts.values()), list(counts))]

    def loss(self, arguments: TransferArguments, labels: npt.NDArray[np.int64], names: Sequence[str]) -> Loss:
        """Cross entropy of the words, or what was asked for."""
        from hftl.losses import WordLoss, make_single_label_loss

        return WordLoss(make_single_label_loss(arguments, self.counts(labels, names)))

    def items(self, labels: torch.Tensor) -> int:
        """Words."""
        return int((labels != NO_WORD).sum())

    def default_metric(self, labels: npt.NDArray[np.int64], names: Sequence[str]) -> str:
        """F1 of the entities; of tags of another sort accuracy."""
        return "f1" if is_entities(names) else "accuracy"

    def metrics(self, logits: npt.NDArray[Any], labels: npt.NDArray[Any], names: Sequence[str]) -> dict[str, float]:
        """As `tag_metrics`; logits of shape (rows, words or tokens, tags), no numbers where a word was not read."""
        found, there = self.decided(_as_wide(logits, labels)), labels != NO_WORD
        tags = [*names, ""]  # the last one is that of words that were not read, which is always wrong
        pairs = [
            ([tags[tag] for tag in label[own]], [tags[tag] for tag in said[own]])
            for label, said, own in zip(labels, found, there, strict=True)
        ]
        reads = as_seqeval if is_entities(names) else None
        return tag_metrics([label for label, _ in pairs], [said for _, said in pairs], reads)

    def decided(self, logits: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """Ids of the tags, shape (rows, words); -1 of words that were not read."""
        return np.where(np.isnan(logits[..., 0]), -1, np.nan_to_num(logits).argmax(axis=-1))

    def unsure(self, logits: torch.Tensor, rounding: float) -> torch.Tensor:
        """Whether the two best tags of a token lie near to one another."""
        best = logits.topk(2, dim=-1).values
        return ~(best[..., 0] - best[..., 1] >= rounding).all(dim=1)

    def comparable(
        self, logits: npt.NDArray[Any], labels: npt.NDArray[Any]
    ) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
        """Logits as wide as the labels; of words that were not read no labels."""
        found = _as_wide(logits, labels)
        return np.nan_to_num(found), np.where(np.isnan(found[..., 0]), NO_WORD, labels)

    def answers(
        self, rows: Sequence[Mapping[str, Any]], logits: npt.NDArray[Any], names: Sequence[str]
    ) -> list[TagsPrediction]:
        """The tag of each word, and the entities that they make."""
        words = [lines(row["text"]) for row in rows]
        return [
            self._answer(row["id"], own, values[: len(own)], names)
            for row, own, values in zip(rows, words, logits, strict=True)
        ]

    def _answer(self, row_id: str, words: list[str], logits: npt.NDArray[Any], names: Sequence[str]) -> TagsPrediction:
        decided = self.decided(logits[None])[0]
        best = softmax(np.nan_to_num(logits)).max(axis=1) if len(words) else np.zeros(0)
        best = np.where(decided < 0, 0.0, best)
        tags = [names[tag] if tag >= 0 else UNREAD for tag in decided]
        found = entities_of(tags) if is_entities(names) else []
        entities = [
            Entity(kind, start, end + 1, " ".join(words[start : end + 1]), float(best[start : end + 1].min()))
            for kind, start, end in found
        ]
        return TagsPrediction(row_id, words, tags, best.tolist(), entities)

    def answer_columns(self, names: Sequence[str]) -> list[str]:
        """The tags, with spaces between them; the probability of the least sure one; words and entities as JSON."""
        return ["prediction", "least_probability", "words", "entities"]

    def label_cell(self, label: Any, names: Sequence[str]) -> str:
        """The tags with spaces between them."""
        return " ".join(names[tag] for tag in label if tag >= 0)

    def limits(
        self, scores: Mapping[str, float], rows: int, split: str, labels: npt.NDArray[Any], names: Sequence[str]
    ) -> list[str]:
        """What counts as right, and kinds with few examples."""
        counts = self.classes(labels, names)
        exact = "An entity counts as right only where its kind and both its ends are." if is_entities(names) else ""
        read = f"Accuracy of single words on {rows:,} rows of {split}: {scores['accuracy']:.3f}."
        return [*filter(None, [exact]), read, *few_rows(list(counts.values()), list(counts), "examples")]


def is_entities(names: Sequence[str]) -> bool:
    """Whether tags say where something begins and goes on (B-…, I-…, O), unlike parts of speech."""
    return any(name != OUTSIDE for name in names) and all(
        name == OUTSIDE or re.match(r"[BIMELSU]-.", name) for name in names
    )


def kinds_of(names: Sequence[str]) -> list[str]:
    """The kinds of entities of which there are tags."""
    return list(dict.fromkeys(name.partition("-")[2] for name in names if name != OUTSIDE))


def entities_of(tags: Sequence[str]) -> list[tuple[str, int, int]]:
    """Kind, first and last word of every entity, as seqeval finds them."""
    from seqeval.metrics.sequence_labeling import get_entities

    return [tuple(entity) for entity in get_entities(as_seqeval(tags))]


def _begins(labels: npt.NDArray[np.int64], names: Sequence[str]) -> npt.NDArray[np.bool_]:
    """Whether an entity begins at a word, as seqeval has it, which takes seconds for thousands of rows."""
    read = [*as_seqeval(names), OUTSIDE]  # the last one is that of no word
    places, kinds = np.array([tag[0] for tag in read]), np.array([tag[2:] for tag in read])
    ids = np.where(labels < 0, len(names), labels)
    before = np.concatenate([np.full((len(ids), 1), len(names)), ids[:, :-1]], axis=1)
    goes_on = np.isin(places[ids], ["I", "E"]) & np.isin(places[before], ["B", "I"]) & (kinds[ids] == kinds[before])
    return (places[ids] != OUTSIDE) & ~goes_on


def as_seqeval(tags: Sequence[str]) -> list[str]:
    """Tags of any scheme in the letters that seqeval knows; what was not read belongs to nothing."""
    return [OUTSIDE if tag in (OUTSIDE, UNREAD, "") else _PLACES[tag[0]] + tag[1:] for tag in tags]


def _as_wide(logits: npt.NDArray[Any], labels: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Logits of as many words a row as there are labels, (rows, words, tags); no numbers where there were fewer."""
    width = min(logits.shape[1], labels.shape[1])
    found = np.full((*labels.shape, logits.shape[2]), np.nan, dtype=logits.dtype)
    found[:, :width] = logits[:, :width]
    return found


def _presence(labels: npt.NDArray[np.int64]) -> npt.NDArray[np.float32]:
    """1 where a row has a tag, shape (rows, tags)."""
    there = np.zeros((len(labels), max(int(labels.max()), 0) + 1), dtype=np.float32)
    rows, places = np.nonzero(labels >= 0)
    there[rows, labels[rows, places]] = 1
    return there
