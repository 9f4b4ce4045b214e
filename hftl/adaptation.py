"""Statistics of BatchNorm layers, taken anew from unlabelled images."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import nn

from hftl import backbones, batches
from hftl.folder import say


@torch.no_grad()
def adapt_batch_norm(task: Any, model: nn.Module, splits: Any) -> None:
    """Replace the running statistics of every BatchNorm layer by those of the training images (Li et al. 2016, AdaBN).

    One pass over the plain images in a seeded order and in batches of equal size, each counting alike. All processes
    make the same pass, so that all have the same statistics.
    """
    arguments = task.arguments
    rows = task.dataset(splits.train, training=False)
    order = np.random.default_rng(arguments.seed).permutation(len(splits.train))
    groups = np.array_split(order, math.ceil(len(order) / arguments.per_device_eval_batch_size))
    say(f"batch norm: statistics from {len(order):,} training images")
    layers = backbones.batch_norms(model)
    momenta = [layer.momentum for layer in layers]
    model.to(arguments.device).eval()
    for layer in layers:
        layer.reset_running_stats()
        layer.momentum = None  # a cumulative average
        layer.train()
    threads = batches.decoding_threads(splits.train)
    for _, examples in batches.prepared(rows, [group.tolist() for group in groups], threads, skip_bad_files=False):
        model(**backbones.inputs_of(task.collate(examples), arguments.device))
    for layer, momentum in zip(layers, momenta, strict=True):
        layer.momentum = momentum
        layer.eval()
