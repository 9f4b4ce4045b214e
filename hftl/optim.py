"""Parameter groups of a stage: which rate and which decay each parameter has; and how rates change with time."""

from __future__ import annotations

import math
from collections import defaultdict
from typing import Any

from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from hftl import backbones, penalties
from hftl.methods import Stage


def schedule(name: str, optimizer: Optimizer, steps: int, rise: int) -> LambdaLR:
    """A schedule of `SCHEDULES` over the rates that the optimizer's groups have.

    Args:
        name: slanted_triangular or one_cycle.
        optimizer: with the highest rates.
        steps: of the whole training.
        rise: steps until the rate is highest.
    """
    shape = SCHEDULES[name]
    return LambdaLR(optimizer, lambda step: shape(step, steps, rise))


def slanted_triangular(step: int, steps: int, rise: int) -> float:
    """A short linear rise from a 32nd of the rate, and a long linear fall back to it (Howard and Ruder 2018).

    With the default warm-up of a tenth, the paper's `cut_frac`; 32 is its `ratio`.
    """
    part = step / rise if step < rise else 1 - (step - rise) / max(1, steps - rise)
    return (1 + max(0.0, part) * 31) / 32


def one_cycle(step: int, steps: int, rise: int) -> float:
    """A cosine up from a 25th of the rate, and one down to a 250,000th (Smith 2018).

    The shape of torch's OneCycleLR with a rise of 0.3; momentum stays as it is.
    """
    top, last = max(0, rise - 1), max(1, steps - 1)
    start, end, part = (1 / 25, 1.0, step / top) if step < top else (1.0, 4e-6, (step - top) / max(1, last - top))
    return end + (start - end) * (1 + math.cos(math.pi * min(1.0, part))) / 2


#: shapes beside Trainer's: `(step, steps, rise) -> factor of the rate`
SCHEDULES = {"slanted_triangular": slanted_triangular, "one_cycle": one_cycle}


def parameter_groups(model: nn.Module, stage: Stage, weight_decay: float) -> list[dict[str, Any]]:
    """Groups for a torch optimizer: the stage's rate, decayed block by block towards the input, and weight decay.

    Block i of n learns at `learning_rate * layer_decay ** (n - 1 - i)` (Howard and Ruder 2018, Clark et al. 2020); the
    head at its own rate; single parameters at a multiple of theirs (`stage.factors`). Every parameter that trains is in
    exactly one group.

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
        rate *= stage.factors.get(name, 1.0)
        groups[rate, weight_decay if decays else 0.0].append(parameter)
    covered = sum(map(len, groups.values()))
    if covered != len(stage.trainable):
        raise RuntimeError(f"Stage {stage.name!r} trains {len(stage.trainable)} parameters, but {covered} were found.")
    return [{"params": parameters, "lr": rate, "weight_decay": decay} for (rate, decay), parameters in groups.items()]
