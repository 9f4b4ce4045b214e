"""A number for every row."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from hftl.errors import UsageError
from hftl.folder import say
from hftl.metrics import REGRESSION_METRICS, regression_metrics
from hftl.problems.base import LabelCells, Problem, Result
from hftl.tables import aligned

if TYPE_CHECKING:
    import torch
    from torch import nn

    from hftl.arguments import TransferArguments
    from hftl.losses import Loss

#: the largest number in deviations: 32 bits keep seven digits, of which three are then left for what is learned
_MOST_DEVIATIONS = 1e4
#: beyond which 32 bits leave no room for squares
_FARTHEST = 1e15
#: groups of like numbers that a part of the rows is drawn from in proportion
_GROUPS = 10


@dataclass(frozen=True)
class ValuePrediction:
    """What the model says of one input.

    Attributes:
        id: path or position of the input.
        value: in the unit of the training labels.
    """

    id: str
    value: float

    def cells(self) -> list[str]:
        """Those of `Problem.answer_columns`."""
        return [f"{self.value:.9g}"]  # what 32 bits hold


@dataclass
class Regression(Problem):
    """A number for every row.

    The network learns (label - mean) / deviation, for which its rates are made whatever the unit; at the end of the
    training the output layer takes both into its weights, and the model gives the label's own unit.

    Attributes:
        mean: a number is mean + deviation times the model's output, while it trains.
        deviation: see there.
        unit: of differences: the deviation of the training labels, also when the training is over.
    """

    name = "regression"
    words = "a number a row"
    share = "the same share of each tenth"
    metric_names = REGRESSION_METRICS
    headline = (("rmse", "RMSE"), ("mae", "MAE"), ("r2", "R²"), ("spearman", "Spearman"))
    hub_metrics = (("rmse", "RMSE", "rmse"), ("mae", "MAE", "mae"), ("r_squared", "R²", "r2"))
    losses = ("mse", "mae")
    activation = ""
    without_score = "the numbers in it, or the answers, are all alike"
    head = "least squares"
    has_class_scores = False
    is_exact = True

    mean: float = 0.0
    deviation: float = 1.0
    unit: float = 1.0

    def check(self, arguments: TransferArguments) -> None:
        """Refuse what would share a model in another unit."""
        super().check(arguments)
        if arguments.push_to_hub and arguments.hub_strategy == "every_save":
            raise UsageError(
                "--hub_strategy every_save: until its end the training knows the number in another unit. Use "
                "--hub_strategy end."
            )

    def read(self, cells: LabelCells) -> list[float | None]:
        """The number of each row; None where it is missing."""
        if cells.declared is not None:
            raise UsageError(
                f"{cells.origin}: the column {cells.column!r} holds classes and no numbers: leave out --problem_type "
                "regression, or name another --label_column"
            )
        return [self._number(value, cells, row) for row, value in enumerate(cells.values)]

    def _number(self, value: Any, cells: LabelCells, row: int) -> float | None:
        text = value.strip() if isinstance(value, str) else value
        if text is None or text == "":
            return None
        try:
            number = math.nan if isinstance(text, bool) or "_" in str(text) else float(text)
            is_number = math.isfinite(number) or str(text).lower() == "nan"
        except (TypeError, ValueError, OverflowError):
            is_number = False
        if not is_number:
            raise UsageError(
                f"{cells.origin}: {str(value)[:80]!r} in the column {cells.column!r} is no number "
                f"({cells.places([row])}): write it as 1234.5"
            )
        return None if math.isnan(number) else number

    def names(self, found: Sequence[float | None], cells: LabelCells) -> list[str]:
        """That of the column."""
        return [cells.column]

    def encode(self, found: Sequence[float | None], names: Sequence[str], cells: LabelCells) -> npt.NDArray[np.float64]:
        """The numbers, shape (rows,)."""
        cells.check_all_there(found)
        return np.array(found, dtype=np.float64)

    def require_enough(self, labels: npt.NDArray[np.float64], names: Sequence[str], origin: str) -> None:
        """Refuse numbers that are all alike."""
        if not len(labels) or np.ptp(labels) == 0:
            found = f"the number {labels[0]:g} in every row" if len(labels) else "no rows left"
            raise UsageError(f"{origin} has {found}: there is nothing to learn")
        with np.errstate(over="ignore"):
            most, deviation = float(np.abs(labels).max()), float(labels.std())
        if not 1 / _FARTHEST < deviation <= most < _FARTHEST:
            raise UsageError(
                f"{origin} has numbers up to {most:.4g} that differ by {deviation:.4g}, which weights of 32 bits "
                "cannot hold: take another unit"
            )
        if most > _MOST_DEVIATIONS * deviation:
            raise UsageError(
                f"{origin} has numbers up to {most:.4g} that differ by {deviation:.4g}: weights of 7 digits cannot "
                "tell them apart. Subtract a constant from them."
            )

    def strata(self, labels: npt.NDArray[np.float64]) -> npt.NDArray[np.int64]:
        """Tenths of the rows by their number."""
        ranks = np.argsort(np.argsort(labels, kind="stable"), kind="stable")
        return ranks * min(_GROUPS, max(1, len(labels) // 2)) // len(labels)

    def counts(self, labels: npt.NDArray[np.float64], names: Sequence[str]) -> list[int]:
        """All rows."""
        return [len(labels)]

    def table(self, parts: Mapping[str, npt.NDArray[Any]], names: Sequence[str]) -> list[str]:
        """Rows, and where their numbers lie."""
        head = [names[0], "rows", "least", "median", "mean", "most", "deviation"]
        body = [
            [
                role,
                str(len(labels)),
                *(
                    f"{value:.4g}"
                    for value in (labels.min(), np.median(labels), labels.mean(), labels.max(), labels.std())
                ),
            ]
            for role, labels in parts.items()
        ]
        return [*aligned([head, *body], left=[0]), *self.notes(parts["train"], names)]

    def prepare(self, model: nn.Module, labels: npt.NDArray[np.float64], keeps_head: bool) -> None:
        """Mean and deviation of the training labels, as far as the output layer can take them."""
        layers = _output_layers(model)
        self.unit, mean = float(labels.std()), float(labels.mean())
        has_bias = all(layer.bias is not None for layer in layers)
        self.mean = mean if has_bias else 0.0
        self.deviation = float(np.sqrt(np.mean((labels - self.mean) ** 2)))
        if not has_bias and abs(mean) > self.unit:
            say(
                f"numbers: the output layer of {type(model).__name__} has no bias, so that their mean of {mean:.4g} "
                "has to be learned too; subtract it from the column for a better start"
            )
        if keeps_head:  # which gives the number in its own unit
            _scale(layers, -self.mean / self.deviation, 1 / self.deviation)

    def check_model(self, model: nn.Module, batch: dict[str, torch.Tensor]) -> None:
        """Refuse a model in which something follows the output layer."""
        import torch

        from hftl import backbones

        inputs = backbones.inputs_of(batch, next(model.parameters()).device)

        def logits() -> torch.Tensor:
            return model(**inputs).logits

        layers = _output_layers(model)
        before = [(layer.weight.clone(), None if layer.bias is None else layer.bias.clone()) for layer in layers]
        was_training = model.training
        model.eval()
        with torch.no_grad():
            expected = 2 * logits() + (1 if self.mean else 0)
            _scale(layers, 1.0 if self.mean else 0.0, 2.0)
            found = logits()
            for layer, (weight, bias) in zip(layers, before, strict=True):
                layer.weight.copy_(weight)
                if bias is not None:
                    layer.bias.copy_(bias)
        model.train(was_training)
        if not torch.allclose(found, expected, rtol=1e-3, atol=1e-3):
            raise UsageError(
                f"--problem_type regression: something follows the output layer of {type(model).__name__}, which so "
                "gives no number of any size. Take another model."
            )

    def loss(self, arguments: TransferArguments, labels: npt.NDArray[np.float64], names: Sequence[str]) -> Loss:
        """Of differences in units of the training labels' deviation."""
        from hftl.losses import make_regression_loss

        return make_regression_loss(arguments, (self.mean, self.deviation), float(labels.std()))

    def metrics(self, logits: npt.NDArray[Any], labels: npt.NDArray[Any], names: Sequence[str]) -> dict[str, float]:
        """As `regression_metrics`, in the labels' own unit."""
        return regression_metrics(self._in_own_unit(logits)[:, 0], labels)

    def decided(self, logits: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """The numbers, shape (rows,)."""
        return self._in_own_unit(logits)[:, 0]

    def _in_own_unit(self, logits: npt.NDArray[Any]) -> npt.NDArray[Any]:
        return logits.astype(np.float64) * self.deviation + self.mean

    def conclude(self, model: nn.Module, results: dict[str, Result], names: Sequence[str]) -> dict[str, Result]:
        """Put mean and deviation into the output layer: from now on the model gives the labels' own unit."""
        _scale(_output_layers(model), self.mean, self.deviation)
        results = {
            split: (self._in_own_unit(logits), labels, scores) for split, (logits, labels, scores) in results.items()
        }
        self.mean, self.deviation = 0.0, 1.0
        return results

    def scale_of(self, logits: torch.Tensor) -> float:
        """The deviation of the training labels; of numbers far from zero what float32 can tell apart."""
        return max(self.unit, 0.01 * float(logits.abs().max()))

    def answers(
        self, rows: Sequence[Mapping[str, Any]], logits: npt.NDArray[Any], names: Sequence[str]
    ) -> list[ValuePrediction]:
        """The number of each row."""
        return [ValuePrediction(row["id"], float(value)) for row, (value,) in zip(rows, logits, strict=True)]

    def answer_columns(self, names: Sequence[str]) -> list[str]:
        """The number alone."""
        return ["prediction"]

    def label_cell(self, label: Any, names: Sequence[str]) -> str:
        """The number."""
        return repr(float(label))

    def limits(
        self, scores: Mapping[str, float], rows: int, split: str, labels: npt.NDArray[Any], names: Sequence[str]
    ) -> list[str]:
        """How far answers are off, and the range that was learned."""
        return [
            f"On {rows:,} rows of {split} its answers are off by {scores['mae']:.4g} on average, and by "
            f"{scores['rmse']:.4g} as the root of the mean square.",
            f"It has learned from numbers between {labels.min():.4g} and {labels.max():.4g}: beyond them it guesses.",
        ]


def _scale(layers: Sequence[Any], mean: float, deviation: float) -> None:
    """Put a unit and a mean into output layers."""
    import torch

    with torch.no_grad():
        for layer in layers:
            layer.weight.mul_(deviation)
            if layer.bias is not None:
                layer.bias.mul_(deviation).add_(mean)


def _output_layers(model: nn.Module) -> list[Any]:
    """The linear layers that give the number: one, or several whose mean it is.

    Raises:
        UsageError: there is none.
    """
    from hftl import backbones

    layers = backbones.output_layers(model, outputs=1)
    if not layers:
        raise UsageError(
            f"--problem_type regression needs a linear output layer, and {type(model).__name__} has none. Take another "
            "model."
        )
    return layers
