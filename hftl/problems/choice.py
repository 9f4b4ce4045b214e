"""Which of a row's own choices is the right one."""

from __future__ import annotations

import string
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from hftl.errors import UsageError
from hftl.metrics import share_interval
from hftl.problems.base import LabelCells
from hftl.problems.single_label import SingleLabel

if TYPE_CHECKING:
    from hftl.arguments import TransferArguments


class Choice(SingleLabel):
    """One of the choices that a row brings; a class is a place among them, named as the data name it."""

    name = "multiple_choice"
    in_transformers = False
    words = "rows with choices of their own"
    losses = ("cross_entropy", "focal")
    headline = (("accuracy", "accuracy"),)
    hub_metrics = (("accuracy", "Accuracy", "accuracy"),)
    is_one_of_several = False

    def check(self, arguments: TransferArguments) -> None:
        """Refuse weights of classes, which are no more than places here."""
        super().check(arguments)
        if arguments.class_weights != "none":
            raise UsageError(f"--class_weights weighs classes, and {self.words} have none. Leave it out.")
        several = getattr(arguments, "choice_columns", None) or []
        if several and getattr(arguments, "choices_column", None):
            raise UsageError("--choices_column and --choice_columns both say where the choices are: leave one out.")
        if len(set(several)) < len(several):
            raise UsageError("--choice_columns names a column twice: leave it out once.")

    def look_at(self, cells: LabelCells) -> list[str]:
        """How the labels name a choice."""
        if cells.declared is not None:
            return []
        naming = _naming({name for name in super().read(cells) if name is not None}, cells)
        return [f"labels: {'the choices themselves' if naming is None else f'{naming[0]} is the first choice'}"]

    def read(self, cells: LabelCells) -> list[str | None]:
        """The name of the right choice: its number from 0 or 1, its letter, or the choice itself.

        Raises:
            UsageError: a label is none of these, or may be two of them.
        """
        found = super().read(cells)
        if cells.declared is not None:
            return found
        naming = _naming({name for name in found if name is not None}, cells)
        if naming is None:
            likely = max(_namings(cells), key=lambda names: sum(name in names for name in found))
            if sum(name in likely for name in found) * 2 > len(found):  # places, but for some
                wrong = next(row for row, name in enumerate(found) if name is not None and name not in likely)
                raise self._no_choice(str(found[wrong]), cells, wrong, f"no place among {len(likely)} choices")
            return [self._place(name, cells, row) for row, name in enumerate(found)]
        for row, name in enumerate(found):
            own = [choice.strip() for choice in cells.choices[row]]
            if name in own and own.index(name) != naming.index(name):
                raise UsageError(
                    f"{cells.origin}: {name!r} in the column {cells.column!r} may be the place of a choice or the "
                    f"choice {name!r} itself ({cells.places([row])}): name the right choices in another way"
                )
        return found

    def _place(self, name: str | None, cells: LabelCells, row: int) -> str | None:
        """The number of the choice that a label repeats."""
        own = [choice.strip() for choice in cells.choices[row]]
        if name is not None and own.count(name) != 1:
            raise self._no_choice(name, cells, row, f"{'several' if name in own else 'none'} of the row's choices")
        return None if name is None else str(own.index(name))

    def _no_choice(self, name: str, cells: LabelCells, row: int, what: str) -> UsageError:
        return UsageError(
            f"{cells.origin}: {name[:80]!r} in the column {cells.column!r} is {what} ({cells.places([row])}): give in "
            "all rows the number, the letter, or the choice itself"
        )

    def names(self, found: Sequence[str | None], cells: LabelCells) -> list[str]:
        """As many names as a row has choices, of the kind that the labels are."""
        if cells.declared is not None:
            return cells.declared
        naming = _naming({name for name in found if name is not None}, cells)
        assert naming is not None  # `read` gives no others
        return naming

    def encode(self, found: Sequence[Any], names: Sequence[str], cells: LabelCells) -> npt.NDArray[np.int64]:
        """Places, shape (rows,); those of another data set may be named in another way.

        Raises:
            UsageError: rows have another number of choices than there are names.
        """
        count = len(cells.choices[0])
        if count != len(names):
            raise UsageError(f"{cells.origin}: its rows have {count} choices, and {len(names)} are chosen from.")
        given = {name for name in found if name is not None}
        naming = None if given <= set(names) else _naming(given, cells)
        if naming is not None:
            found = [None if name is None else names[naming.index(name)] for name in found]
        return super().encode(found, names, cells)

    def notes(self, train: npt.NDArray[np.int64], names: Sequence[str]) -> list[str]:
        """Nothing: which place is how frequent is of no meaning."""
        return []

    def default_metric(self, labels: npt.NDArray[np.int64], names: Sequence[str]) -> str:
        """Accuracy."""
        return "accuracy"

    def limits(
        self, scores: Mapping[str, float], rows: int, split: str, labels: npt.NDArray[Any], names: Sequence[str]
    ) -> list[str]:
        """The interval of the accuracy."""
        low, high = share_interval(round(scores["accuracy"] * rows), rows)
        said = f"Accuracy on {rows:,} rows of {split}: with 95 % confidence between {low:.3f} and {high:.3f}."
        return [
            said,
            f"Whatever it is given, it answers with one of the choices; a guess is right in {1 / len(names):.2f}.",
        ]


def _naming(given: set[str], cells: LabelCells) -> list[str] | None:
    """The first way of naming choices that has all the names; None where there is none."""
    return next((names for names in _namings(cells) if given <= set(names)), None)


def _namings(cells: LabelCells) -> list[list[str]]:
    """The ways in which people name one of several choices."""
    count = len(cells.choices[0])
    numbers = [str(number) for number in range(count + 1)]
    return [numbers[:-1], numbers[1:], [*string.ascii_uppercase[:count]], [*string.ascii_lowercase[:count]]]
