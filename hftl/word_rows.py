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
    rows of all others with zeros anew in each backward pass, and reads them for the norm: 12 % of a step of MiniLM.
    """

    def __init__(self, weight: nn.Parameter) -> None:
        """Begin without a gradient.

        Args:
            weight: of the embedding, (words, size); its gradient may be sparse.
        """
        self.weight = weight
        self.dense: torch.Tensor | None = None
        self.rows = torch.empty(0, dtype=torch.long)

    def clip(self, others: Sequence[nn.Parameter], clip: Callable[[list[nn.Parameter]], Norm]) -> Norm:
        """Clip the gradients, then give the words the dense one that an optimizer asks for.

        It lies in the same memory in every step, until the next one.

        Args:
            others: weights that train too.
            clip: scales the gradients of weights in place and returns their norm. Of the words it gets the rows that
                are there: the zeros of the others would be read twice and written.
        """
        gradient = self.weight.grad
        if gradient is None or not gradient.is_sparse:
            return clip([*others, self.weight])
        gradient = gradient.coalesce()
        values = nn.Parameter(gradient.values())
        values.grad = values.detach()
        norm = clip([*others, values])
        if self.dense is None:
            self.dense = torch.zeros_like(self.weight)
        self.dense.index_fill_(0, self.rows, 0)
        self.rows = gradient.indices()[0]
        self.weight.grad = self.dense.index_copy_(0, self.rows, values.grad)
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
        yield WordRows(embedding.get_parameter("weight"))
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
