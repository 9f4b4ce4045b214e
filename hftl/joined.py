"""Outputs of several blocks, each pooled to one vector and joined to what the output layer reads.

Features for heads that are fitted: what earlier blocks see may tell more of data far from the pretraining. Nothing here
knows a family of models: a block's output is found as in `hftl.cut`, by watching a forward pass. It is taken where the
next block reads it, since a block need not be a module of its own (GPT-2's embeddings are the sum of two); of the last
block it is what the last of its modules gives.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from hftl import backbones
from hftl.arguments import TransferArguments
from hftl.cut import Batch, NoCut, Trace, TracedTensor, entry_module, explained_probe, first_tensor, traced

#: --feature_pooling → what is taken over the positions of a block's output. With `model` the last block counts as the
#: model itself pools it, and no more
POOLINGS = {"model": ("mean",), "mean": ("mean",), "max": ("max",), "mean_max": ("mean", "max")}


@dataclass(frozen=True)
class Joined:
    """Where outputs of blocks are taken, and how each becomes one vector a row. By default nothing is joined.

    Attributes:
        inputs: names of modules; what enters them is taken.
        outputs: names of modules; what they give is taken.
        pooling: a key of `POOLINGS`.
        maps: whether the outputs are (rows, channels, height, width); else they are (rows, tokens, channels).
    """

    inputs: tuple[str, ...] = ()
    outputs: tuple[str, ...] = ()
    pooling: str = "model"
    maps: bool = False

    def features(self, model: nn.Module, head: str, batch: Batch) -> torch.Tensor:
        """The joined vectors, shape (rows, features): first what the output layer reads, then block after block.

        The model runs once. It may be a copy with folded BatchNorm.

        Args:
            model: in eval mode, on the device of the batch.
            head: name of the output layer, which is linear.
            batch: what `forward` takes.

        Raises:
            NoCut: a block gives something else than one vector a position.
        """
        found: dict[int, torch.Tensor] = {}

        def keep_input(place: int, module: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
            found[place] = self._pooled(first_tensor(arguments, named), batch)

        def keep_output(place: int, module: nn.Module, arguments: Any, output: Any) -> None:
            found[place] = self._pooled(_first(output), batch)

        hooks = []
        for place, name in enumerate(self.inputs):
            hook = functools.partial(keep_input, place)
            hooks.append(model.get_submodule(name).register_forward_pre_hook(hook, with_kwargs=True))
        for place, name in enumerate(self.outputs, start=len(self.inputs)):
            hooks.append(model.get_submodule(name).register_forward_hook(functools.partial(keep_output, place)))
        try:
            ordinary = backbones.head_input(model, head, batch)
        finally:
            for handle in hooks:
                handle.remove()
        return torch.cat([ordinary, *(found[place] for place in range(len(hooks)))], dim=1)

    def _pooled(self, values: torch.Tensor, batch: Batch) -> torch.Tensor:
        """One vector a row. At once, and not at the end of the pass: a later layer may write into what it reads."""
        mask = batch.get("attention_mask")
        rows = len(next(iter(batch.values())))
        fits = values.ndim == (4 if self.maps else 3) and len(values) == rows
        if not fits or (mask is not None and values.shape[:2] != mask.shape):
            wanted = "(rows, channels, height, width)" if self.maps else "(rows, tokens, channels)"
            raise NoCut(f"one of its blocks gives values of shape {tuple(values.shape)}, not {wanted}")
        positions = (values.flatten(2).transpose(1, 2) if self.maps else values).float()
        pools = {"mean": mean_of_positions, "max": _max_of_positions}
        return torch.cat([pools[kind](positions, mask) for kind in POOLINGS[self.pooling]], dim=1)


def mean_of_positions(values: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """The mean over positions, shape (rows, channels); of a text without tokens zeros.

    Args:
        values: shape (rows, positions, channels).
        mask: 1 at real tokens and 0 at padding, shape (rows, positions); None where all positions are real.
    """
    if mask is None:
        return values.mean(dim=1)
    real = mask.bool().unsqueeze(2)
    return values.masked_fill(~real, 0.0).sum(dim=1) / real.sum(dim=1).clamp(min=1)


def _max_of_positions(values: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """The largest value of each channel, else as `mean_of_positions`."""
    if mask is None:
        return values.amax(dim=1)
    largest = values.masked_fill(~mask.bool().unsqueeze(2), -math.inf).amax(dim=1)
    return largest.masked_fill(largest == -math.inf, 0.0)


def wished(arguments: TransferArguments) -> dict[str, Any]:
    """The flags, with their values, that ask for more than what the output layer reads; empty where none does."""
    flags = {"feature_layers": arguments.feature_layers, "feature_pooling": arguments.feature_pooling}
    return {name: value for name, value in flags.items() if value not in (None, 1, "model")}


def as_flags(values: dict[str, Any]) -> str:
    """`--feature_layers 3 --feature_pooling max`."""
    return " ".join(f"--{name} {value}" for name, value in values.items())


def find_joined(model: nn.Module, batch: Batch, layers: int, pooling: str) -> Joined:
    """Where the outputs of the last blocks are taken.

    Args:
        model: without adapters, in eval mode, on the device of the batch.
        batch: what `forward` takes; two rows do.
        layers: how many of the last blocks count, from 1 to all of them.
        pooling: a key of `POOLINGS`.

    Raises:
        NoCut: the blocks do not run one after the other, or give something else than one vector a position.
    """
    if "input_ids" in batch and "attention_mask" not in batch:
        raise NoCut("without an attention mask padding cannot be told from texts")
    with explained_probe():
        trace = traced(model, batch)
    blocks = backbones.parameter_blocks(model)
    last = max(blocks.values()) - 1
    parts = list(model.modules())  # none of them draws random numbers here
    inputs = [entry_module(model, blocks, first, parts, trace) for first in range(last - layers + 2, last + 1)]
    if len(set(inputs)) < len(inputs):
        raise NoCut("its blocks do not run one after the other")
    maps = "input_ids" not in batch and backbones.is_convolutional(model)
    outputs: list[str] = []
    if pooling != "model":
        mean_layer = backbones.pooling_layer(model)  # behind it all tokens are the mean, before it not
        inputs += mean_layer
        outputs += [] if mean_layer else [_last_output(model, trace)]
    return Joined(tuple(inputs), tuple(outputs), pooling, maps)


def _last_output(model: nn.Module, trace: Trace) -> str:
    """The last part of the last block that gives several positions: a norm may stand behind the model's pooling."""
    block = backbones.structure(model).blocks[-1]
    parts: list[str] = []
    for name in sorted(trace.left, key=len):  # those that are called themselves; a list of layers is not
        if backbones.is_below_any(name, block) and not backbones.is_below_any(name, parts):
            parts.append(name)
    for name in sorted(parts, key=trace.left.__getitem__, reverse=True):
        output = _first(trace.outputs[name])
        sizes = output.shape if isinstance(output, TracedTensor) else ()
        if len(sizes) in (3, 4) and sizes[len(sizes) - 2] != 1:  # tokens, or a side of a map wherever its channels are
            return name
    raise NoCut("its last block gives no more than one position a row, of which there is nothing to pool")


def _first(output: Any) -> Any:
    """What a layer gives, which many do as the first of several things."""
    if isinstance(output, dict):  # such as those of transformers' encoders
        return next(iter(output.values()))
    return output[0] if isinstance(output, tuple) else output
