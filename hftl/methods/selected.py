"""Methods that select what trains: from the top down, biases, norms, the block that the data calls for."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from hftl import backbones
from hftl.arguments import TransferArguments
from hftl.errors import UsageError
from hftl.methods.plan import (
    LEAST_STEPS,
    RATE_OF_FEW,
    Plan,
    after_head,
    all_parameters,
    blocks_to_unfreeze,
    head_stage,
    make_stage,
    resolved_rates,
)
from hftl.methods.reinit import reinitialise

#: stages that unfreeze, beside the head's, unless told: ULMFiT has four groups of layers; a stage for each block of a
#: deep model would start its schedule too often
_STAGES = 4


def gradual(model: nn.Module, arguments: TransferArguments) -> Plan:
    """First the head, then more and more blocks from the top, and at last everything (Howard and Ruder 2018, ULMFiT).

    The blocks are unfrozen in at most four steps of about equal size, or so many that none has more than
    `--unfreeze_blocks`. `--num_train_epochs` is that of each step, 1 when not given, as in ULMFiT.

    Raises:
        UsageError: fewer blocks than one in a step, or more than there are.
    """
    reinitialise(model, arguments)
    rates = resolved_rates(model, arguments)
    blocks = backbones.parameter_blocks(model)
    count = max(blocks.values())
    most = math.ceil(count / blocks_to_unfreeze(arguments, count, 1))
    steps = min(_STAGES, most) if arguments.unfreeze_blocks is None else most
    stages = [head_stage(model, arguments, rates)]
    for step in range(1, steps + 1):
        unfrozen = math.ceil(count * step / steps)
        names = [name for name, block in blocks.items() if block >= count - unfrozen]
        # At half the rate: the head is fitted, and earlier steps have trained the later blocks. No other was measured.
        stage = make_stage(arguments, f"last {unfrozen} of {count} blocks", names, rates.backbone / 2, rates.head / 2)
        least = 0 if arguments.num_train_epochs else LEAST_STEPS // steps
        stages.append(replace(stage, epochs=arguments.num_train_epochs or 1.0, least_steps=least))
    stages[1] = after_head(stages[1], model, arguments)
    settings = {"learning_rate": rates.backbone, "head_learning_rate": rates.head, "head_epochs": stages[0].epochs}
    return Plan(model, tuple(stages), settings)


def bitfit(model: nn.Module, arguments: TransferArguments) -> Plan:
    """The biases and the head train (Ben Zaken et al. 2022, "BitFit")."""
    return _few(model, arguments, "biases", [name for name in all_parameters(model) if name.endswith("bias")])


def norm(model: nn.Module, arguments: TransferArguments) -> Plan:
    """Scale and shift of every normalisation layer and the head train (Frankle et al. 2021).

    Running statistics of BatchNorm stay, unless `--batch_norm` says otherwise.
    """
    norms = backbones.normalisation_modules(model)
    return _few(model, arguments, "norms", [name for name in all_parameters(model) if name.rpartition(".")[0] in norms])


def _few(model: nn.Module, arguments: TransferArguments, what: str, names: list[str]) -> Plan:
    """A plan of one stage for the parameters named and the head."""
    head = backbones.head_parameters(model)
    if set(names) <= set(head):
        raise UsageError(
            f"--method {arguments.method}: {type(model).__name__} has no {what} outside its head. Take another method "
            "(frozen, partial, full)."
        )
    rates = resolved_rates(model, arguments, "adapters", RATE_OF_FEW)
    stage = make_stage(arguments, f"{what} and head", [*names, *head], rates.adapters, rates.head)
    return Plan(model, (stage,), {"learning_rate": rates.adapters, "head_learning_rate": rates.head})


def surgical(model: nn.Module, arguments: TransferArguments) -> Plan:
    """First the head, then it and the one block that the data pulls at most (Lee et al. 2023, "surgical fine-tuning").

    The block is chosen when the second stage begins: a head that knows nothing yet would send noise through all blocks.
    """
    rates = resolved_rates(model, arguments)
    first = head_stage(model, arguments, rates)
    second = make_stage(arguments, "one block", all_parameters(model), rates.backbone, rates.head / 2)
    second = replace(after_head(second, model, arguments), choose=largest_relative_gradient)
    settings = {"learning_rate": rates.backbone, "head_learning_rate": rates.head, "head_epochs": first.epochs}
    return Plan(model, (first, second), settings)


def largest_relative_gradient(
    model: nn.Module,
    loss: Callable[..., Any],
    batches: Sequence[dict[str, torch.Tensor]],
    trainable: frozenset[str],
) -> tuple[str, frozenset[str]]:
    """The block with the largest ‖gradient‖ / ‖weights‖, as a stage's name, and its parameters with the head's.

    Args:
        model: in eval mode; it is left as it was.
        loss: `(outputs, labels) -> scalar`.
        batches: what the model takes, and `labels`.
        trainable: names of the parameters that may be chosen.
    """
    blocks = backbones.parameter_blocks(model)
    fixed = backbones.pooling_layer(model)  # no pretrained weights, and a large constant among them
    parameters = {
        name: parameter
        for name, parameter in model.named_parameters()
        if name in trainable and not backbones.is_below_any(name, fixed)
    }
    for parameter in parameters.values():
        parameter.requires_grad_(True)
    for batch in batches:
        inputs = backbones.inputs_of(batch)
        loss(model(**inputs), batch["labels"]).backward()
    count = max(blocks.values())
    ratios = []
    for block in range(count):
        inside = [parameter for name, parameter in parameters.items() if blocks[name] == block]
        gradients = [parameter.grad for parameter in inside if parameter.grad is not None]
        ratios.append(_length(gradients) / max(_length(inside), 1e-12))
    model.zero_grad()
    chosen = ratios.index(max(ratios))
    return f"block {chosen + 1} of {count} and head", frozenset(
        name for name in trainable if blocks[name] in (chosen, count)
    )


def _length(tensors: Sequence[torch.Tensor]) -> float:
    return math.sqrt(sum(float(tensor.detach().double().square().sum()) for tensor in tensors))
