"""Activations of the frozen part of a model, computed once an example and kept on disk.

Rows are kept in shards that are written once, under a fingerprint of all that determines their values but the example:
the weights of the frozen part, the preprocessing, the size, the precision. Within it a row is found by the content of
its example. So another method, seed, head, learning rate or label column, and a second run on grown data, compute only
what is new.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import inspect
import json
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.data import Dataset

from hftl import backbones, batches, compute, penalties
from hftl.arguments import OF_HEAD_TRAINING, TransferArguments, averaged_views, is_sharded
from hftl.builtin import cache_folder
from hftl.cut import Batch, Cut, NoCut, explained_probe
from hftl.errors import UsageError
from hftl.folder import folder_bytes, nearest_existing, say
from hftl.inert import public_name
from hftl.joined import Joined, as_flags, find_joined, mean_of_positions, wished
from hftl.losses import LOSSES, Loss, is_solvable
from hftl.methods import Plan, Stage
from hftl.methods.plan import prepare_modules
from hftl.probes import BESIDE, LinearHead, Probe, check_every_class, fit_linear_head, fit_probe, linear_probe
from hftl.shards import DTYPES, NotKept, Shards
from hftl.sources import in_threads

#: examples on which it is tried how the activations can be kept
_ROWS = 32
#: values that float16 holds are up to 65,504; of other rows they may be a few times as large as of those
_LARGEST = 16_000
#: rows by which a loss is told from others
_ROWS_OF_LOSS = 1000
#: a shard is published when it holds so many bytes, or after so many seconds: what a killed run can lose
_SHARD_BYTES = 32_000_000
_SECONDS_BETWEEN_SHARDS = 30.0
#: the settings of kept features, which a method that keeps none does not use, and their defaults
OF_KEPT_FEATURES = {
    name: TransferArguments.__dataclass_fields__[name].default
    for name in ("feature_views", "feature_cache_gb", "feature_cache_dtype", "feature_cache_hash")
}


# --- what determines the values --------------------------------------------------------------------------------------


def fingerprint(task: Any, model: nn.Module, source: Source, precision: str, dataset: Any, dtype: str) -> str:
    """A name for everything that determines an activation but the example.

    Args:
        task: its class, with those above it (one of a person's own may prepare data in another way), its processor, and
            the flags that are not hftl's.
        model: the model; of its weights those of the frozen part count, and of its settings all but the labels.
        source: where the activations are taken.
        precision: fp32, bf16 or fp16.
        dataset: of its class the code.
        dtype: what they are wanted as, `auto` where that is still to be seen.
    """
    digest = hashlib.blake2b(digest_size=16)
    plain: Any = backbones.without_adapters(model)
    config = plain.config.to_dict() if hasattr(plain, "config") else {}
    config = {name: value for name, value in config.items() if name not in _NOT_THE_BODY}
    kinds = [*type(task).__mro__, *type(dataset).__mro__, type(plain)]
    kinds = [kind for kind in kinds if kind.__module__.partition(".")[0] not in ("builtins", "typing", "torch")]
    try:
        sources = sorted({Path(inspect.getfile(kind)).read_bytes() for kind in kinds})
    except (OSError, TypeError) as error:  # a class that somebody typed in
        raise NotKept(f"the code of the task is in no file ({error})") from error
    settings = [type(plain).__name__, config, source.entry, precision, compute.library_versions()]
    settings += [task.preprocessing(), dtype, _own_flags(task.arguments)]
    digest.update(json.dumps(settings, sort_keys=True, default=str).encode())
    for code in sources:
        digest.update(code)
    state = {name: value for name, value in model.state_dict().items() if not source.is_trained(name)}
    for name in sorted(state, key=lambda name: backbones.plain_name(model, name)):
        digest.update(backbones.plain_name(model, name).encode())
        digest.update(state[name].detach().cpu().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def _own_flags(arguments: Any) -> dict[str, Any]:
    """Values of the flags that a recipe of a person's own adds: they may change how examples are prepared."""
    kinds = (kind for kind in type(arguments).__mro__ if kind.__module__.partition(".")[0] in ("hftl", "transformers"))
    known = {name for kind in kinds for name in vars(kind).get("__dataclass_fields__", ())}
    own = (item.name for item in dataclasses.fields(arguments) if item.name not in known)
    return {name: getattr(arguments, name) for name in own}


#: of a model's configuration: what belongs to the labels or the preprocessing, where it was loaded from, what Trainer
#: switches off while it trains, and what saving writes, which the main process alone does
_NOT_THE_BODY = {
    "id2label", "label2id", "num_labels", "label_names", "num_classes", "problem_type", "pretrained_cfg",
    "_name_or_path", "use_cache", "prompts", "architectures", "dtype", "transformers_version",
}  # fmt: skip


# --- what is kept ----------------------------------------------------------------------------------------------------


class PooledFeatures:
    """What a model's output layer reads, one vector a row or a token: for heads that are fitted rather than trained.

    The output layer is replaced by the identity, so that what the model makes of its output (the last token's, say) is
    made of the features.
    """

    entry = "output layer"
    is_solvable = True
    ragged = False
    carried: tuple[str, ...] = ()
    joined = Joined()  # nothing, before `join`

    def __init__(self, model: nn.Module, batch: Batch) -> None:
        """Find the output layer.

        Raises:
            NoCut: it is not one linear layer, or the model's outputs are not those of a linear layer on a row.
        """
        head = backbones.structure(model).head
        layer = model.get_submodule(head[0])
        if len(head) > 1 or type(layer) is not nn.Linear:
            raise NoCut("the head is more than one linear layer")
        self.name, self.layer = head[0], layer
        with explained_probe():
            kept = self.capture(model, batch)
            with torch.no_grad():
                expected = model(**batch)["logits"]
        if kept.shape != (*expected.shape[:-1], layer.in_features) or not torch.allclose(
            self.outputs(kept, {}), expected, rtol=1e-4, atol=1e-4
        ):
            raise NoCut("the logits are not those of a linear layer on one vector a row")
        self.ragged = kept.ndim == 3
        if self.ragged and kept.shape[:2] != batch["attention_mask"].shape:
            raise NoCut("what the output layer reads is not one vector a token")

    def join(self, model: nn.Module, batch: Batch, layers: int, pooling: str) -> None:
        """Join the outputs of the last blocks to the features, see `hftl.joined`.

        Raises:
            NoCut: the model has no such outputs.
        """
        self.joined = find_joined(model, batch, layers, pooling)
        with explained_probe():
            self.capture(model, batch)
        self.entry = f"output layer, last {layers} blocks, pooling {pooling}"

    def is_trained(self, name: str) -> bool:
        """Whether an entry of the state dict belongs to the output layer."""
        return backbones.is_below_any(name, (self.name,))

    def capture(self, model: nn.Module, batch: Batch) -> torch.Tensor:
        """Features of shape (rows, features), or (rows, tokens, features); what is joined stands last."""
        return self.joined.features(model, self.name, batch)

    def outputs(self, kept: torch.Tensor, carried: Batch) -> torch.Tensor:
        """Logits of shape (rows, classes), or (rows, tokens, classes), from features."""
        with torch.no_grad():
            return self.layer(kept[..., : self.layer.in_features].to(self.layer.weight.dtype))


def gives_features(model: nn.Module, batch: Batch) -> bool:
    """Whether a model has one linear output layer, so that it can be `headless`."""
    try:
        PooledFeatures(model.eval(), batch)
    except NoCut:
        return False
    return True


@contextlib.contextmanager
def headless(task: Any, model: Any, rows: Any) -> Iterator[None]:
    """A model whose logits are what its output layer reads, until the end.

    Args:
        task: how rows become a batch.
        model: with an output layer of one linear layer.
        rows: some, prepared, to try it on.

    Raises:
        UsageError: the model has no such layer.
    """
    batch = backbones.inputs_of(task.collate([rows[row] for row in range(min(2, len(rows)))]), model.device)
    try:
        layer: Any = PooledFeatures(model.eval(), batch).layer
    except NoCut as error:
        raise UsageError(
            f"--method {task.arguments.method}: the model gives no features of a row: {error}. Take another method."
        ) from error
    layer.forward = lambda features: features
    try:
        yield
    finally:
        del layer.forward


class HeadInputs(PooledFeatures):
    """What enters a head of several layers, one vector a row; of token features the mean.

    For scores of features: the head is fresh, so that what its first layers make of them says nothing. The mean is what
    tells most of a sentence (movie reviews, MiniLM: 0.776, the first token 0.752).
    """

    entry = "input of the head"

    def __init__(self, model: nn.Module, batch: Batch) -> None:
        """Find the head.

        Raises:
            NoCut: what enters it is not one vector a row or a token.
        """
        self.names = backbones.structure(model).head
        with explained_probe():
            kept = self.capture(model, batch)
        if kept.ndim != 2 or len(kept) != len(next(iter(batch.values()))):
            raise NoCut("what enters the head is not one vector a row")

    def is_trained(self, name: str) -> bool:
        """Whether an entry of the state dict belongs to the head."""
        return backbones.is_below_any(name, self.names)

    def capture(self, model: nn.Module, batch: Batch) -> torch.Tensor:
        """Features of shape (rows, features)."""
        found: list[torch.Tensor] = []

        def keep_first(module: nn.Module, arguments: tuple[torch.Tensor, ...]) -> None:
            if not found:
                found.append(arguments[0])

        hooks = [model.get_submodule(name).register_forward_pre_hook(keep_first) for name in self.names]
        try:
            with torch.no_grad():
                model(**batch)
        finally:
            for hook in hooks:
                hook.remove()
        (features,) = found
        if features.ndim != 3:
            return features
        return mean_of_positions(features, batch["attention_mask"])

    def outputs(self, kept: torch.Tensor, carried: Batch) -> torch.Tensor:
        """The features: there are no logits yet."""
        return kept


Source = Cut | PooledFeatures


def head_source(model: nn.Module, batch: Batch) -> PooledFeatures:
    """What a linear output layer reads, else what enters a head of several layers.

    Raises:
        NoCut: neither is one vector a row.
    """
    try:
        return PooledFeatures(model, batch)
    except NoCut:
        return HeadInputs(model, batch)


def pooled(task: Any, model: nn.Module, dataset: Any) -> tuple[PooledFeatures, KeptDataset]:
    """One vector a row that a head would read, from the cache or computed now.

    Args:
        task: puts batches together; its arguments say how features are kept.
        model: on its device, prepared for a stage of the head alone.
        dataset: the rows.

    Raises:
        UsageError: the model has no such place, or its features cannot be kept.
    """
    model.eval()
    batch, _ = _probes(task, dataset, task.arguments.device)
    name = task.arguments.model_name_or_path
    try:
        source = head_source(model, batch)
        return source, keep(task, model, source, {"train": [dataset]})["train"]
    except (NoCut, NotKept) as error:
        raise UsageError(f"--model {name}: its features cannot be used: {error}.") from error


def _wanted_type(task: Any) -> str:
    """How activations are to be kept: rounding changes every number, if not the most probable class."""
    wanted = task.arguments.feature_cache_dtype
    return "float32" if wanted == "auto" and task.problem.is_exact else wanted


class KeptDataset(Dataset[dict[str, Any]]):
    """A split as kept activations: `kept`, the inputs that the trained part still reads, and `labels`.

    With several views of each example, an epoch takes one of them.
    """

    def __init__(self, shards: Shards, places: np.ndarray[Any, Any], base: Any, carried: Sequence[str]) -> None:
        """Keep where the rows are: `places` of shape (views, rows, 3)."""
        self.shards, self.places, self.base, self.carried = shards, places, base, carried
        self.labels = base.labels
        self.view = 0
        if hasattr(base, "lengths"):
            self.lengths = base.lengths

    def set_epoch(self, epoch: int) -> None:
        """Choose the view of the next pass."""
        self.view = epoch % len(self.places)

    def __len__(self) -> int:
        """Number of rows."""
        return self.places.shape[1]

    def __getitem__(self, index: int) -> dict[str, Any]:
        """One row."""
        whole = _without_files(self.base, index) if self.carried else {}
        example = {name: value for name, value in whole.items() if name in self.carried}
        example["kept"] = self.shards.read(self.places[self.view, index])
        if self.labels is not None:
            example["labels"] = self.labels[index]
        return example

    def matrix(self) -> tuple[torch.Tensor, torch.Tensor]:
        """All views of all rows as they are kept, shape (views × rows, features), and labels, shape (views × rows,).

        Of rows with a vector a token, the tokens that have a label: (tokens, features) and (tokens,).
        """
        if self.shards.settings["ragged"]:
            labels = [torch.tensor(own) for own in self.labels]
            pairs = zip(self.places[0], labels, strict=True)
            tokens = [self.shards.read(place)[own >= 0] for place, own in pairs]
            self.shards.release()
            return torch.cat(tokens), torch.cat([own[own >= 0] for own in labels])
        values = self.shards.read_rows(self.places.reshape(-1, 3))
        return values, torch.cat([torch.tensor(self.labels)] * len(self.places))

    def tokens(self) -> list[torch.Tensor]:
        """Of each row the vectors of its tokens, shape (tokens, features)."""
        values = [self.shards.read(place).clone() for place in self.places[0]]
        self.shards.release()
        return values


def _without_files(dataset: Any, index: int) -> dict[str, Any]:
    """A row, without what would have to be read from a file where the data set can leave that out."""
    return getattr(dataset, "without_files", dataset.__getitem__)(index)


def keep(task: Any, model: nn.Module, source: Source, data: dict[str, list[Any]]) -> dict[str, KeptDataset]:
    """The activations of all splits, from the cache or computed now.

    Args:
        task: puts batches together; its arguments say how much may be kept.
        model: whole and in eval mode, on its device.
        source: what is taken from the model.
        data: for each split its datasets: one, or one a view.

    Raises:
        NotKept: the cache cannot be written, or the activations do not fit into it.
    """
    arguments = task.arguments
    keys = {split: [_keys(dataset, arguments) for dataset in views] for split, views in data.items()}
    extraction = _Extraction(task, model, source, data["train"][0])
    wanted = _wanted_type(task)
    shards = extraction.shards(wanted)
    # What suited the rows that the folder began with may not suit those of other data.
    others = bool((shards.find(keys["train"][0][:_ROWS])[:, 0] < 0).all())
    rounded = others and wanted == "auto" and shards.settings["dtype"] == "float16"
    if any(compute.of_all_processes(rounded and extraction.smallest_type != "float16")):
        shards = extraction.shards("float32")
    with _together():
        solves, frozen = isinstance(source, PooledFeatures), _frozen_part(model, source)
        _announce(shards, keys, data, arguments.feature_cache_gb, solves, frozen)
    for _ in range(2):  # a second time where another run removed shards meanwhile
        with _together():
            for split, views in data.items():
                for dataset, dataset_keys in zip(views, keys[split], strict=True):
                    extraction.run(shards, dataset, dataset_keys)
        with _together():
            shards.reload()
        places = {split: np.stack([shards.find(entry) for entry in entries]) for split, entries in keys.items()}
        missing = any((entry[..., 0] < 0).any() for entry in places.values())
        if not any(compute.of_all_processes(missing)):
            return {
                split: KeptDataset(shards, places[split], views[0], source.carried) for split, views in data.items()
            }
    raise NotKept("another run keeps emptying the cache")


def _frozen_part(model: nn.Module, source: Source) -> float:
    """The part of the parameters that lies before what is kept."""
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    return 1 - sum(size for name, size in sizes.items() if source.is_trained(name)) / sum(sizes.values())


def _announce(
    shards: Shards,
    keys: dict[str, list[Any]],
    data: dict[str, list[Any]],
    budget: float,
    solves: bool,
    frozen: float,
) -> None:
    """Say what is kept, what is there already, what it saves and what it takes; refuse what does not fit.

    Args:
        shards: where it is kept.
        keys: of the rows, by split and view.
        data: the data sets.
        budget: 10^9 bytes that all kept features may take.
        solves: whether a head is solved on it, in memory.
        frozen: part of the parameters that run once.

    Raises:
        NotKept: over the budget, or more than half of the free disk; for a head that is solved, of the free memory.
    """
    settings = shards.settings
    every = np.unique(np.concatenate([entry for entries in keys.values() for entry in entries]))
    missing = int((shards.find(every)[:, 0] < 0).sum())
    lengths = [length for views in data.values() for length in getattr(views[0], "lengths", [])]
    numbers = int(np.prod(settings["shape"], dtype=np.int64)) * (np.mean(lengths) if settings["ragged"] else 1)
    row_bytes = float(numbers * DTYPES[settings["dtype"]].itemsize)
    needed, used = missing * row_bytes, folder_bytes(shards.folder.parent)
    free = shutil.disk_usage(nearest_existing(shards.folder)).free  # another run may have removed it
    if missing and (needed + used > budget * 1e9 or needed > free / 2):  # the other half is for the run's models
        raise NotKept(
            f"they need {needed / 1e9:.2g} GB beside the {used / 1e9:.2g} GB there, more than --feature_cache_gb "
            f"{budget:g} or half of the {free / 1e9:.2f} GB free allow (hftl cache rm makes room)"
        )
    held = compute.local_processes() * len(every) * row_bytes
    available = compute.free_memory()
    if solves and held > available / 2:
        raise NotKept(
            f"solving a head holds them in memory, {held / 1e9:.2g} GB, more than half of the {available / 1e9:.2g} GB "
            "that are free"
        )
    state = f"{missing:,} to compute" if missing else "all in the cache"
    say(
        f"features: the frozen part runs once for each of {len(every):,} examples ({state}), {frozen:.0%} of the "
        f"parameters; {len(every) * row_bytes / 1e6:,.1f} MB as {settings['dtype']} in {shards.folder}"
    )


class _Extraction:
    """The frozen part run over rows that are not kept yet; of data that is kept nothing is prepared."""

    def __init__(self, task: Any, model: nn.Module, source: Source, dataset: Any) -> None:
        self.task, self.model, self.source = task, model, source
        self.arguments = task.arguments
        self.dataset = dataset
        self.last_line = time.monotonic()

    @functools.cached_property
    def batch(self) -> dict[str, torch.Tensor]:
        """The first rows of train."""
        return self.inputs(self.task.collate([self.dataset[index] for index in range(min(_ROWS, len(self.dataset)))]))

    @functools.cached_property
    def fast(self) -> nn.Module:
        """The model, or a copy with BatchNorm folded into its convolutions and adapters merged.

        Not where a BatchNorm behind the boundary would go into a convolution before it.
        """
        if not backbones.is_convolutional(self.model) and not hasattr(self.model, "peft_config"):
            return self.model
        rows = {name: value[:2] for name, value in self.batch.items()}
        fast = compute.folded(self.model, rows)
        found, expected = (self.source.capture(model, rows).float() for model in (fast, self.model))
        return fast if compute.is_as_folded(found, expected) else self.model

    def inputs(self, batch: Batch) -> dict[str, torch.Tensor]:
        """A batch as the model takes it."""
        return backbones.inputs_of(batch, self.arguments.device)

    def capture(self, batch: Batch) -> torch.Tensor:
        """The activations of a batch in the run's precision."""
        fast = self.fast  # folded, and compared with the model, in float32
        with compute.autocast(self.arguments.precision, self.arguments.device):
            return self.source.capture(fast, batch)

    def shards(self, dtype: str) -> Shards:
        """The folder of these activations, in this type or with `auto` in one that suits.

        Raises:
            NotKept: it cannot be written, in whichever process.
        """
        task, model, source = self.task, self.model, self.source
        name = fingerprint(task, model, source, self.arguments.precision, self.dataset, dtype)
        with _together():
            return Shards(cache_folder() / "features" / name, lambda: self.settings(dtype))

    def settings(self, dtype: str) -> dict[str, Any]:
        """How rows are kept."""
        shape = self.first.shape
        return {
            "dtype": self.smallest_type if dtype == "auto" else dtype,
            "shape": list(shape[2:] if self.source.ragged else shape[1:]),
            "ragged": self.source.ragged,
            "model": public_name(self.arguments.model_name_or_path),
            "entry": self.source.entry,
        }

    @functools.cached_property
    def first(self) -> torch.Tensor:
        """The activations of the first rows."""
        return self.capture(self.batch)

    @functools.cached_property
    def smallest_type(self) -> str:
        """16 bits where that changes no prediction of the first rows and leaves room for larger values behind them."""
        kept = self.first
        if kept.dtype is torch.bfloat16:
            return "bfloat16"
        carried = {name: self.batch[name] for name in self.source.carried}
        rounded = kept.to(torch.float16)
        if not kept.abs().max() < _LARGEST:
            return "float32"
        with compute.autocast(self.arguments.precision, self.arguments.device):
            exact, near = (self.source.outputs(value, carried).argmax(dim=-1) for value in (kept, rounded))
        return "float16" if exact.equal(near) and not self._is_lost(kept, rounded) else "float32"

    def _is_lost(self, kept: torch.Tensor, rounded: torch.Tensor) -> bool:
        """Whether rounding hides what tells rows apart: a solved head stretches every feature by its deviation."""
        rounded, kept = (values.flatten(0, -2) for values in (rounded, kept))
        error = (rounded.float() - kept).square().mean(dim=0).sqrt()
        return self.source.is_solvable and bool((error > 0.01 * kept.std(dim=0)).any())

    def run(self, shards: Shards, dataset: Any, keys: np.ndarray[Any, Any]) -> None:
        """Compute the rows that are missing, of equal ones the first: this process its share of them."""
        missing = np.sort(np.unique(keys, return_index=True)[1])
        missing = missing[shards.find(keys[missing])[:, 0] < 0]
        lengths = getattr(dataset, "lengths", None)
        known = None if lengths is None else np.asarray(lengths)[missing].tolist()
        half, on_cpu = self.arguments.precision != "fp32", self.arguments.device.type == "cpu"
        chosen = [missing[group].tolist() for group in batches.groups(known, len(missing), None, on_cpu, half)]
        chosen = chosen[self.arguments.process_index :: self.arguments.world_size]
        # Texts are tokenised already; augmented views draw random numbers, of which a process has one sequence.
        threads = 0 if lengths is not None else batches.decoding_threads(getattr(dataset, "rows", ()))
        threads = min(threads, 1) if getattr(dataset, "view", None) is not None else threads
        pending: list[tuple[int, torch.Tensor]] = []

        def publish() -> None:
            if pending:
                shards.write(keys[[index for index, _ in pending]], [row for _, row in pending])
                pending.clear()

        try:
            for number, (group, examples) in enumerate(batches.prepared(dataset, chosen, threads, False), start=1):
                batch = self.task.collate(examples)
                kept = self.capture(self.inputs(batch)).cpu()
                real = batch["attention_mask"].bool() if self.source.ragged else None
                rows = [kept[row] if real is None else kept[row][real[row]] for row in range(len(group))]
                pending += zip(group, rows, strict=True)
                size = sum(row.numel() for _, row in pending) * shards.dtype.itemsize
                due = time.monotonic() - self.last_line > _SECONDS_BETWEEN_SHARDS
                if due or size >= _SHARD_BYTES:
                    publish()
                if due:
                    self.last_line = time.monotonic()
                    say(f"features: {number} of {len(chosen)} batches")
        except NotKept:
            raise
        except BaseException:  # what stops the run is told, whatever happens to the last rows
            with contextlib.suppress(NotKept):
                publish()
            raise
        publish()


def _keys(dataset: Any, arguments: Any) -> np.ndarray[Any, Any]:
    """64 bits for the content of each row."""
    full = arguments.feature_cache_hash == "full"
    return np.array(in_threads(lambda index: dataset.key(index, full), range(len(dataset))), dtype=np.uint64)


@contextlib.contextmanager
def _together() -> Iterator[None]:
    """Wait for all processes at the end; what stops one of them stops all.

    Raises:
        NotKept: a process has a reason.
    """
    reason = ""
    try:
        yield
    except NotKept as error:
        reason = str(error)
    for found in filter(None, compute.of_all_processes(reason)):
        raise NotKept(found)


# --- a stage on kept activations -------------------------------------------------------------------------------------


class KeptFeatures:
    """What a stage trains on in place of the inputs.

    Attributes:
        stage: the stage; of a solved head it has the output layer alone.
        data: the splits as kept activations.
        source: where they were taken.
        seconds: what it took to have them.
        probe: a head of `--head` that the model cannot hold; None where its own answers.
        gain: of a solved head: how far its logits move where the features of a row move by their own length, which says
            what a step may do to them; of the rows of validation the mean, of the classes the root of the mean square.
    """

    probe: Probe | None = None
    gain: float = 0.0

    def __init__(self, task: Any, stage: Stage, source: Source, data: dict[str, KeptDataset], seconds: float) -> None:
        """Keep all of it."""
        self.task, self.stage, self.source, self.data, self.seconds = task, stage, source, data, seconds

    @property
    def solved(self) -> bool:
        """Whether the head is solved; else the part behind the cut trains."""
        return isinstance(self.source, PooledFeatures)

    @property
    def cut(self) -> Cut | None:
        """Where the model is cut for training."""
        return self.source if isinstance(self.source, Cut) else None

    def collate(self, examples: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """A batch of kept rows: `kept` of shape (rows, …), with zeros for padding, and what is carried."""
        kept = [example["kept"] for example in examples]
        if self.source.carried:
            batch = self.task.collate([{k: v for k, v in example.items() if k != "kept"} for example in examples])
        else:
            batch = {"labels": torch.tensor([row["labels"] for row in examples])} if "labels" in examples[0] else {}
        if not self.source.ragged:
            return {"kept": torch.stack(kept), **batch}
        real = batch["attention_mask"].bool()
        padded = kept[0].new_zeros(*real.shape, *kept[0].shape[1:])
        padded[real] = torch.cat(kept)
        return {"kept": padded, **batch}

    def release(self) -> None:
        """Make the model whole again."""
        if self.cut is not None:
            self.cut.remove()

    def solve(self, trainer: Any) -> LinearHead:
        """Solve the output layer of the model, once for all processes; and a head beside it, where one answers.

        What the task solved last is not solved again: `lp_ft` behind `frozen` begins with the same layer.
        """
        layer: Any = self.source.layer  # type: ignore[union-attr]
        sign = 1 if trainer.args.greater_is_better else -1
        words = [sum(tag >= 0 for tag in own) for own in self.data["validation"].labels] if self.source.ragged else []

        def score(logits: torch.Tensor, labels: torch.Tensor) -> float:
            chooses = self.task.arguments.metric_for_best_model == "loss"
            scores = {"loss": float(trainer.compute_loss_func({"logits": logits}, labels))} if chooses else {}
            if words:
                logits, labels = (as_rows(values.split(words)) for values in (logits, labels))
            return sign * self.task.choosing_score(scores | self.task.score(logits.numpy(), labels.numpy()))

        usual = self.task.problem.head
        kind = self.task.arguments.head or usual
        beside = kind in BESIDE or bool(wished(self.task.arguments))
        train, validation = (self.data[split].matrix() for split in ("train", "validation"))
        rows, held_out = ((features[:, : layer.in_features], labels) for features, labels in (train, validation))
        loss, start, intercept = trainer.compute_loss_func, self._known_layer(trainer), layer.bias is not None
        own, names = usual if beside else kind, self.task.label_names
        settings = (own, names, intercept, trainer.args.metric_for_best_model)
        key = _key_of_solution(settings, loss, rows, held_out, start)
        if self.task.last_solution is None or self.task.last_solution[0] != key:
            self.task.last_solution = key, fit_linear_head(own, rows, held_out, names, loss, score, intercept, start)
        solution = self.task.last_solution[1]
        with torch.no_grad():
            layer.weight.copy_(solution.weight)
            if layer.bias is not None:
                layer.bias.copy_(solution.bias)
            for parameter in layer.parameters() if trainer.args.world_size > 1 else ():
                torch.distributed.broadcast(parameter, src=0)
        length = float(held_out[0].float().norm(dim=1).mean())
        self.gain = float(layer.weight.norm()) / len(layer.weight) ** 0.5 * length
        if beside:
            self.probe = self._fit_beside(kind, train, validation, trainer, score)
        return solution

    def _known_layer(self, trainer: Any) -> tuple[torch.Tensor, torch.Tensor | None] | None:
        """Weight and bias of an output layer that knows the classes, from texts or before; None where it is fresh."""
        layer: Any = self.source.layer  # type: ignore[union-attr]
        if not (backbones.starts_from_texts(trainer.model) or self.task.arguments.keep_head):
            return None
        return layer.weight.detach().cpu(), None if layer.bias is None else layer.bias.detach().cpu()

    def _fit_beside(
        self,
        kind: str,
        train: tuple[torch.Tensor, torch.Tensor],
        validation: tuple[torch.Tensor, torch.Tensor],
        trainer: Any,
        score: Callable[[torch.Tensor, torch.Tensor], float],
    ) -> Probe:
        """A head that the output layer cannot hold: of another kind, or on more than it reads."""
        source: Any = self.source
        names = self.task.label_names
        if kind not in BESIDE:
            head = fit_linear_head(kind, train, validation, names, trainer.compute_loss_func, score)
            return linear_probe(head, source.joined)
        if kind == "mlp":
            check_every_class(kind, train[1], names)
        linear = source.outputs(validation[0].to(source.layer.weight.device), {}).cpu()
        probe = fit_probe(kind, train, validation, linear, score, trainer.args.seed)
        return dataclasses.replace(probe, joined=source.joined)

    def logits(self, split: str, ordinary: bool = False) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
        """Logits of shape (rows, outputs) and labels, as `hftl.data.labels_of`, of a whole split.

        They are the probe's where there is one, unless those of the model's ordinary head are asked for.
        """
        layer = next(self.source.layer.parameters())  # type: ignore[union-attr]
        if self.source.ragged:
            rows = self.data[split].tokens()
            tokens = self.source.outputs(torch.cat(rows).to(layer.device), {}).cpu().split([len(row) for row in rows])
            return as_rows(tokens).numpy(), as_rows([torch.tensor(own) for own in self.data[split].labels]).numpy()
        features, labels = self.data[split].matrix()
        logits = self.source.outputs(features.to(layer.device), {}).cpu()
        if self.probe is not None and not ordinary:
            logits = self.probe.logits(features, logits)
        return logits.numpy(), labels.numpy()


def _key_of_solution(
    settings: tuple[str, list[str], bool, str],
    loss: Loss,
    train: tuple[torch.Tensor, torch.Tensor],
    validation: tuple[torch.Tensor, torch.Tensor],
    start: tuple[torch.Tensor, torch.Tensor | None] | None,
) -> bytes:
    """What a solved layer follows from.

    Args:
        settings: kind of the head, names of the classes, whether there is a bias, and what chooses the penalty.
        loss: known by what it says of numbers that are drawn.
        train: features of shape (rows, features) and labels.
        validation: the same of other rows.
        start: a layer that knows the classes.
    """
    digest = hashlib.blake2b(repr(settings).encode(), digest_size=16)
    for tensor in (*train, *validation, *(start or ())):
        digest.update(repr(None if tensor is None else tensor.shape).encode())
        if tensor is not None:
            digest.update(tensor.contiguous().flatten().view(torch.uint8).numpy().data)
    labels = train[1][:: max(1, len(train[1]) // _ROWS_OF_LOSS)]
    logits = torch.randn(len(labels), len(settings[1]), generator=torch.Generator().manual_seed(0))
    digest.update(repr(float(loss({"logits": logits.double()}, labels))).encode())
    return digest.digest()


def as_rows(values: Sequence[torch.Tensor]) -> torch.Tensor:
    """Rows of different lengths, each of shape (tokens, …), as one tensor of shape (rows, tokens, …)."""
    return nn.utils.rnn.pad_sequence([*values], batch_first=True, padding_value=-100)


def check_wishes(plan: Plan, arguments: TransferArguments) -> None:
    """Refuse flags that no stage of a plan can follow.

    Raises:
        UsageError: `--feature_cache on` where everything trains, `--head_solver lbfgs` where no head is fitted alone,
            `--head` of another kind than logistic, or on joined features, where it would be trained, or another method
            than frozen; more `--feature_layers` than there are.
    """
    blocks = backbones.parameter_blocks(plan.model)
    first = [min((blocks[name] for name in stage.trainable), default=max(blocks.values())) for stage in plan.stages]
    if not plan.stages[-1].trainable:
        _check_untrained(arguments)
    if arguments.feature_cache == "on" and max(first) == 0:
        raise UsageError(f"--feature_cache on: --method {arguments.method} trains the whole model. Leave it out.")
    for name, default in OF_KEPT_FEATURES.items() if max(first) == 0 else ():
        if _is_set(arguments, name, default):
            raise UsageError(
                f"--{name}: --method {arguments.method} trains from the first block on and keeps no features, unlike "
                "frozen, partial and others. Leave it out."
            )
    if arguments.head_solver != "auto" and max(first) < max(blocks.values()):
        raise UsageError(
            f"--head_solver {arguments.head_solver}: --method {arguments.method} fits no head alone. Leave it out."
        )
    if arguments.head_solver == "lbfgs":
        trains = OF_HEAD_TRAINING if len(plan.stages) == 1 else {"head_epochs"}
        asked = [f"--{name}" for name in sorted(trains & arguments.typed)]
        for flag in [*_unsolved(arguments, last=first[-1] == max(blocks.values())), *asked]:
            raise UsageError(f"--head_solver lbfgs: {flag} is for a head that is trained. Leave one of them out.")
    if arguments.head_solver == "lbfgs" and arguments.finds_learning_rate and first[-1] == max(blocks.values()):
        raise UsageError("--head_solver lbfgs has no learning rate to find: use --head_solver sgd, or give no rate.")
    if arguments.head_solver == "lbfgs" and arguments.feature_cache == "off":
        raise UsageError("--head_solver lbfgs needs kept features: leave out --feature_cache off.")
    if arguments.feature_views > 1 and arguments.feature_cache == "off":
        raise UsageError("--feature_views are kept features: leave out --feature_cache off.")
    if (arguments.feature_layers or 1) > max(blocks.values()):
        raise UsageError(
            f"--feature_layers must lie between 1 and the model's {max(blocks.values())} blocks, not "
            f"{arguments.feature_layers}."
        )
    if arguments.head is not None or wished(arguments):
        _check_head(arguments)
    # The first stage says it as soon; a later one would behind a training.
    kept = [number for number, block in enumerate(first) if block > 0]
    if kept and kept[-1] > 0 and (changed := _changed_each_epoch(arguments, False)):
        for flag, value in _insists(arguments, fits_head=first[kept[-1]] == max(blocks.values())):
            raise UsageError(f"--{flag} {value} cannot be: {changed}.")


def _is_set(arguments: TransferArguments, name: str, default: Any) -> bool:
    """Whether a setting says something; that no views are kept is in a recipe whatever the method beside it."""
    value = getattr(arguments, name)
    return value != default and (name, value) != ("feature_views", 0)


def _check_untrained(arguments: TransferArguments) -> None:
    """Refuse what is for a training, where nothing trains."""
    defaults = {name: field.default for name, field in type(arguments).__dataclass_fields__.items()}
    for name in sorted(
        {*OF_HEAD_TRAINING, *_OF_ANY_TRAINING, *OF_KEPT_FEATURES} - {"learning_rate", "head_learning_rate"}
    ):
        if name in defaults and _is_set(arguments, name, defaults[name]):
            raise UsageError(f"--{name}: --method {arguments.method} trains nothing. Leave it out.")


def _check_head(arguments: TransferArguments) -> None:
    kind, joined = arguments.head or "logistic", as_flags(wished(arguments))
    flag = joined if kind == "logistic" and joined else f"--head {kind}"
    if arguments.method not in ("frozen", "setfit"):
        raise UsageError(f"{flag} belongs to --method frozen and setfit, not to {arguments.method}. Leave it out.")
    if arguments.head_solver == "lbfgs" and "head_solver" in arguments.typed and kind in BESIDE:
        raise UsageError(
            f"--head_solver lbfgs solves a linear head, which --head {kind} is not: leave one of them out."
        )
    if kind == "logistic" and not joined:
        return
    head = f"{flag}: the head" if kind == "logistic" else flag
    for name, value in (("head_solver", "sgd"), ("feature_cache", "off")):
        if getattr(arguments, name) == value:
            raise UsageError(f"{head} is fitted on kept features: leave out --{name} {value}.")
    if arguments.keep_head and kind != "logistic":
        raise UsageError(f"{head} is fitted to the training rows alone: leave out --keep_head.")
    trains = _of_training(arguments, alone=True) if arguments.head_solver == "auto" else set()
    for name in sorted(trains & arguments.typed or trains & arguments.given):
        raise UsageError(f"{head} is fitted, not trained: leave out --{name}.")
    if (kind in BESIDE or joined) and (views := averaged_views(arguments)):
        raise UsageError(f"{head} answers for the plain view alone: leave out {views}.")
    if unused := _unsolved(arguments, last=True):
        raise UsageError(f"{head} is fitted, not trained: leave out {unused[0]}.")
    if kind == "logistic":
        return  # its loss, targets and weights are the task's
    if arguments.loss != "cross_entropy":
        raise UsageError(f"--head {kind} has a loss of its own: leave out --loss {arguments.loss}.")
    if arguments.label_smoothing_factor:
        raise UsageError(f"--head {kind} has no targets to smooth: leave out --label_smoothing_factor.")
    if arguments.class_weights != "none" and kind not in ("svm", "ridge"):
        raise UsageError(f"--head {kind} weighs no classes: leave out --class_weights, or use logistic, svm or ridge.")


def mostly_frozen(stage: Stage, model: nn.Module) -> bool:
    """Whether at least half of the blocks lie before the first trained one."""
    blocks = backbones.parameter_blocks(model)
    head = max(blocks.values())
    return min((blocks[name] for name in stage.trainable), default=head) * 2 >= head


def sees_plain_rows(task: Any, stage: Stage, model: nn.Module) -> bool:
    """Whether a stage of which nothing is kept trains on the plain view, as it would on what is kept.

    Then its results do not depend on whether that can be. Not where an augmentation is asked for.
    """
    changes = _augmentation_asked_for(task.arguments) or task.mixing() is not None
    return bool(stage.trainable) and not changes and mostly_frozen(stage, model)


def longest_stage(stages: Sequence[Stage], model: nn.Module) -> Stage:
    """The last stage that trains more than the end of the model, else the last one."""
    return next((stage for stage in reversed(stages) if not mostly_frozen(stage, model)), stages[-1])


def keep_features(
    task: Any, stage: Stage, model: nn.Module, splits: Any, data: dict[str, Any], alone: bool, last: bool
) -> KeptFeatures | None:
    """The frozen part's activations for a stage, or None where it trains on the inputs; why is said.

    Args:
        task: the task.
        stage: what trains.
        model: the plan's model.
        splits: the data with its labels.
        data: the data sets of the splits.
        alone: whether the plan has no other stage.
        last: whether no stage follows.

    Raises:
        UsageError: `--feature_cache on`, or `--head_solver lbfgs`, and it cannot be.
    """
    arguments = task.arguments
    if not stage.trainable:
        return None  # each row goes through the model once, and none of train does
    blocks = backbones.parameter_blocks(model)
    first, head = min(blocks[name] for name in stage.trainable), max(blocks.values())
    solves = first == head and _may_solve(task, stage, splits, alone, last)
    starts = solves and not last  # the stages behind it see the rows as they are asked for
    if first > 0 and _augmentation_asked_for(arguments, starts):
        arguments.feature_views = 0  # as the recipe will say, where every flag counts as given
    if arguments.feature_cache == "off" and solves:
        say("head: trained by SGD, since --feature_cache off keeps nothing to solve it on")
    if arguments.feature_cache == "off" or first == 0:
        return None
    if first * 2 < head and arguments.feature_cache != "on":  # large activations would be kept for little
        if alone and arguments.typed & {"unfreeze_blocks", "lora_blocks"}:
            say("features: not kept, since less than half of the blocks is frozen (--feature_cache on keeps them)")
        return None
    try:
        if not solves and (arguments.head not in (None, "logistic") or wished(arguments)):
            raise NotKept("the task or the stage has a loss of its own")
        _check_possible(task, stage, data, solves, starts)
        started = time.perf_counter()
        source, stage = _source(task, stage, model, data, solves)
        views = {name: [rows] for name, rows in data.items()}
        views["train"] = task.views(splits.train, max(1, arguments.feature_views), data["train"])
        kept = keep(task, model.eval(), source, views)
    except (NoCut, NotKept) as error:
        for flag, value in _insists(arguments, fits_head=first == head):
            raise UsageError(f"--{flag} {value} cannot be: {error}.") from error
        trained = ", and the head is trained by SGD" if solves else ""
        say(f"features: not kept, since {error}; the frozen part runs in every epoch{trained}")
        return None
    if first == head:
        arguments.head_solver = "lbfgs" if isinstance(source, PooledFeatures) else "sgd"  # as the recipe will say
    return KeptFeatures(task, stage, source, kept, time.perf_counter() - started)


def _insists(arguments: TransferArguments, fits_head: bool) -> list[tuple[str, Any]]:
    """Flags, with their values, that allow nothing but kept features; some mean a stage of the head alone."""
    flags: dict[str, Any] = {"feature_cache": "on", "feature_views": max(2, arguments.feature_views)}
    if fits_head:
        flags = {**wished(arguments), **flags, "head_solver": "lbfgs"}
    if fits_head and arguments.head not in (None, "logistic"):
        flags = {"head": arguments.head, **flags}
    return [(flag, value) for flag, value in flags.items() if getattr(arguments, flag) == value]


#: what changes nothing where nothing trains, beside those and the rates, which no such method takes
_OF_ANY_TRAINING = {
    "warmup_steps", "average", "soup_runs", "wise_ft", "sampler", "early_stopping_patience",
    "augmentation", "random_erasing", "mixup", "cutmix", "head_solver", "feature_cache",
}  # fmt: skip


def _of_training(arguments: TransferArguments, alone: bool) -> set[str]:
    """Flags of the training of a head, which is all that trains or comes before something else; or behind pairs."""
    return set() if arguments.method == "setfit" else OF_HEAD_TRAINING if alone else {"max_steps", "head_epochs"}


def _may_solve(task: Any, stage: Stage, splits: Any, alone: bool, last: bool) -> bool:
    """Whether a stage of the head alone is to be solved, as far as the settings say."""
    arguments = task.arguments
    if arguments.head_solver != "auto":
        return arguments.head_solver == "lbfgs"
    given, unsolved = sorted(_of_training(arguments, alone) & arguments.given), _unsolved(arguments, last)
    if unsolved:
        say(f"head: trained by SGD, as {unsolved[0]} asks")
    elif given:
        hint = "" if arguments.feature_cache == "off" else " (--head_solver lbfgs solves it)"
        say(f"head: trained by SGD, as --{given[0]} asks{hint}")
    return not given and not unsolved and stage.loss is None and is_solvable(task.loss(splits))


def _unsolved(arguments: TransferArguments, last: bool) -> list[str]:
    """Settings under which a head is trained rather than solved, in the last stage or before it."""
    found = [] if LOSSES.get(arguments.loss) else [f"--loss {arguments.loss}"]
    found += ["--sampler balanced"] if arguments.sampler == "balanced" else []
    found += ["--keep_head"] if arguments.keep_head and arguments.loss == "contrastive" else []
    found += ["--torch_compile"] if last and arguments.torch_compile and arguments.method != "setfit" else []
    return found + ([f"--average {arguments.average}"] if last and arguments.average != "none" else [])


def _augmentation_asked_for(arguments: Any, starts: bool = False) -> str | None:
    """The flag that somebody gave and that kept plain views would drop.

    Before other stages none but `--feature_views 0`, and that not where a recipe says that the head was solved: those
    stages left it there.
    """
    augmentation = getattr(arguments, "augmentation", "none")
    unkept = "--feature_views 0" if augmentation != "none" and arguments.feature_views == 0 else None
    if starts:
        return unkept if arguments.head_solver == "auto" else None
    if "feature_views" in arguments.given and arguments.feature_views > 0:
        return None
    if augmentation != "none" and "horizontal_flip" in arguments.typed and arguments.horizontal_flip:
        return "--horizontal_flip true"
    if "augmentation" in arguments.given and augmentation != "none":
        return f"--augmentation {augmentation}"
    if getattr(arguments, "random_erasing", None):
        return "--random_erasing"
    return unkept


_MIXED = "the rows of a batch are mixed anew in every step"


def _changed_each_epoch(arguments: TransferArguments, starts: bool) -> str | None:
    """What of the rows no epoch has twice, by a flag that asks for it."""
    if asked := _augmentation_asked_for(arguments, starts):
        return f"{asked} changes the images every epoch (--feature_views 4 keeps 4 of each)"
    if getattr(arguments, "word_dropout", None):
        return "--word_dropout changes the texts every epoch"
    mixes = not starts and (getattr(arguments, "mixup", None) or getattr(arguments, "cutmix", None))
    return _MIXED if mixes else None


def _check_possible(task: Any, stage: Stage, data: dict[str, Any], solves: bool, starts: bool) -> None:
    """Refuse what would give other results, or none.

    Raises:
        NotKept: as said.
    """
    arguments = task.arguments
    if changed := _changed_each_epoch(arguments, starts):
        raise NotKept(changed)
    if task.mixing() is not None and not starts:  # of a task of one's own too
        raise NotKept(_MIXED)
    if stage.penalty is not None and stage.penalty not in penalties.WITHOUT_INPUTS:
        raise NotKept(f"--penalty {arguments.penalty} looks at the inputs")
    if getattr(arguments, "n_gpu", 1) > 1 and not solves:
        raise NotKept("one process has several GPUs (start one for each with accelerate launch)")
    if arguments.torch_compile and not solves:
        raise NotKept("--torch_compile compiles the whole model")
    if is_sharded(arguments) and arguments.device.type != "cpu":  # on a CPU Accelerate shards nothing
        raise NotKept("the model is sharded")
    if not all(hasattr(rows, name) for rows in data.values() for name in ("key", "labels")):
        raise NotKept("the task's data sets have no `key` and `labels`")


def _source(task: Any, stage: Stage, model: nn.Module, data: dict[str, Any], solves: bool) -> tuple[Source, Stage]:
    """Where the activations are taken, and the stage that goes with it.

    Raises:
        NoCut: the model has no such place.
    """
    arguments = task.arguments
    model.to(arguments.device)
    frozen = prepare_modules(model, stage)
    probes = _probes(task, data["train"], arguments.device)
    if solves:
        try:
            source = PooledFeatures(model.eval(), probes[0])
            if wished(arguments):
                source.join(model, probes[0], arguments.feature_layers or 1, arguments.feature_pooling or "model")
        except NoCut as error:
            if any(flag != "feature_cache" for flag, _ in _insists(arguments, fits_head=True)):
                raise
            say(f"head: trained by SGD, since {error}")
        else:
            names = frozenset(name for name in stage.trainable if source.is_trained(name))
            return source, dataclasses.replace(stage, trainable=names)
    with compute.autocast(arguments.precision, arguments.device):
        cut = Cut(model, stage, frozen, probes)
    if _reads_features(cut, model.eval(), probes[0]):  # one cache for heads that are trained and solved
        cut.entry, cut.is_solvable = PooledFeatures.entry, True
    made = set(cut.carried) - set(_without_files(data["train"], 0)) if cut.carried else set()
    if made:
        raise NoCut(f"{', '.join(sorted(made))} is made from the inputs of a batch")
    return cut, stage


def _reads_features(cut: Cut, model: nn.Module, batch: Batch) -> bool:
    """Whether what enters the trained part is what a head is solved on."""
    head = backbones.structure(model).head
    if cut.ragged or cut.entry != backbones.plain_name(model, head[0]):
        return False
    try:
        features = PooledFeatures(model, batch).capture(model, batch)
    except NoCut:
        return False
    return features.equal(cut.capture(model, batch))


def _probes(task: Any, dataset: Any, device: torch.device) -> tuple[Batch, Batch]:
    """Two batches of different numbers of rows, and tokens: of the shortest texts and the longest."""
    order = np.arange(len(dataset))
    if hasattr(dataset, "lengths"):
        order = np.argsort(dataset.lengths, kind="stable")
    probes = []
    for rows in (order[:2], order[-3:]):
        batch = task.collate([dataset[int(index)] for index in rows])
        probes.append(backbones.inputs_of(batch, device))
    short, long = probes
    if "input_ids" in short and short["input_ids"].shape == (2, long["input_ids"].shape[1]):
        ids = short["input_ids"].shape
        short = {
            name: value[:, : ids[1] // 2] if value.shape == ids and not value.is_floating_point() else value
            for name, value in short.items()
        }
    return short, long
