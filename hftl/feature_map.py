"""A map of rows: where the features of the model that was trained put them, in the two directions of most variance."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from hftl import backbones, batches
from hftl.features import PooledFeatures, head_source

if TYPE_CHECKING:
    from hftl.run import Run

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


def feature_map(run: Run, rows: Any, labels: npt.NDArray[np.int64]) -> FeatureMap:
    """The map of some rows, by principal component analysis.

    Args:
        run: a finished run.
        rows: at least two, as the task reads them.
        labels: class ids, shape (rows,).

    Raises:
        NoCut: what enters the head is not one vector a row.
    """
    features = _features(run, rows)
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


def _features(run: Run, rows: Any) -> npt.NDArray[np.float64]:
    """What enters the head, shape (rows, features)."""
    said, run.task.says_cut = run.task.says_cut, False  # when the rows were scored
    dataset: Any = run.task.dataset(rows, training=False)
    run.task.says_cut = said
    device = next(run.model.parameters()).device
    lengths: Sequence[int] | None = getattr(dataset, "lengths", None)
    groups = batches.groups(lengths, len(dataset), None, device.type == "cpu")
    threads = batches.decoding_threads(rows) if lengths is None else 0
    order: list[int] = []
    found = []
    model = backbones.without_adapters(run.model)
    source: PooledFeatures | None = None
    for group, examples in batches.prepared(dataset, groups, threads, skip_bad_files=False):
        inputs = backbones.inputs_of(run.task.collate(examples), device)
        source = source or head_source(model, inputs)
        found.append(source.capture(model, inputs).double().cpu().numpy())
        order += group
    return np.concatenate(found)[np.argsort(order)]
