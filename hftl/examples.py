"""What a report shows of single rows: which ones, and what is kept of them so that it can be made anew in a moment."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from hftl.answers import Answers
from hftl.finished import Finished
from hftl.folder import LOGS, PREDICTIONS, read_json, say, write_text
from hftl.label_errors import likely_label_errors

#: in the logs: what the report shows of single rows
_FILE = "examples.json"
#: examples in the gallery …
_EXAMPLES = 12
#: … and how many of them with what the answer rests on, which takes some passes of the model for each
EXPLAINED = 6
#: right answers, of as many classes
_RIGHT = 3
#: bytes of the file: a report has under 3 MB
_LARGEST = 2_500_000
#: that a feature can be
_FARTHEST = 1e100
#: an address that holds what it is of, and leads nowhere
_PICTURE, _SOUND = (re.compile(rf"data:{kind}/[\w.+-]+;base64,[A-Za-z0-9+/=]*") for kind in ("image", "audio"))


@dataclass
class Shown:
    """A row as a person sees it.

    Attributes:
        pictures: data address and description of each.
        texts: each in pieces, with what the piece adds to the class, from -1 to 1; 0 where that is not known.
        sounds: data address of each.
    """

    pictures: list[tuple[str, str]] = field(default_factory=list)
    texts: list[list[tuple[str, float]]] = field(default_factory=list)
    sounds: list[str] = field(default_factory=list)

    @property
    def is_explained(self) -> bool:
        """Whether it is said what the answer rests on."""
        return len(self.pictures) > 1 or any(weight for pieces in self.texts for _, weight in pieces)

    @property
    def is_there(self) -> bool:
        """Whether there is anything to see or to hear."""
        return bool(self.pictures or self.texts or self.sounds)


@dataclass
class Places:
    """Rows on a map, see `hftl.feature_map`.

    Attributes:
        numbers: of the rows in predictions.csv.
        points: across and up, of each.
        explained: part of the variance of the features that the two directions have.
        pure: part of the rows whose nearest other row, in all directions, is of the same class.
    """

    numbers: list[int]
    points: list[tuple[float, float]]
    explained: float
    pure: float


@dataclass
class Examples:
    """What a report shows of single rows.

    Attributes:
        answers: SHA-256 of the predictions.csv that it is for.
        mistakes: the surest of the wrong answers.
        right: the surest right answer of some classes.
        label_errors: the likeliest of the wrong labels.
        map: where the features put some of the rows; None where the model has none, or they were not at hand.
    """

    answers: str
    mistakes: list[Shown]
    right: list[Shown]
    label_errors: list[Shown]
    map: Places | None


def surest_mistakes(answers: Answers) -> list[int]:
    """Rows of the wrong answers of which the model is surest."""
    return answers.surest(np.flatnonzero(~answers.correct))[:_EXAMPLES].tolist()


def surest_of_classes(answers: Answers) -> list[int]:
    """Of the classes with most right answers the row of which the model is surest."""
    order = answers.surest(np.flatnonzero(answers.correct))
    _, first, counts = np.unique(answers.labels[order], return_index=True, return_counts=True)
    return order[first[np.argsort(-counts, kind="stable")]][:_RIGHT].tolist()


def suspicious(answers: Answers) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], list[int]]:
    """As `likely_label_errors`, and the rows that are shown."""
    found, rather = likely_label_errors(answers.probabilities, answers.labels)
    return found, rather, found[:_EXAMPLES].tolist()


def digest_of_answers(run: Finished) -> str:
    """What `Examples.answers` is of the predictions.csv that is there."""
    return hashlib.sha256((run.folder / PREDICTIONS).read_bytes()).hexdigest()


def read_examples(run: Finished) -> Examples | None:
    """What was kept when the answers were given; None where there is nothing, or not of these answers."""
    path = run.folder / LOGS / _FILE
    if not path.exists():
        return None
    answers = run.answers
    try:
        if path.stat().st_size > _LARGEST:
            raise ValueError("it is larger than a report may be")
        content = read_json(path)
        json.dumps(content, ensure_ascii=False).encode()  # half a character cannot be written
        if content["answers"] != digest_of_answers(run):
            return None
        return Examples(
            content["answers"],
            _read_rows(content["mistakes"], len(surest_mistakes(answers))),
            _read_rows(content["right"], len(surest_of_classes(answers))),
            _read_rows(content["label_errors"], len(suspicious(answers)[2])),
            content["map"] and _read_map(content["map"], len(answers.ids)),
        )
    except (ValueError, LookupError, TypeError, AttributeError, OverflowError, OSError) as error:
        say(f"{path} is damaged ({type(error).__name__}: {str(error)[:200]}), and made anew")
        return None


def _read_rows(rows: list[dict[str, Any]], count: int) -> list[Shown]:
    """The run may come from elsewhere: what stands in the page as it is must be what it should be."""
    shown = [
        Shown(
            [(str(address), str(what)) for address, what in row["pictures"]],
            [[(str(piece), float(weight)) for piece, weight in text] for text in row["texts"]],
            list(map(str, row["sounds"])),
        )
        for row in rows
    ]
    if len(shown) != count:
        raise ValueError(f"it has {len(shown)} rows where {count} are shown")
    for row in shown:
        if not all(_PICTURE.fullmatch(address) for address, _ in row.pictures):
            raise ValueError("a picture is none")
        if not all(_SOUND.fullmatch(address) for address in row.sounds):
            raise ValueError("a sound is none")
        if not all(abs(weight) <= 1 + 1e-9 for text in row.texts for _, weight in text):
            raise ValueError("a weight is none")
    return shown


def _read_map(content: dict[str, Any], rows: int) -> Places:
    numbers = [int(number) for number in content["numbers"]]
    points = [(float(x), float(y)) for x, y in content["points"]]
    found = Places(numbers, points, float(content["explained"]), float(content["pure"]))
    known = set(numbers) <= set(range(rows)) and len(set(numbers)) == len(numbers) == len(points) > 0
    shares = all(0 <= share <= 1 + 1e-9 for share in (found.explained, found.pure))
    if not (known and shares and all(abs(value) < _FARTHEST for point in points for value in point)):
        raise ValueError("the points of the map are not those of its rows")
    return found


def write_examples(run: Finished, examples: Examples) -> None:
    """Keep them for `read_examples`."""
    path = run.folder / LOGS / _FILE
    path.parent.mkdir(exist_ok=True)  # a run from the Hub has no logs
    text = json.dumps(dataclasses.asdict(examples), ensure_ascii=False)
    if len(text.encode()) > _LARGEST:
        say(f"examples: {len(text) / 1e6:.1f} MB are too much to be kept, and are made anew with each report")
    else:
        write_text(path, text)
