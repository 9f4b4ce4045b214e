"""Which of a row's own choices is the right one."""

from __future__ import annotations

import string
from collections.abc import Sequence
from typing import TYPE_CHECKING

from hftl.errors import UsageError
from hftl.problems.base import LabelCells
from hftl.problems.single_label import SingleLabel, label_name

if TYPE_CHECKING:
    from hftl.arguments import TransferArguments


class Choice(SingleLabel):
    """One of the choices that a row brings; a class is a place among them, named as the data name it."""

    name = "multiple_choice"
    transformers_name = None
    words = "rows with choices of their own"
    losses = ("cross_entropy", "focal")
    is_one_of_several = False

    def check(self, arguments: TransferArguments) -> None:
        """Refuse weights of classes, which are no more than places here."""
        super().check(arguments)
        if arguments.class_weights != "none":
            raise UsageError(f"--class_weights weighs classes, and {self.words} have none. Leave it out.")

    def read(self, cells: LabelCells) -> list[str | None]:
        """The name of the right choice: its number from 0 or 1, its letter, or the choice itself."""
        found = super().read(cells)
        if cells.declared is not None:
            return found
        places = _namings(cells)
        if all(name is None or any(name in names for names in places) for name in found):
            return found
        return [self._place(value, cells, row) for row, value in enumerate(cells.values)]

    def _place(self, value: object, cells: LabelCells, row: int) -> str | None:
        """The number of the choice that a label repeats."""
        name, own = label_name(value, cells), [choice.strip() for choice in cells.choices[row]]
        if name is not None and own.count(name) != 1:
            raise UsageError(
                f"{cells.origin}: {name[:80]!r} in the column {cells.column!r} is none of the row's choices "
                f"({cells.places([row])}): give its number, its letter, or the choice itself"
            )
        return None if name is None else str(own.index(name))

    def names(self, found: Sequence[str | None], cells: LabelCells) -> list[str]:
        """As many names as a row has choices, of the kind that the labels are."""
        given = {name for name in found if name is not None}
        if cells.declared is not None:
            return cells.declared
        return next(names for names in _namings(cells) if given <= set(names))


def _namings(cells: LabelCells) -> list[list[str]]:
    """The ways in which people name one of several choices."""
    count = len(cells.choices[0])
    numbers = [str(number) for number in range(count + 1)]
    return [numbers[:-1], numbers[1:], [*string.ascii_uppercase[:count]], [*string.ascii_lowercase[:count]]]
