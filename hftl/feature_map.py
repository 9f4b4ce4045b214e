"""A map of rows: where the features of the model that was trained put them, in the two directions of most variance."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from hftl import backbones
from hftl.data import Splits
from hftl.features import KeptDataset, PooledFeatures, head_source
from hftl.folder import LOGS, replacing, say, scored_split

if TYPE_CHECKING:
    from hftl.run import Run

#: in the logs: features of the rows on the map, of that split
_FILE = "features-{}.npy"
#: rows on the map: with more of them the points hide each other, and each costs a pass
MOST_ROWS = 256


@dataclass(frozen=True)
class FeatureMap:
    """Points and what they show.

    Attributes:
        points: shape (rows, 2).
        explained: part of the variance of the features that the two directions have.
        pure: part of the rows whose nearest other row, in all directions, is of the same class.
    """

    points: npt.NDArray[np.float64]
    explained: float
    pure: float


def draw_rows(count: int) -> npt.NDArray[np.int64]:
    """Numbers of the rows on the map, the same ones every time, in order."""
    return np.sort(np.random.default_rng(0).permutation(count)[:MOST_ROWS])


def keep_features_of(data: Mapping[str, KeptDataset], logs: Path) -> None:
    """Keep the features of the rows on the map beside the log, of a run whose head was fitted to features."""
    split = scored_split(data)
    rows = draw_rows(len(data[split]))
    with replacing(logs / _FILE.format(split)) as beside, beside.open("wb") as file:
        np.save(file, np.stack([data[split][row]["kept"].float().numpy() for row in rows.tolist()]))


def feature_map(features: npt.NDArray[np.float64], labels: npt.NDArray[np.int64]) -> FeatureMap:
    """The map of some rows, by principal component analysis.

    Args:
        features: shape (rows, features), of at least two rows.
        labels: class ids, shape (rows,).
    """
    centred = features - features.mean(axis=0)
    _, spread, directions = np.linalg.svd(centred, full_matrices=False)
    # A direction has no sign of its own: that of its largest part is made positive, for the same map every time.
    largest = np.abs(directions[:2]).argmax(axis=1)
    signs = np.sign(directions[np.arange(len(largest)), largest])
    points = np.zeros((len(features), 2))
    points[:, : len(largest)] = centred @ (directions[:2] * signs[:, None]).T
    variance = np.square(spread)
    distances = np.square(centred).sum(axis=1)[:, None] + np.square(centred).sum(axis=1) - 2 * centred @ centred.T
    np.fill_diagonal(distances, np.inf)
    pure = labels[distances.argmin(axis=1)] == labels
    return FeatureMap(points, float(variance[:2].sum() / max(variance.sum(), 1e-12)), float(pure.mean()))


def _checked(features: npt.NDArray[np.float64], rows: int) -> npt.NDArray[np.float64]:
    """The features, where they are some: finite, shape (rows, features)."""
    if features.ndim != 2 or len(features) != rows or not np.isfinite(features).all():
        raise ValueError(f"it holds no features of {rows} rows")
    return features


def features_of(run: Run, splits: Splits, numbers: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
    """What enters the head, shape (rows, features): kept by the training, else computed now.

    Args:
        run: a finished run.
        splits: its data.
        numbers: of the rows that it was scored on.

    Raises:
        NoCut: what enters the head is not one vector a row.
    """
    path = run.folder / LOGS / _FILE.format(run.scored_split)
    if path.is_file() and np.array_equal(numbers, draw_rows(len(splits.scored))):
        try:
            return _checked(np.load(path, allow_pickle=False).astype(np.float64), len(numbers))
        except (ValueError, EOFError) as error:
            say(f"features of the map: {path} is damaged ({error}), and they are computed again")
    rows = splits.scored.select(numbers)
    said, run.task.says_cut = run.task.says_cut, False  # when the rows were scored
    try:
        dataset: Any = run.task.dataset(rows, training=False)
    finally:
        run.task.says_cut = said
    order: list[int] = []
    found = []
    model = backbones.without_adapters(run.model)
    source: PooledFeatures | None = None
    for group, inputs in run.prepared(dataset, rows):
        source = source or head_source(model, inputs)
        found.append(source.capture(model, inputs).double().cpu().numpy())
        order += group
    return np.concatenate(found)[np.argsort(order)]
