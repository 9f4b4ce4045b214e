"""Which rows are alike: a vector for every row, near to those of rows with the same label."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from hftl.errors import UsageError
from hftl.metrics import SIMILARITY_METRICS, normalised, share_interval, similarity_metrics
from hftl.problems.base import LabelCells, Problem, drawn
from hftl.problems.single_label import SingleLabel, in_order
from hftl.tables import aligned

if TYPE_CHECKING:
    from torch import nn

    from hftl.arguments import TransferArguments
    from hftl.losses import Loss

#: classes with two rows from which on whole ones are held out to validate, as those to search will be new; and where
#: those of test are, or none has rows to spare: two to tell apart, and two to learn from
_MANY, _FEWEST = 20, 4
#: below so many rows of each class, a part of the rows is one of the classes
_ROWS_OF_A_CLASS = 4
#: of a batch, in which rows are compared
_FEWEST_ROWS = 8
#: cosines of queries with a gallery that are held at once
_PIECE = 2**24


@dataclass(frozen=True)
class EmbeddingPrediction:
    """What the model says of one input.

    Attributes:
        id: path or position of the input.
        embedding: of length 1, so that the cosine of two is their scalar product; shape (size,).
    """

    id: str
    embedding: npt.NDArray[np.float32]

    def cells(self) -> list[str]:
        """Those of `Problem.answer_columns`."""
        return [json.dumps([round(float(value), 6) for value in self.embedding])]


@dataclass(frozen=True)
class Neighbour:
    """One of a gallery.

    Attributes:
        id: path or position of it there.
        similarity: its cosine with the input, from -1 to 1.
    """

    id: str
    similarity: float


@dataclass(frozen=True)
class NeighboursPrediction:
    """What of a gallery is most like one input.

    Attributes:
        id: path or position of the input.
        neighbours: the nearest first.
    """

    id: str
    neighbours: list[Neighbour]

    def cells(self) -> list[str]:
        """Those of `Problem.answer_columns`; names come first."""
        found = self.neighbours
        return [json.dumps([one.id for one in found]), *(f"{one.similarity:.6f}" for one in found)]


@dataclass(frozen=True)
class Gallery:
    """What is searched.

    Attributes:
        ids: of its rows.
        embeddings: of length 1, shape (rows, size).
        count: neighbours that an input gets.
    """

    ids: list[str]
    embeddings: npt.NDArray[np.float32]
    count: int

    def nearest(self, embeddings: npt.NDArray[np.float32]) -> list[list[Neighbour]]:
        """Of each of some embeddings of length 1, shape (rows, size), the nearest rows."""
        places, cosines = nearest(embeddings, self.embeddings, self.count)
        return [
            [Neighbour(self.ids[place], cosine) for place, cosine in zip(*row, strict=True)]
            for row in zip(places.tolist(), cosines.tolist(), strict=True)
        ]


def nearest(
    queries: npt.NDArray[np.float32], gallery: npt.NDArray[np.float32], count: int
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float32]]:
    """Places of the nearest rows of a gallery, the nearest first, and their cosines, each of shape (queries, count).

    Args:
        queries: of length 1, shape (queries, size).
        gallery: of length 1, shape (rows, size).
        count: at most as many as there are rows.
    """
    import torch

    searched = torch.from_numpy(gallery).T
    pieces = torch.from_numpy(queries).split(max(1, _PIECE // len(gallery)))
    found = [(piece @ searched).topk(count) for piece in pieces]
    if not found:
        return np.zeros((0, count), np.int64), np.zeros((0, count), np.float32)
    return (torch.cat([one.indices for one in found]).numpy(), torch.cat([one.values for one in found]).numpy())


class Similarity(Problem):
    """A label says which rows are alike; those of the rows to score may be other ones than those learned from.

    The model's outputs are the vector of a row, and mean something by their direction alone.

    Args:
        size: numbers of a vector.
        temperature: of the contrastive loss.
    """

    name = "similarity"
    in_transformers = False
    words = "rows that are alike or not"
    nothing_to_spare = "no class has four rows, and no four have two"
    answers_untrained = True
    share = "rows of each class"
    metric_names = SIMILARITY_METRICS
    headline = (("recall_at_1", "recall@1"), ("map_at_r", "MAP@R"))
    hub_metrics = (("recall_at_1", "Recall@1", "recall_at_1"), ("map_at_r", "MAP@R", "map_at_r"))
    losses = ("contrastive",)
    activation = ""
    head = "discriminant"
    without_score = "no two rows of it have the same label"
    has_class_scores = False
    is_exact = True

    def __init__(self, size: int = 128, temperature: float = 0.1) -> None:
        """Keep the settings; the classes come with the data."""
        self.size, self.temperature = size, temperature
        #: those of training first, by number
        self.class_names: list[str] = []
        self._trained = 0
        self.gallery: Gallery | None = None

    def check(self, arguments: TransferArguments) -> None:
        """Refuse scores of labels, of which none are answered, and batches in which there is little to compare."""
        super().check(arguments)
        if arguments.metrics:
            raise UsageError(f"--metrics is for answers that are labels, not for {self.words}. Leave it out.")
        rows = arguments.per_device_train_batch_size or _FEWEST_ROWS
        flag = "auto_find_batch_size" if arguments.auto_find_batch_size else f"per_device_train_batch_size {rows}"
        if arguments.loss == "contrastive" and (arguments.auto_find_batch_size or rows < _FEWEST_ROWS):
            raise UsageError(
                f"--{flag}: the contrastive loss compares the rows of a batch, and needs two groups of four: take "
                f"{_FEWEST_ROWS} rows or more; --activation_checkpointing saves memory."
            )

    def read(self, cells: LabelCells) -> list[str | None]:
        """The label of each row as its name; None where it is missing."""
        return SingleLabel().read(cells)

    def names(self, found: Sequence[str | None], cells: LabelCells) -> list[str]:
        """Those of the numbers of a vector."""
        self.class_names = in_order({name for name in found if name is not None})
        self._trained = len(self.class_names)
        return [f"dimension {number}" for number in range(self.size)]

    def encode(self, found: Sequence[str | None], names: Sequence[str], cells: LabelCells) -> npt.NDArray[np.int64]:
        """Class numbers, shape (rows,); classes that were not there before get further ones."""
        cells.check_all_there(found)
        self.class_names += in_order({str(name) for name in found}.difference(self.class_names))
        index = {name: number for number, name in enumerate(self.class_names)}
        return np.array([index[str(label)] for label in found], dtype=np.int64)

    def require_enough(self, labels: npt.NDArray[np.int64], names: Sequence[str], origin: str) -> None:
        """Refuse fewer than two classes, and classes of single rows."""
        counts = np.unique(labels, return_counts=True)[1]
        if len(counts) < 2:
            raise UsageError(f"{origin} has rows of one class, or none: what is not alike cannot be learned from them")
        self.require_scorable(labels, origin)

    def require_scorable(self, labels: npt.NDArray[np.int64], origin: str) -> None:
        """Refuse rows of which no two are alike."""
        if np.unique(labels, return_counts=True)[1].max(initial=0) < 2:
            raise UsageError(
                f"{origin}: no two rows have the same label, so that nothing alike can be found among them: name the "
                "right column with --label_column, or add rows"
            )

    def held_out(self, labels: npt.NDArray[np.int64], fraction: float, seed: int) -> tuple[npt.NDArray[np.int64], str]:
        """Whole classes to validate on, where they are many or those to test are others; else some rows of each."""
        random = np.random.default_rng(seed)
        classes, counts = np.unique(labels, return_counts=True)
        pairs = np.flatnonzero(counts > 1)  # of other classes nothing can be found
        are_new, to_spare = len(self.class_names) > self._trained, counts > 3
        if len(pairs) >= (_FEWEST if are_new or to_spare.sum() < 2 else _MANY):
            wanted = fraction * len(labels)
            # What is larger than that, or than most, is to learn from; so is a half of all.
            fitting = pairs[counts[pairs] <= max(wanted, np.median(counts[pairs]))]
            order = random.permutation(fitting)[: len(pairs) // 2]
            enough = max(2, int(np.searchsorted(np.cumsum(counts[order]), wanted)) + 1)
            chosen = classes[order[:enough]]
            return np.flatnonzero(np.isin(labels, chosen)), f"all of {len(chosen)} of {len(classes)} classes"
        shares = np.where(to_spare, np.clip(np.rint(fraction * counts), 2, counts - 2), 0).astype(int)
        return drawn(labels, classes, shares, random), "two or more of each class with four"

    def part(self, labels: npt.NDArray[Any], count: int, seed: int) -> npt.NDArray[np.int64]:
        """Sorted places of about so many rows: of each class in proportion, or all of some where that would be few."""
        classes, counts = np.unique(labels, return_counts=True)
        if count >= _ROWS_OF_A_CLASS * len(classes):
            return super().part(labels, count, seed)
        random = np.random.default_rng(seed)
        sizes = np.minimum(counts, max(2, count // 2))
        order = random.permutation(len(classes))
        order = order[np.argsort(counts[order] < 2, kind="stable")]  # what is like no other comes last
        enough = max(2, int(np.searchsorted(np.cumsum(sizes[order]), count, side="right")))
        return drawn(labels, classes[order[:enough]], sizes[order[:enough]], random)

    def strata(self, labels: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """The classes."""
        return labels

    def counts(self, labels: npt.NDArray[np.int64], names: Sequence[str]) -> list[int]:
        """Rows of each class."""
        return np.bincount(labels, minlength=len(self.class_names)).tolist()

    def classes(self, labels: npt.NDArray[np.int64], names: Sequence[str]) -> dict[str, int]:
        """Rows of each class by its name."""
        return dict(zip(self.class_names, self.counts(labels, names), strict=True))

    def table(self, parts: Mapping[str, npt.NDArray[Any]], names: Sequence[str]) -> list[str]:
        """Rows and classes of each split, and how many of the classes are new."""
        head = ["split", "rows", "classes", "rows a class", "not in train"]
        trained = set(parts["train"].tolist())
        body = []
        for role, labels in parts.items():
            classes, counts = np.unique(labels, return_counts=True)
            new = "" if role == "train" else str(len(set(classes.tolist()) - trained))
            body.append([role, str(len(labels)), str(len(classes)), f"{counts.min()} to {counts.max()}", new])
        return [*aligned([head, *body], left=[0]), *self.notes(parts["train"], names)]

    def notes(self, train: npt.NDArray[np.int64], names: Sequence[str]) -> list[str]:
        """Classes with a single row, which is like no other."""
        alone = int((np.unique(train, return_counts=True)[1] == 1).sum())
        return [f"warning: classes of train with one row, which is like no other: {alone}"] if alone else []

    def prepare(self, model: nn.Module, labels: npt.NDArray[np.int64], keeps_head: bool) -> None:
        """Let a fresh output layer keep angles as far as so many numbers can: begin with features as they are."""
        import torch

        from hftl import backbones

        layers = backbones.output_layers(model, outputs=self.size)
        if not layers:
            raise UsageError(
                f"{type(model).__name__} has no linear output layer, which a vector of {self.size} numbers needs. Take "
                "another model."
            )
        for layer in () if keeps_head else layers:
            torch.nn.init.orthogonal_(layer.weight)
            if layer.bias is not None:
                torch.nn.init.zeros_(layer.bias)

    def loss(self, arguments: TransferArguments, labels: npt.NDArray[np.int64], names: Sequence[str]) -> Loss:
        """The contrastive one, or one's own."""
        from hftl.losses import ContrastiveLoss, own_loss

        return own_loss(arguments) or ContrastiveLoss(self.temperature)

    def default_metric(self, labels: npt.NDArray[np.int64], names: Sequence[str]) -> str:
        """MAP@R, which still tells models apart where recall@1 is near 1 (Musgrave et al. 2020)."""
        return "map_at_r"

    def metrics(self, logits: npt.NDArray[Any], labels: npt.NDArray[Any], names: Sequence[str]) -> dict[str, float]:
        """As `similarity_metrics`."""
        return similarity_metrics(logits, labels)

    def kept(self, names: Sequence[str]) -> dict[str, Any]:
        """The classes: there are more than there are outputs."""
        return {"classes": self.class_names}

    def restore(self, metrics: Mapping[str, Any], names: Sequence[str]) -> None:
        """Take the classes."""
        self.class_names, self.size = [str(name) for name in metrics["classes"]], len(names)

    def answers(self, rows: Sequence[Mapping[str, Any]], logits: npt.NDArray[Any], names: Sequence[str]) -> list[Any]:
        """The vector of each row, or what of the gallery is nearest to it."""
        embeddings = normalised(logits)
        if self.gallery is None:
            return [EmbeddingPrediction(row["id"], vector) for row, vector in zip(rows, embeddings, strict=True)]
        neighbours = self.gallery.nearest(embeddings)
        return [NeighboursPrediction(row["id"], found) for row, found in zip(rows, neighbours, strict=True)]

    def answer_columns(self, names: Sequence[str]) -> list[str]:
        """The vector in one cell; or the neighbours in one, and how like they are in others."""
        if self.gallery is None:
            return ["embedding"]
        return ["neighbours", *(f"similarity_{number + 1}" for number in range(self.gallery.count))]

    def label_cell(self, label: Any, names: Sequence[str]) -> str:
        """The name of the class."""
        return self.class_names[int(label)]

    def limits(
        self, scores: Mapping[str, float], rows: int, split: str, labels: npt.NDArray[Any], names: Sequence[str]
    ) -> list[str]:
        """The interval of recall@1, and what it is of."""
        queries = round(scores["queries"])
        low, high = share_interval(round(scores["recall_at_1"] * queries), queries)
        return [
            f"Of {queries:,} rows of {split}, each searched among the other {rows - 1:,}, the nearest is of the same "
            f"class in {scores['recall_at_1']:.1%} (with 95 % confidence between {low:.1%} and {high:.1%}). Among more "
            "rows, or more classes, it is less.",
            "Something is always nearest, however little alike: look at the cosine.",
        ]
