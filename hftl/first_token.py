"""The last layer of a text encoder in training steps: for the first token alone, where no other is read.

Heads of the BERT family read the first token of it (mean pooling, see `hftl.pooling`, moves the mean there).
What that layer computes behind its attention for the others, three quarters of it, nobody reads: without it a forward
and backward pass of MiniLM, whose mean is a seventh layer, takes 11 % less (512 tokens, bf16, one core).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from hftl import backbones

#: architectures whose layers have a part behind the attention that adds to its input and normalises, as BERT's
_LIKE_BERT = ("bert", "camembert", "electra", "ernie", "roberta", "xlm-roberta")
#: rows by which it is found what a head reads
_FEW = 2


def unread_part(model: nn.Module, batch: dict[str, Tensor]) -> nn.Module | None:
    """Where the other tokens can be left out: behind the attention of the last layer; None where they are read.

    Found by the gradient that the logits of two rows have there, which is exactly zero where nothing is read. The
    random state does not change; the model is in eval mode at the end.

    Args:
        model: with logits.
        batch: what `forward` takes, on the device of the model; `labels` are left out.
    """
    config: Any = getattr(model, "config", None)
    if getattr(config, "model_type", "") not in _LIKE_BERT or config.is_decoder or config.output_hidden_states:
        return None
    inner: Any = backbones.without_adapters(model)
    layer = inner.base_model.encoder.layer[-1]
    given: list[Tensor] = []
    handle = layer.register_forward_hook(lambda module, arguments, output: given.append(output))
    try:
        with torch.enable_grad():
            inputs = {name: value[:_FEW] for name, value in backbones.inputs_of(batch).items()}
            logits = model.eval()(**inputs).logits.float()
    finally:
        handle.remove()
    if not given[0].requires_grad or given[0].shape[1] == 1:
        return None
    # unlike weights: the gradient of a plain sum is zero behind a softmax
    weights = torch.linspace(1, 2, logits.numel(), device=logits.device).view_as(logits)
    (gradient,) = torch.autograd.grad((weights * logits).sum(), given[0])
    is_read = gradient.abs().amax(dim=(0, 2)) > 0  # of each token
    return layer.attention.output if is_read[0] and not is_read[1:].any() else None


@contextlib.contextmanager
def first_token_alone(part: nn.Module | None) -> Iterator[None]:
    """Compute a part of `unread_part`, and what stands behind it in its layer, for the first token alone."""
    with contextlib.ExitStack() as stack:
        if part is not None:
            stack.callback(part.register_forward_pre_hook(_first).remove)
        yield


def _first(module: nn.Module, tokens: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
    return tuple(values[:, :1] for values in tokens)
