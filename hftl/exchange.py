"""Gradients averaged over the processes of one machine through memory that they share."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from hftl import compute
from hftl.word_rows import WordRows, word_rows

#: what a weight has behind a step; of several processes the most counts
_NO_GRADIENT, _SPARSE, _DENSE = range(3)


class GradientExchange:
    """Averages the gradients of the processes of one machine, in place of `DistributedDataParallel`.

    That copies the gradients on CPUs into buckets, and gloo sends these through sockets. Here each process writes its
    own into memory that all of them see, adds up its share of everybody's, and takes the averages: for two processes
    the very numbers of DistributedDataParallel, for more up to the order of sums. It is a reduce-scatter and an
    all-gather (Thakur, Rabenseifner and Gropp 2005) without messages. The gradient of the word embedding goes by gloo
    as the rows of those words that the batches had.
    """

    def __init__(self, weights: Sequence[nn.Parameter], words: WordRows | None, memory: torch.Tensor) -> None:
        """Lay out the memory.

        Args:
            weights: float32, on the CPU; they train.
            words: whose gradient may be sparse.
            memory: float32 numbers that all processes see, (processes, at least those of the weights, rounded up to a
                multiple of the processes).
        """
        self.weights, self.words = weights, words
        self.count, rank = dist.get_world_size(), dist.get_rank()
        length = memory.shape[1] // self.count
        self.shares = memory[:, rank * length : (rank + 1) * length]
        self.own, self.averages = (_places(row, weights) for row in (memory[rank], memory[0]))

    @torch.no_grad()
    def average(self) -> None:
        """Replace the gradients of every process by their average; a weight that has none in all of them keeps none."""
        for weight, place in zip(self.weights, self.own, strict=True):
            if weight.grad is None:
                place.zero_()
            else:
                torch.mul(weight.grad, 1 / self.count, out=place)
        words = None if self.words is None else self.words.weight
        found = torch.tensor([_kind(weight) for weight in (*self.weights, words)])
        dist.all_reduce(found, dist.ReduceOp.MAX)  # which waits until all have written
        for share in self.shares[1:]:
            self.shares[0].add_(share)
        dist.barrier()
        *kinds, kind_of_words = found.tolist()
        for weight, place, kind in zip(self.weights, self.averages, kinds, strict=True):
            if kind != _NO_GRADIENT:
                weight.grad = torch.empty_like(weight) if weight.grad is None else weight.grad
                weight.grad.copy_(place)
        dist.barrier()  # before the next step writes
        if words is not None and kind_of_words != _NO_GRADIENT:
            gradient = _no_rows(words) if words.grad is None else words.grad
            gradient = (gradient.to_dense() if kind_of_words == _DENSE else gradient.coalesce()) / self.count
            dist.all_reduce(gradient)
            words.grad = gradient


def _kind(weight: torch.Tensor | None) -> int:
    if weight is None or weight.grad is None:
        return _NO_GRADIENT
    return _SPARSE if weight.grad.is_sparse else _DENSE


def _no_rows(words: torch.Tensor) -> torch.Tensor:
    """A sparse gradient such as an embedding's, of no word."""
    return torch.sparse_coo_tensor(torch.empty(1, 0, dtype=torch.long), words[:0], words.shape)


def _places(row: torch.Tensor, weights: Sequence[nn.Parameter]) -> list[torch.Tensor]:
    ends = torch.tensor([weight.numel() for weight in weights]).cumsum(0).tolist()
    return [row[end - weight.numel() : end].view_as(weight) for weight, end in zip(weights, ends, strict=True)]


@contextlib.contextmanager
def gradient_exchange(model: Any, words_by_rows: bool = True) -> Iterator[GradientExchange | None]:
    """What averages the gradients of a training in the processes of one machine with Linux, on its CPUs.

    Args:
        model: not yet in `DistributedDataParallel`, whose `no_sync` then holds for every step.
        words_by_rows: whether the gradient of the word embedding is one of few words.

    Yields:
        None where the processes do not speak by gloo or are on several machines, where a weight that trains is not
        float32 and on the CPU or has a sparse gradient anyway, or where the model saves buffers, such as those of
        BatchNorm, which DistributedDataParallel keeps equal.
    """
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    if not _is_for(model, weights):
        yield None
        return
    with contextlib.ExitStack() as stack:
        words = stack.enter_context(word_rows(model)) if words_by_rows else None
        dense = weights if words is None else words.others
        memory = _shared_memory(sum(weight.numel() for weight in dense))
        if memory is None:
            stack.close()  # DistributedDataParallel has a dense gradient of the words
        yield None if memory is None else GradientExchange(dense, words, memory)


def _is_for(model: nn.Module, weights: Sequence[nn.Parameter]) -> bool:
    if sys.platform != "linux" or not compute.several_processes() or dist.get_backend() != "gloo":
        return False
    saved = model.state_dict().keys()
    return (
        dist.get_world_size() > 1
        and os.environ.get("LOCAL_WORLD_SIZE") == str(dist.get_world_size())  # all on this machine
        and all(weight.dtype == torch.float32 and weight.device.type == "cpu" for weight in weights)
        and not any(name in saved for name, _ in model.named_buffers())
        and not any(getattr(part, "sparse", False) is True for part in model.modules())
    )


def _shared_memory(length: int) -> torch.Tensor | None:
    """So many float32 numbers for every process, rounded up, (processes, numbers); it ends with the last of them.

    None where the system does not let every process open, with so many numbers, what one of them made.
    """
    count = dist.get_world_size()
    length = -(-length // count) * count
    with contextlib.ExitStack() as stack:
        file = _memory_file() if dist.get_rank() == 0 else None
        if file is not None:
            stack.callback(os.close, file)
        path = compute.of_all_processes(f"/proc/{os.getpid()}/fd/{file}")[0]
        seen = compute.of_all_processes(_identity(path))
        memory = _opened(path, count * length) if seen[0] and len(set(seen)) == 1 else None
        by_all = all(compute.of_all_processes(memory is not None))  # which waits until all have opened it
    return memory.view(count, length) if memory is not None and by_all else None


def _memory_file() -> int | None:
    try:
        return os.memfd_create("hftl-gradients")
    except OSError:  # forbidden here
        return None


def _opened(path: str, length: int) -> torch.Tensor | None:
    try:
        return torch.from_file(path, shared=True, size=length)
    except RuntimeError:  # a limit of this process: of its memory, its files, or their size
        return None


def _identity(path: str) -> tuple[int, int] | None:
    """What tells this file from all others of the machine, if it may be written."""
    if not os.access(path, os.R_OK | os.W_OK):
        return None
    status = os.stat(path)
    return status.st_dev, status.st_ino
