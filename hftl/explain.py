"""What an answer rests on: the part of a picture, the words of a text."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from hftl import backbones

#: points of the path from nothing to the text; more change the second digit
_STEPS = 8
#: of points that go through the model at once
_TOKENS = 1_024


def grad_cam(model: nn.Module, inputs: Mapping[str, torch.Tensor], label: int) -> npt.NDArray[np.float32] | None:
    """Where a picture speaks for a class, from 0 to 1, of the features' shape (height, width) (Selvaraju et al. 2017).

    They are what enters the backbone's last block: in Transformers what leaves it has no gradient but in the
    class token.

    Args:
        model: in eval mode; it is left as it was.
        inputs: of one picture.
        label: the class id.

    Returns:
        None where the features have no places (convolutions came to one pixel), or nothing speaks for the class.
    """
    kept: list[torch.Tensor] = []

    def cut(module: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]) -> Any:
        if kept or not arguments or not isinstance(arguments[0], torch.Tensor):
            return None  # a dense layer, say, gets a list: the first module inside it is the one
        kept.append(arguments[0].detach().requires_grad_())
        return (kept[0], *arguments[1:]), named

    last = backbones.structure(model).blocks[-1]
    inside = [
        module
        for name, module in backbones.without_adapters(model).named_modules()
        if backbones.is_below_any(name, last)
    ]
    handles = [module.register_forward_pre_hook(cut, with_kwargs=True) for module in inside]
    try:
        with torch.enable_grad():
            score = model(**inputs).logits[0, label]
            gradient = torch.autograd.grad(score, kept[0])[0] if kept else None
    finally:
        for handle in handles:
            handle.remove()
    if gradient is None:
        return None
    features, gradient = _as_map(kept[0].detach()), _as_map(gradient)
    if features is None or gradient is None:
        return None
    heat = (features * gradient.mean(dim=(1, 2), keepdim=True)).sum(dim=0).clamp(min=0)
    largest = float(heat.max())
    return (heat / largest).float().cpu().numpy() if largest > 0 and heat.numel() > 1 else None


def _as_map(values: torch.Tensor) -> torch.Tensor | None:
    """Features of one picture as (channels, height, width): from that, from channels last, or from tokens."""
    if values.ndim == 4:
        one = values[0]
        return one.permute(2, 0, 1) if one.shape[0] == one.shape[1] != one.shape[2] else one
    if values.ndim != 3:
        return None
    count = values.shape[1]
    for prefix in range(6):  # class, distillation and register tokens come first
        side = round((count - prefix) ** 0.5)
        if side and side * side == count - prefix:
            return values[0, prefix:].T.reshape(-1, side, side)
    return None


def token_attributions(model: Any, inputs: Mapping[str, torch.Tensor], label: int) -> npt.NDArray[np.float32] | None:
    """What each token adds to the score of a class, shape (tokens,): integrated gradients (Sundararajan et al. 2017).

    Along the straight path from the mean of all embeddings: from zero it would change nothing where the embeddings go
    into a LayerNorm at once (DeBERTa, ModernBERT). The sum is about the difference of the scores at both ends.

    Args:
        model: in eval mode; it is left as it was.
        inputs: of one text, unpadded.
        label: the class id.

    Returns:
        None where the model does not embed tokens one by one (CANINE), or in a layer that it does not name.
    """
    try:
        layer = model.get_input_embeddings()
    except (NotImplementedError, AttributeError):  # as transformers says that there is none
        return None
    mean = layer.weight.detach().mean(dim=0)
    with mixed_embeddings(layer, mean, 1.0) as kept, torch.no_grad():
        model(**inputs)
    if not kept or kept[0].shape[:2] != inputs["input_ids"].shape:
        return None
    whole = (kept[0].detach() - mean)[0]
    gradients = torch.zeros_like(whole)
    # Eight long texts at once may not fit, and decoders find the ends of several by what they are padded with.
    together = 1 if getattr(model.config, "pad_token_id", None) is None else max(1, _TOKENS // len(whole))
    for shares in ((torch.arange(_STEPS) + 0.5) / _STEPS).split(together):
        points = {name: value.expand(len(shares), *value.shape[1:]) for name, value in inputs.items()}
        with mixed_embeddings(layer, mean, shares.to(mean).view(-1, 1, 1)) as kept, torch.enable_grad():
            score = model(**points).logits[:, label].sum()
            gradients += torch.autograd.grad(score, kept[0])[0].sum(dim=0) / _STEPS
    return (gradients * whole).sum(dim=-1).float().cpu().numpy()


@contextmanager
def mixed_embeddings(layer: Any, mean: torch.Tensor, share: float | torch.Tensor) -> Iterator[list[torch.Tensor]]:
    """Give tokens this share of their embedding, and of the mean of all embeddings the rest; kept for the gradient."""
    kept: list[torch.Tensor] = []

    def mix(module: Any, arguments: Any, output: torch.Tensor) -> torch.Tensor:
        kept.append((mean + share * (output.detach() - mean)).requires_grad_())
        return kept[-1]

    handle = layer.register_forward_hook(mix)
    try:
        yield kept
    finally:
        handle.remove()
