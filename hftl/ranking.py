"""Which of several models suits a data set, before any is trained: `hftl rank`.

Every model runs once over the training rows (from the cache of features where it did before); the scores are those of
`hftl.transferability`. Neither validation nor test is looked at.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import itertools
import re
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from threadpoolctl import ThreadpoolController
from torch import nn

from hftl import backbones, compute, data, pretrained, transferability
from hftl.arguments import ArgumentsType, is_pretrained, parse, set_precision
from hftl.data import Splits
from hftl.errors import UsageError
from hftl.features import HeadInputs, PooledFeatures, pooled
from hftl.finished import require_one_of_several
from hftl.folder import keep, remembered, say
from hftl.methods.parts import frozen
from hftl.methods.plan import prepare_modules
from hftl.modality import Modality
from hftl.ranked import ANSWERS, Candidate
from hftl.tasks import find_task
from hftl.tasks.classification import ClassificationTask

#: beside the shards of features: how fast they come, and what was made of them
_SPEEDS, _SCORES = "speeds.json", "scores.json"


@dataclass(frozen=True)
class Pooled:
    """What a model makes of the training rows: features of shape (rows, width), class ids of shape (rows,)."""

    task: ClassificationTask
    model: nn.Module
    source: PooledFeatures
    features: np.ndarray[Any, Any]
    labels: np.ndarray[Any, Any]
    seconds_a_row: float
    #: the rows as the task prepares them
    rows: Any
    #: where the features are kept
    place: Path


def rank(
    task_name: str,
    models: Sequence[str],
    tokens: Sequence[str],
    identities: Mapping[str, str] | None = None,
) -> list[Candidate]:
    """The scores of models for a data set.

    Args:
        task_name: of a built-in task.
        models: as `--model`; for images and videos also `MODEL@SIDE`, at another image size.
        tokens: flags as for `hftl train`, `--dataset` among them.
        identities: of the models, under which to keep what is found (`ranked.identify`, from before anything was
            imported: libraries set variables of the environment).

    Returns:
        The models as they were named, not ranked yet.

    Raises:
        UsageError: the data or a model cannot be used.
    """
    task_class = find_task(task_name)
    settings = [parse(task_class.arguments_class, [*tokens, *_model_tokens(task_name, name)]) for name in models]
    for arguments in settings:
        check(arguments)
    splits = load_rows(settings[0], task_class.modality)
    require_two_rows(splits)
    started = before = time.perf_counter()
    waiting: list[Future[Candidate]] = []
    # On one core: threads of NumPy and of PyTorch, which prepares the next model, would wait for each other's cores.
    # What there is to limit is listed here, where nothing is being imported beside it.
    libraries = ThreadpoolController()

    def scored(name: str, found: Pooled, head: nn.Module | None) -> Candidate:
        with libraries.limit(limits=1, user_api="blas"):
            candidate = _scored(name, _model_tokens(task_name, name), found, head)
        if identities and name in identities:
            keep(found.place / ANSWERS, identities[name], dataclasses.asdict(candidate))
        return candidate

    def settle() -> None:
        """Wait for the scores of the models before, so that the features of two at most are in memory."""
        wait(waiting)

    with ThreadPoolExecutor(1) as beside:
        for sizes in _by_checkpoint(models, settings):
            heads: list[nn.Module | None] = []  # one, of all sizes
            with pretrained.read_once() if len(sizes) > 1 else contextlib.nullcontext():
                for name, arguments in sizes:
                    found = features_of(task_class(arguments), splits, settle)
                    heads = heads or [trained_head(found)]
                    settle()
                    waiting.append(beside.submit(scored, name, found, *heads))
                    say(f"{name}: ready after {time.perf_counter() - before:.1f} s")
                    before = time.perf_counter()
        candidates = [entry.result() for entry in waiting]
    say(f"{len(models)} models ranked on {len(splits.train):,} rows in {time.perf_counter() - started:.1f} s")
    return candidates


def _by_checkpoint(models: Sequence[str], settings: Sequence[Any]) -> list[list[tuple[str, Any]]]:
    """The models as they were named, with their flags; those that stand in a row and are one checkpoint together."""
    pairs = zip(models, settings, strict=True)
    return [list(group) for _, group in itertools.groupby(pairs, key=lambda pair: pair[1].model_name_or_path)]


def _model_tokens(task_name: str, name: str) -> list[str]:
    """`MODEL@SIDE` as flags."""
    has_size = hasattr(find_task(task_name).arguments_class, "image_size")
    sized = re.fullmatch(r"(.+)@(\d+)", name) if has_size else None
    return [f"--model={sized[1]}", f"--image_size={sized[2]}"] if sized else [f"--model={name}"]


def check(arguments: ArgumentsType) -> None:
    """Refuse what needs no data to be refused, before the first model runs.

    Raises:
        UsageError: as said.
    """
    if not arguments.dataset_name:
        raise UsageError("--dataset is missing: name a folder, a table, a Hub id or builtin:NAME.")
    if arguments.world_size > 1:
        raise UsageError("This works in one process: start it without accelerate launch.")
    require_one_of_several(arguments.problem_type, "hftl rank, advise and check-labels")
    pretrained.check_model_name(arguments.model_name_or_path, arguments.trust_remote_code)


def require_two_rows(splits: Splits) -> None:
    """Refuse rows of which none can be left out and judged by the others of its class.

    Raises:
        UsageError: as said.
    """
    if max(splits.counts) < 2:
        raise UsageError("No class has two training rows, of which one could be judged by the other: add rows.")


def load_rows(arguments: ArgumentsType, modality: Modality) -> Splits:
    """The data with its report, without the test split.

    Raises:
        UsageError: as `check` and `data.load_splits`.
    """
    check(arguments)
    splits = data.load_splits(arguments, modality)
    for line in splits.report:
        say(line)
    return dataclasses.replace(splits, test=None)


def features_of(task: ClassificationTask, splits: Splits, settle: Callable[[], None] = lambda: None) -> Pooled:
    """The features of all training rows, from the cache or computed now, and how fast they come.

    In the precision that a training of the head alone would have, which then finds them in the cache.

    Args:
        task: with the model.
        splits: the data.
        settle: called before anything is measured, to wait for what else computes.

    Raises:
        UsageError: the model cannot be used.
    """
    arguments = task.arguments
    model = task.build_model(splits)
    (stage,) = frozen(model, arguments).stages
    compute.share_threads(on_cpu=arguments.device.type == "cpu")
    backbones.to_channels_last(model).to(arguments.device)
    prepare_modules(model, stage)
    rows: Any = task.dataset(splits.train, training=False)
    batch = compute.typical_batch(rows, task.collate)
    batch = {name: value.to(arguments.device) for name, value in batch.items()}
    passes = len(rows) * stage.epochs
    loss = task.loss(splits)
    precision = compute.choose_precision(
        model, batch, loss, training=False, rows=passes, arguments=arguments, before=settle
    )
    set_precision(arguments, precision)
    source, kept = pooled(task, model, rows)
    place = kept.shards.folder

    def measured() -> float:
        settle()
        return compute.seconds_a_row(model, batch, loss, False, arguments.precision)

    speed = remembered(place / _SPEEDS, f"{compute.machine()}, {arguments.device}", measured)
    features, labels = kept.matrix()
    return Pooled(task, model, source, features.float().numpy(), labels.numpy(), speed, rows, place)


def _scored(name: str, flags: list[str], found: Pooled, head: nn.Module | None) -> Candidate:
    def scores() -> dict[str, float | None]:
        return transferability.scores(found.features, found.labels, head_probabilities(head, found.features))

    return Candidate(
        rank=0,
        model=name,
        **remembered(found.place / _SCORES, _content(found, head), scores),
        parameters=sum(parameter.numel() for parameter in found.model.parameters()),
        features_per_second=1 / found.seconds_a_row,
        flags=flags,
        rows=len(found.labels),
        chance=float(np.unique(found.labels, return_counts=True)[1].max()) / len(found.labels),
    )


def _content(found: Pooled, head: nn.Module | None) -> str:
    """A name for all that determines the scores: their code, the features, the labels and the trained head."""
    digest = hashlib.blake2b(Path(transferability.__file__).read_bytes(), digest_size=16)
    weights = [] if head is None else [value.numpy() for value in head.state_dict().values()]
    for part in (found.features, found.labels, *weights):
        digest.update(f"{part.shape} {part.dtype}".encode())
        digest.update(np.ascontiguousarray(part).data)
    return digest.hexdigest()


def trained_head(found: Pooled) -> nn.Module | None:
    """The output layer that the checkpoint itself has; None where it has none."""
    arguments = found.task.arguments
    name = str(arguments.model_name_or_path)
    if not is_pretrained(arguments) or isinstance(found.source, HeadInputs) or backbones.starts_from_texts(found.model):
        return None
    place = pretrained.find_model(name)
    with pretrained.explained_load(name, found.task.auto_class):
        model, report = found.task.auto_class.from_pretrained(
            place,
            output_loading_info=True,
            dtype=torch.float32,
            **pretrained.weight_options(arguments),
            **pretrained.hub_options(arguments, place),
        )
    layer = model.get_submodule(found.source.name)
    fresh = any(backbones.is_below_any(key, (found.source.name,)) for key in report["missing_keys"])
    return None if fresh or layer.out_features < 2 else layer


def head_probabilities(head: nn.Module | None, features: np.ndarray[Any, Any]) -> np.ndarray[Any, Any] | None:
    """What a trained head says of features (rows, features), shape (rows, its classes); None where there is none."""
    if head is None:
        return None
    with torch.no_grad():
        return head(torch.from_numpy(features)).softmax(dim=1).numpy()
