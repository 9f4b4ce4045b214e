"""The last blocks started anew: what pretraining specialised most."""

from __future__ import annotations

import copy
from typing import Any

import torch

from hftl import backbones
from hftl.arguments import TransferArguments
from hftl.errors import UsageError


@torch.no_grad()
def reinitialise(model: Any, arguments: TransferArguments) -> None:
    """Give the last `--reinit_blocks` blocks, and BERT's pooler, the weights of a new model (Zhang et al. 2021).

    A second model of the same configuration is drawn, seeded, by the model's own code, and its tensors are taken over:
    so they are what the architecture starts with, whichever library it comes from.

    Raises:
        UsageError: more blocks than there are.
    """
    count = arguments.reinit_blocks
    if count is None:
        return
    parts = backbones.structure(model)
    if not 1 <= count <= len(parts.blocks):
        raise UsageError(f"--reinit_blocks must lie between 1 and the model's {len(parts.blocks)} blocks, not {count}.")
    pooling = backbones.pooling_layer(model)  # hftl's own; the pooler behind it is the identity
    anew = [prefix for block in parts.blocks[-count:] for prefix in block] + list(() if pooling else parts.pooler)
    with torch.random.fork_rng():
        torch.manual_seed(arguments.seed)
        new = type(model)(copy.deepcopy(model.config)).state_dict()
    for name, tensor in model.state_dict().items():
        if backbones.is_below_any(name, anew) and not backbones.is_below_any(name, pooling):
            tensor.copy_(new[name])
