"""Any number of labels for every row: none, one or several."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from hftl.errors import UsageError
from hftl.metrics import MULTI_LABEL_METRICS, multi_label_metrics, sigmoid
from hftl.problems.base import LabelCells, Problem, Result, class_notes
from hftl.problems.single_label import check_known, few_rows, in_order, label_name

if TYPE_CHECKING:
    import torch
    from torch import nn

    from hftl.arguments import TransferArguments
    from hftl.losses import Loss

#: what may stand between the labels of a cell; that of most cells does
_SEPARATORS = ("|", ";", ",")
#: rows with and without a label that validation needs for a threshold of its own: with 20 to 48 of each of ten labels
#: in 200 rows (built-in digits, EfficientNet-Lite0) macro F1 on test was 0.44 with own ones and 0.46 with a common one
_ENOUGH = 50
#: the threshold where nothing tells another
_HALF = 0.5


@dataclass(frozen=True)
class LabelsPrediction:
    """What the model says of one input that may have several labels.

    Attributes:
        id: path or position of the input.
        labels: names of those whose probability reaches their threshold.
        probabilities: of every label by name; each by itself, so that they do not sum to 1.
    """

    id: str
    labels: list[str]
    probabilities: dict[str, float]

    def cells(self) -> list[str]:
        """Those of `Problem.answer_columns`."""
        return [_as_cell(self.labels), *(f"{probability:.6f}" for probability in self.probabilities.values())]


@dataclass
class MultiLabel(Problem):
    """Any number of labels for every row.

    Attributes:
        separator: what stands between the labels of a cell; None where cells are lists, or hold one label each.
        thresholds: the probability from which on a row has a label, one for all, or one a label; chosen on validation.
    """

    name = "multi_label_classification"
    words = "rows of several labels"
    share = "drawn by the rarest label of each"
    metric_names = MULTI_LABEL_METRICS
    headline = (("mean_average_precision", "mAP"), ("f1_macro", "macro F1"), ("f1_micro", "micro F1"))
    hub_metrics = (("f1", "Macro F1", "f1_macro"), ("f1", "Micro F1", "f1_micro"))
    losses = ("cross_entropy", "focal")
    activation = ".sigmoid()"
    without_score = "no row of it has a label"

    separator: str | None = None
    thresholds: npt.NDArray[np.float64] = field(default_factory=lambda: np.array(_HALF))

    def check(self, arguments: TransferArguments) -> None:
        """Refuse metrics of others, which take classes."""
        super().check(arguments)
        if arguments.metrics:
            raise UsageError(f"--metrics of other libraries take one class a row, not {self.words}. Leave it out.")
        if arguments.label_columns and arguments.label_column:
            raise UsageError("--label_column and --label_columns both say where the labels are: leave one out.")
        if arguments.label_columns and len(set(arguments.label_columns)) < len(arguments.label_columns):
            raise UsageError("--label_columns names a column twice: leave it out once.")
        if arguments.label_separator == "" or (arguments.label_separator and arguments.label_columns):
            raise UsageError("--label_separator is what stands between the labels of a cell: leave it out.")

    def look_at(self, cells: LabelCells) -> list[str]:
        """What separates the labels of a cell, where nobody has said it."""
        texts = [value for value in cells.values if isinstance(value, str) and not value.strip().startswith("[")]
        counts = {mark: sum(mark in text for text in texts) for mark in _SEPARATORS}
        if self.separator is None and any(counts.values()):
            self.separator = max(counts, key=lambda mark: counts[mark])
        if not self.separator or not texts:
            return []
        others = [repr(mark) for mark, count in counts.items() if count and mark != self.separator]
        left = f"; {' and '.join(others)} belong to names (--label_separator says otherwise)" if others else ""
        return [f"labels: separated by {self.separator!r} in {cells.column!r}{left}"]

    def read(self, cells: LabelCells) -> list[list[str] | None]:
        """The labels of each row; None where there is no list, which is something else than an empty one."""
        lists = [value for value in cells.values if isinstance(value, list)]
        same_length = len({len(value) for value in lists}) == 1 and len(lists[0]) > 1
        entries = {str(entry) for value in lists for entry in value} if same_length and cells.declared is None else ()
        if entries in ({"0", "1"}, {"0.0", "1.0"}, {"False", "True"}):
            raise UsageError(
                f"{cells.origin}: the column {cells.column!r} holds lists of 0 and 1, which do not say what the labels "
                "are called: give the names that a row has, or a column for each (--label_columns)"
            )
        return [self._labels(value, cells, row) for row, value in enumerate(cells.values)]

    def _labels(self, value: Any, cells: LabelCells, row: int) -> list[str] | None:
        """Those of one cell: a list, one written as JSON, or texts with the separator between them."""
        if value is None or (isinstance(value, float) and np.isnan(value)):
            return None
        if isinstance(value, str) and value.strip().startswith("["):
            try:
                value = json.loads(value)
            except ValueError as error:
                raise UsageError(
                    f"{cells.origin}: {value[:80]!r} in the column {cells.column!r} is no list of labels "
                    f'({cells.places([row])}): write ["a", "b"], or a{self.separator or ";"}b'
                ) from error
        elif isinstance(value, str):
            value = value.split(self.separator) if self.separator else [value]
        entries = value if isinstance(value, list | tuple) else [value]
        if any(entry is None or (cells.declared is not None and entry == -1) for entry in entries):
            raise UsageError(f"{cells.origin}: a label is missing among those of {cells.places([row])}: fill it in")
        if cells.declared is not None and entries and not isinstance(entries[0], str):  # numbers of a ClassLabel
            return [cells.declared[entry] for entry in entries]
        if any(isinstance(entry, list | tuple | dict) for entry in entries):
            raise UsageError(
                f"{cells.origin}: the column {cells.column!r} holds other things than labels in its lists "
                f"({cells.places([row])}): give each row one list of names"
            )
        return [name for entry in entries if (name := label_name(entry, cells)) is not None]

    def names(self, found: Sequence[list[str] | None], cells: LabelCells) -> list[str]:
        """The labels: as the data set declares them, or the columns that hold them; else those of the training rows."""
        if cells.declared is not None:
            return cells.declared
        return in_order({name for labels in found for name in labels or ()})

    def encode(
        self, found: Sequence[list[str] | None], names: Sequence[str], cells: LabelCells
    ) -> npt.NDArray[np.float32]:
        """1 where a row has a label and 0 elsewhere, shape (rows, labels)."""
        cells.check_all_there(found)
        index = {name: number for number, name in enumerate(names)}
        rows = [labels or [] for labels in found]
        check_known(rows, index, cells)
        encoded = np.zeros((len(rows), len(names)), dtype=np.float32)
        for row, labels in enumerate(rows):
            encoded[row, [index[label] for label in labels]] = 1
        return encoded

    def require_enough(self, labels: npt.NDArray[Any], names: Sequence[str], origin: str) -> None:
        """Refuse rows that are all alike."""
        if not len(labels) or (labels == labels[0]).all():
            found = "no rows left" if not len(labels) else "the same labels in every row"
            raise UsageError(f"{origin} has {found}: there is nothing to tell apart")

    def strata(self, labels: npt.NDArray[Any]) -> npt.NDArray[np.int64]:
        """The rarest label of each row that another row has too, one more number for none.

        Rare labels first, as in iterative stratification (Sechidis et al. 2011): a part would miss these most easily.
        """
        there = labels.sum(axis=0)
        rows_of_label = np.where((labels > 0) & (there > 1), there, np.inf)
        return np.where(np.isfinite(rows_of_label).any(axis=1), rows_of_label.argmin(axis=1), labels.shape[1])

    def counts(self, labels: npt.NDArray[Any], names: Sequence[str]) -> list[int]:
        """Rows that have each label."""
        return labels.sum(axis=0).astype(int).tolist()

    def notes(self, train: npt.NDArray[Any], names: Sequence[str]) -> list[str]:
        """How many labels a row has, names that are nearly one, and labels with a single row."""
        each = train.sum(axis=1)
        line = f"labels a row in train: {each.mean():.2f} on average, {each.max():.0f} at most"
        none = int((each == 0).sum())
        line += f"; {none} of {len(train)} have none" if none else ""
        return [line, *class_notes(self.counts(train, names), names)]

    def prepare(self, model: nn.Module, labels: npt.NDArray[Any], keeps_head: bool) -> None:
        """One half is the threshold of all labels, until validation has told better ones."""
        self.thresholds = np.array(_HALF)

    def loss(self, arguments: TransferArguments, labels: npt.NDArray[Any], names: Sequence[str]) -> Loss:
        """Binary cross entropy of every label, or what was asked for."""
        from hftl.losses import make_multi_label_loss

        return make_multi_label_loss(arguments, self.counts(labels, names), len(labels))

    def metrics(self, logits: npt.NDArray[Any], labels: npt.NDArray[Any], names: Sequence[str]) -> dict[str, float]:
        """As `multi_label_metrics`, at the thresholds."""
        return multi_label_metrics(sigmoid(logits), labels, names, self.thresholds)

    def conclude(self, model: nn.Module, results: dict[str, Result], names: Sequence[str]) -> dict[str, Result]:
        """Choose the thresholds on validation; test is scored at them."""
        logits, labels, _ = results["validation"]
        self.thresholds = best_thresholds(sigmoid(logits), labels)
        return {
            split: (logits, labels, scores | self.metrics(logits, labels, names))
            for split, (logits, labels, scores) in results.items()
        }

    def kept(self, names: Sequence[str]) -> dict[str, Any]:
        """The thresholds by name, and what separates labels."""
        thresholds = np.broadcast_to(self.thresholds, len(names)).tolist()
        return {"thresholds": dict(zip(names, thresholds, strict=True)), "label_separator": self.separator}

    def restore(self, metrics: Mapping[str, Any], names: Sequence[str]) -> None:
        """What `kept` gave."""
        self.thresholds = np.array([float(metrics["thresholds"][name]) for name in names])
        self.separator = metrics["label_separator"]

    def unsure(self, logits: torch.Tensor, rounding: float) -> torch.Tensor:
        """Whether a label lies near to its threshold."""
        import torch

        thresholds = torch.from_numpy(self.thresholds).to(logits).clamp(1e-6, 1 - 1e-6).logit()
        return ~((logits - thresholds).abs() >= rounding).all(dim=1)

    def answers(
        self, rows: Sequence[Mapping[str, Any]], logits: npt.NDArray[Any], names: Sequence[str]
    ) -> list[LabelsPrediction]:
        """The labels of each row, and the probabilities of all."""
        return [
            LabelsPrediction(
                row["id"],
                [name for name, there in zip(names, values >= self.thresholds, strict=True) if there],
                dict(zip(names, map(float, values), strict=True)),
            )
            for row, values in zip(rows, sigmoid(logits), strict=True)
        ]

    def label_cell(self, label: Any, names: Sequence[str]) -> str:
        """The labels as a list in JSON, which is read back exactly."""
        return _as_cell([name for name, there in zip(names, label, strict=True) if there])

    def limits(
        self, scores: Mapping[str, float], rows: int, split: str, labels: npt.NDArray[Any], names: Sequence[str]
    ) -> list[str]:
        """How often all of a row is right, rare labels, and where the thresholds are from."""
        exact = f"All labels of a row are right for {scores['subset_accuracy']:.1%} of {rows:,} rows of {split}."
        chosen = (
            "A row has a label from that label's threshold on. Thresholds were chosen on validation, whose F1 is the "
            "better for it."
        )
        return [exact, *few_rows(self.counts(labels, names), names), chosen]


def best_thresholds(probabilities: npt.NDArray[Any], labels: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
    """For every label the probability from which on F1 is best (SCut, Yang 2001), shape (labels,).

    A label with few rows would get the luck of these; it takes the threshold that is best for all labels together.

    Args:
        probabilities: shape (rows, labels).
        labels: 0 or 1, of the same shape.
    """
    common = _best_threshold(probabilities.ravel(), labels.ravel())
    there = labels.sum(axis=0)
    enough = (there >= _ENOUGH) & (len(labels) - there >= _ENOUGH)
    return np.array(
        [
            _best_threshold(probabilities[:, number], labels[:, number]) if enough[number] else common
            for number in range(labels.shape[1])
        ]
    )


def _best_threshold(probabilities: npt.NDArray[Any], labels: npt.NDArray[Any]) -> float:
    """Between two probabilities, where F1 is best; a half where there is nothing to find."""
    order = np.argsort(-probabilities, kind="stable")
    ranked, hits = probabilities[order], np.cumsum(labels[order])
    if not hits[-1]:
        return _HALF
    f1 = 2 * hits / (np.arange(1, len(ranked) + 1) + hits[-1])
    ends = np.append(np.diff(ranked) < 0, True)  # equal probabilities are taken together
    last = int(np.where(ends, f1, -1.0).argmax())
    below = ranked[last + 1] if last + 1 < len(ranked) else 0.0
    return float((ranked[last] + below) / 2)


def _as_cell(labels: Sequence[str]) -> str:
    return json.dumps(list(labels), ensure_ascii=False)
