"""The gradient of a word embedding, as the rows of those words that the batches had."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import torch
from torch import nn

Norm = TypeVar("Norm")


class WordRows:
    """Gives an optimizer the dense gradient of word embeddings without making all of it in every step.

    A batch has a few hundred of the 30,000 words of BERT, or of the 250,000 of a multilingual model. Torch fills the
    rows of all others with zeros anew in each backward pass, and reads them for the norm: 12 % of a step of MiniLM. The
    gradient takes its memory as long as the training lasts.
    """

    def __init__(self, weight: nn.Parameter, others: Sequence[nn.Parameter]) -> None:
        """Begin without a gradient.

        Args:
            weight: of the embedding, (words, size); its gradient may be sparse.
            others: weights that train too.
        """
        self.weight, self.others = weight, others
        self.dense: torch.Tensor | None = None
        self.version, self.rows = 0, torch.empty(0, dtype=torch.long)

    def merge(self) -> None:
        """Add up the rows of words that the parts of a step have in common."""
        if self.weight.grad is not None and self.weight.grad.is_sparse:
            self.weight.grad = self.weight.grad.coalesce()

    def clip(self, clip: Callable[[list[nn.Parameter]], Norm], keep: bool = True) -> Norm:
        """Clip the gradients, then give the words the dense one that an optimizer asks for, valid until the next call.

        Args:
            clip: scales the gradients of weights in place and returns their norm. Of the words it gets the rows that
                are there: the zeros of the others would be read twice and written.
            keep: whether the dense gradient of the last call can be used again: nothing wrote into it behind torch's
                back, by its `data`.
        """
        self.merge()
        gradient = self.weight.grad
        if gradient is None or not gradient.is_sparse:
            return clip([*self.others, self.weight])
        values = nn.Parameter(gradient.values())
        values.grad = values.detach()
        norm = clip([*self.others, values])
        if keep and self.dense is not None and self.dense._version == self.version:
            self.dense.index_fill_(0, self.rows, 0)
        else:
            self.dense = torch.zeros_like(self.weight)
        self.rows = gradient.indices()[0]
        self.weight.grad = self.dense.index_copy_(0, self.rows, values.grad)
        self.version = self.dense._version
        return norm


@contextlib.contextmanager
def word_rows(model: Any) -> Iterator[WordRows | None]:
    """The gradient of the words of a model, sparse as long as this lasts.

    Yields:
        None where there is no ordinary embedding by which words enter, whose weight trains in float32 on the CPU and is
        its own: tied ones get all rows too.
    """
    embedding = _word_embedding(model)
    if embedding is None:
        yield None
        return
    embedding.sparse = True
    try:
        words = embedding.get_parameter("weight")
        yield WordRows(words, [weight for weight in model.parameters() if weight.requires_grad and weight is not words])
    finally:
        embedding.sparse = False


def _word_embedding(model: Any) -> nn.Embedding | None:
    if not hasattr(model, "get_input_embeddings"):
        return None
    try:
        found = model.get_input_embeddings()
    except NotImplementedError:  # of a model without words
        return None
    if type(found) is not nn.Embedding or found.scale_grad_by_freq or found.sparse or not found.weight.requires_grad:
        return None
    if found.weight.dtype != torch.float32 or found.weight.device.type != "cpu":
        return None
    owners = sum(weight is found.weight for _, weight in model.named_parameters(remove_duplicate=False))
    return found if owners == 1 else None
