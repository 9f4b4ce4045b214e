"""Parameter groups of a stage: which rate and which decay each parameter has."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

from torch import nn

from hftl import backbones, penalties
from hftl.methods import Stage


def parameter_groups(model: nn.Module, stage: Stage, weight_decay: float) -> list[dict[str, Any]]:
    """Groups for a torch optimizer: the stage's rate, decayed block by block towards the input, and weight decay.

    Block i of n learns at `learning_rate * layer_decay ** (n - 1 - i)` (Howard and Ruder 2018, Clark et al. 2020); the
    head at its own rate. Every parameter that trains is in exactly one group.

    Raises:
        RuntimeError: the stage names a parameter that the model does not have.
    """
    blocks = backbones.parameter_blocks(model)
    head = max(blocks.values())
    no_decay = backbones.no_decay_parameters(model)
    groups: dict[tuple[float, float], list[nn.Parameter]] = defaultdict(list)
    for name, parameter in model.named_parameters():
        if name not in stage.trainable:
            continue
        rate = stage.head_learning_rate
        if blocks[name] < head:
            rate = stage.learning_rate * stage.layer_decay ** (head - 1 - blocks[name])
        # L2-SP pulls to the pretrained weights in the place of decay, which pulls to zero.
        decays = name not in no_decay and not (stage.penalty is penalties.l2_sp and blocks[name] < head)
        groups[rate, weight_decay if decays else 0.0].append(parameter)
    covered = sum(map(len, groups.values()))
    if covered != len(stage.trainable):
        raise RuntimeError(f"Stage {stage.name!r} trains {len(stage.trainable)} parameters, but {covered} were found.")
    return [{"params": parameters, "lr": rate, "weight_decay": decay} for (rate, decay), parameters in groups.items()]
