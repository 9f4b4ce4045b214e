"""Where the frozen part of a model ends, and how the rest of it runs on what was kept there.

Nothing here knows a family of models. The place is found by running the model on two small batches and watching which
modules are called: the first one in which something trains is where the trained part begins. What enters it is kept
once an example. In training, a hook hands the kept activation to that module, and the modules before it hand on empty
tensors of the right shape instead of computing. The model stays the ordinary module throughout, with the parameters
that it has; whether all of this gives the same outputs is tested before it is used.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from hftl import backbones
from hftl.methods import Stage

#: how far the outputs on kept activations may be from the model's own, relative to the largest
_TOLERANCE = 1e-5

Batch = Mapping[str, torch.Tensor]


class NoCut(Exception):
    """The model cannot be cut where the stage needs it; the message says why."""


class _Captured(Exception):
    """What enters the trained part is known: the rest of the forward pass need not run."""


@dataclass(frozen=True)
class TracedTensor:
    """A tensor that a module gave: its shape, where "rows" and "tokens" stand for what changes from batch to batch."""

    shape: tuple[int | str, ...]
    dtype: torch.dtype


class Cut:
    """The boundary between the frozen and the trained part of a model in one stage.

    Attributes:
        entry: name of the module where the trained part begins, as the model names it without adapters; where a head
            is solved on what is kept, as there.
        carried: names of the inputs that the trained part may still need (token ids, masks); floating-point ones, such
            as pixels, are only read by the frozen part.
        ragged: whether the second dimension of what is kept is that of the tokens.
        is_solvable: whether what is kept are the features on which a head is solved.
    """

    is_solvable = False

    def __init__(self, model: nn.Module, stage: Stage, frozen: list[nn.Module], batches: tuple[Batch, Batch]) -> None:
        """Find the place.

        Args:
            model: the model, with adapters where the stage trains such.
            stage: what trains.
            frozen: modules that are in eval mode while the stage trains.
            batches: two batches with different numbers of rows, and of tokens where there are any.

        Raises:
            NoCut: there is no such place, or the outputs would be others.
        """
        self.model, self.frozen = model, frozen
        self._kept: torch.Tensor | None = None
        self._tokens = 0
        self._undo: list[Callable[[], None]] = []
        if any(batch["input_ids"].ndim > 2 for batch in batches if "input_ids" in batch):
            raise NoCut("each row is read several times, with one choice after the other")
        sizes = [_sizes(batch) for batch in batches]
        if sizes[0]["rows"] == sizes[1]["rows"] or sizes[0].get("tokens") == sizes[1].get("tokens", -1):
            raise NoCut("there are too few rows to find out how the model treats them")
        with self.as_trained(), explained_probe():
            traces = [traced(model, batch) for batch in batches]
            self._blocks = backbones.parameter_blocks(model)
            self._first = min(self._blocks[name] for name in stage.trainable)
            self._name = entry_module(model, self._blocks, self._first, frozen, traces[0])
            self.entry = self._plain_name = backbones.plain_name(model, self._name)
            self.carried = tuple(name for name, value in batches[0].items() if not value.is_floating_point())
            self._inputs = _merged(*(_described(dict(batch)) for batch in batches), *sizes)
            self._stubs = {
                name: _merged(*(trace.outputs[name] for trace in traces), *sizes)
                for name in _before(model, self._name, traces[0])
            }
            kept = [self.capture(self.model, batch) for batch in batches]
            shape = _merged(*map(_described, kept), *sizes).shape
            if shape[0] != "rows" or any(isinstance(size, str) for size in shape[2:]):
                raise NoCut(f"what enters {self.entry} has no row for each example")
            self.ragged, self.dtype = len(shape) > 1 and shape[1] == "tokens", kept[0].dtype
            if self.ragged and "attention_mask" not in self.carried:
                raise NoCut("without an attention mask padding cannot be told from texts")
            for values, batch in zip(kept, batches, strict=True):
                self._check(values, batch)

    @property
    def entry_module(self) -> nn.Module:
        """The module where the trained part begins."""
        return self.model.get_submodule(self._name)

    def is_trained(self, name: str) -> bool:
        """Whether an entry of the model's state dict belongs to the trained part."""
        if name in self._blocks:
            return self._blocks[name] >= self._first
        beside = self.model.get_submodule(name.rpartition(".")[0]).named_parameters(prefix=name.rpartition(".")[0])
        return any(self._blocks[other] >= self._first for other, _ in beside if other in self._blocks)

    def capture(self, model: nn.Module, batch: Batch) -> torch.Tensor:
        """What enters the trained part for a batch, of shape (rows, …).

        `model` may be a copy with folded BatchNorm and merged adapters.
        """
        captured: list[torch.Tensor] = []

        def stop(module: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
            captured.append(first_tensor(arguments, named))
            raise _Captured

        name = self._name if hasattr(model, "peft_config") else self._plain_name
        hook = model.get_submodule(name).register_forward_pre_hook(stop, with_kwargs=True)
        try:
            with torch.no_grad(), contextlib.suppress(_Captured):
                model(**batch)
        finally:
            hook.remove()
        return captured[0]

    def outputs(self, kept: torch.Tensor, carried: Batch) -> torch.Tensor:
        """Logits of shape (rows, classes) from kept activations, without gradients."""
        with self.installed(), torch.no_grad():
            return self.model(**self.inputs(kept, carried))["logits"]

    @contextlib.contextmanager
    def installed(self) -> Iterator[None]:
        """The model runs on kept activations; whole again at the end."""
        self.install()
        try:
            yield
        finally:
            self.remove()

    def install(self) -> None:
        """Let the frozen modules hand on instead of computing."""
        for name, description in self._stubs.items():
            module = self.model.get_submodule(name)
            module.forward = _Stub(self, description)
            self._undo.append(functools.partial(delattr, module, "forward"))
        hook = self.model.get_submodule(self._name).register_forward_pre_hook(self._hand_over, with_kwargs=True)
        self._undo.append(hook.remove)

    def remove(self) -> None:
        """Make the model whole again."""
        for undo in self._undo:
            undo()
        self._undo, self._kept = [], None

    def inputs(self, kept: torch.Tensor, carried: Batch) -> dict[str, torch.Tensor]:
        """What to call the installed model with, for kept activations of shape (rows, …) and the inputs carried."""
        self._kept = kept.to(self.dtype)
        self._tokens = _sizes(carried).get("tokens", 0)
        dummies = {name: self.empty(value) for name, value in self._inputs.items() if name not in self.carried}
        return {**carried, **dummies}

    def empty(self, description: TracedTensor) -> torch.Tensor:
        """A tensor of zeros that takes no memory, in the size of the current batch."""
        assert self._kept is not None
        sizes = {"rows": len(self._kept), "tokens": self._tokens}
        shape = [sizes[size] if isinstance(size, str) else size for size in description.shape]
        return torch.zeros((), dtype=description.dtype, device=self._kept.device).expand(shape)

    def _hand_over(
        self, module: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if isinstance(next(iter(arguments), None), torch.Tensor):
            return (self._kept, *arguments[1:]), named
        name = next(name for name, value in named.items() if isinstance(value, torch.Tensor))
        return arguments, {**named, name: self._kept}

    @contextlib.contextmanager
    def as_trained(self) -> Iterator[None]:
        """The modes that the modules have in a training step."""
        modes = {module: module.training for module in self.model.modules()}
        self.model.train()
        for module in self.frozen:
            module.training = False
        try:
            yield
        finally:
            for module, mode in modes.items():
                module.training = mode

    def _check(self, kept: torch.Tensor, batch: Batch) -> None:
        """Compare logits in training mode, with the same random numbers.

        Raises:
            NoCut: they differ, or the model does not run.
        """
        if self.ragged:  # padding is not kept
            real = batch["attention_mask"].bool()
            kept = kept.masked_fill(~real.view(*real.shape, *[1] * (kept.ndim - 2)), 0.0)
        with _seeded(), torch.no_grad():
            expected = self.model(**batch)["logits"]
        with _seeded():
            found = self.outputs(kept, {name: batch[name] for name in self.carried})
        different = (found - expected).abs()
        if self.ragged and different.ndim == 3:  # what the model says of padding nobody reads
            different = different[batch["attention_mask"].bool()]
        difference = float(different.max())
        if not difference <= _TOLERANCE * max(1.0, float(expected.abs().max())):
            raise NoCut(f"the layers from {self.entry} on need more than what enters there")


@contextlib.contextmanager
def explained_probe() -> Iterator[None]:
    """A model that does not run on a small batch, or without its first part, cannot be cut.

    Raises:
        NoCut: with what the model raised.
    """
    try:
        yield
    except (RuntimeError, ValueError, TypeError, AttributeError, IndexError, KeyError) as error:
        raise NoCut(f"the model does not run in parts ({' '.join(str(error).split())[:200]})") from error


class _Stub:
    """The `forward` of a frozen module that need not compute."""

    def __init__(self, cut: Cut, description: Any) -> None:
        self.cut, self.description = cut, description

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        return pytree.tree_map(
            lambda leaf: self.cut.empty(leaf) if isinstance(leaf, TracedTensor) else leaf, self.description
        )


# --- what a forward pass shows ---------------------------------------------------------------------------------------


@dataclass
class Trace:
    """The order in which modules were entered and left, how often, and what they gave."""

    entered: dict[str, int]
    left: dict[str, int]
    calls: dict[str, int]
    outputs: dict[str, Any]


def traced(model: nn.Module, batch: Batch) -> Trace:
    """Run the model on a batch and watch its modules."""
    trace = Trace({}, {}, {}, {})
    clock = iter(range(10**9))
    hooks = []
    for name, module in model.named_modules():

        def enter(module: nn.Module, arguments: Any, named: Any, name: str = name) -> None:
            trace.entered.setdefault(name, next(clock))
            trace.calls[name] = trace.calls.get(name, 0) + 1

        def leave(module: nn.Module, arguments: Any, output: Any, name: str = name) -> None:
            trace.left[name] = next(clock)
            trace.outputs[name] = _described(output)

        hooks.append(module.register_forward_pre_hook(enter, with_kwargs=True, prepend=True))
        hooks.append(module.register_forward_hook(leave))
    try:
        with _seeded(), torch.no_grad():
            model(**batch)
    finally:
        for hook in hooks:
            hook.remove()
    return trace


@contextlib.contextmanager
def _seeded() -> Iterator[None]:
    """The same random numbers each time, and the others left as they were."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


def entry_module(model: nn.Module, blocks: dict[str, int], first: int, frozen: list[nn.Module], trace: Trace) -> str:
    """The first module called that has no part before the block `first`, or a dropout that belongs to it.

    Raises:
        NoCut: there is none, or it is called more than once.
    """
    asleep = set(map(id, frozen))
    for name in sorted(trace.entered, key=trace.entered.__getitem__):
        module = model.get_submodule(name)
        depths = [blocks.get(f"{name}.{key}" if name else key, first) for key, _ in module.named_parameters()]
        if min(depths, default=-1) >= first or (
            not depths and id(module) not in asleep and backbones.is_random(module)
        ):
            if trace.calls[name] > 1:
                raise NoCut(f"{backbones.plain_name(model, name)} runs more than once a pass")
            return name
    raise NoCut("no module holds the trained parameters alone")


def _before(model: nn.Module, entry: str, trace: Trace) -> list[str]:
    """The outermost modules that are done before the trained part begins and are not called again.

    What has no parameters and gives more than a tensor (rotary positions) costs nothing and stays.
    """
    names: list[str] = []
    for name, module in model.named_modules():
        if name not in trace.left or trace.left[name] > trace.entered[entry] or backbones.is_below_any(name, names):
            continue
        if isinstance(trace.outputs[name], TracedTensor) or next(module.parameters(), None) is not None:
            names.append(name)
    return names


# --- shapes ----------------------------------------------------------------------------------------------------------


def _sizes(batch: Batch) -> dict[str, int]:
    """Rows of a batch, and tokens a row where there are token ids."""
    sizes = {"rows": len(next(iter(batch.values())))} if batch else {}
    ids = batch.get("input_ids")
    return sizes | ({} if ids is None else {"tokens": ids.shape[1]})


def _described(value: Any) -> Any:
    return pytree.tree_map(
        lambda leaf: TracedTensor(tuple(leaf.shape), leaf.dtype) if isinstance(leaf, torch.Tensor) else leaf, value
    )


def _merged(one: Any, other: Any, sizes: dict[str, int], other_sizes: dict[str, int]) -> Any:
    """Two descriptions of the same output on two batches as one in which the changing sizes are named."""
    leaves, structure = pytree.tree_flatten(one)
    others, other_structure = pytree.tree_flatten(other)
    if structure != other_structure:
        raise NoCut("a frozen layer gives different things for different batches")
    merged = []
    for leaf, same in zip(leaves, others, strict=True):
        if not isinstance(leaf, TracedTensor):
            merged.append(leaf)
            continue
        shape: list[int | str] = []
        for size, other_size in zip(leaf.shape, same.shape, strict=True):
            names = [name for name in sizes if (size, other_size) == (sizes[name], other_sizes[name])]
            if size != other_size and not names:
                raise NoCut("a frozen layer mixes rows and tokens")
            shape.append(size if size == other_size else names[0])
        merged.append(TracedTensor(tuple(shape), leaf.dtype))
    return pytree.tree_unflatten(merged, structure)


def first_tensor(arguments: tuple[Any, ...], named: dict[str, Any]) -> torch.Tensor:
    """What enters a module that was called with these arguments.

    Raises:
        NoCut: it is no single tensor.
    """
    for value in (*arguments[:1], *named.values()):
        if isinstance(value, torch.Tensor):
            return value
    raise NoCut("what enters one of its layers is no single tensor")
