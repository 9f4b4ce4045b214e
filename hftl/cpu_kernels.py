"""What torch computes slowly in a training step on CPUs, computed otherwise: equal up to rounding and random draws."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional, grad

#: most keys for which attention in bf16 is computed by plain products of matrices, which keep a number for each query
#: and key (measured: training by them is 4 times as fast as torch's kernel with 35 tokens in 12 heads, 1.3 times with
#: 197, 0.6 times with 512)
_MOST_KEYS = 256
#: of the depthwise convolutions that oneDNN has a weight gradient of their own for
_KERNEL_SIZE = 3

_conv2d, _dropout, _attention = functional.conv2d, functional.dropout, functional.scaled_dot_product_attention
_LOWEST, _LEVELS = torch.iinfo(torch.int64).min, 2**16


@contextlib.contextmanager
def cpu_kernels() -> Iterator[None]:
    """Have `torch.nn.functional` take what is faster here for tensors on a CPU; others go the way they went.

    It is for one thread that trains, and what imports these functions by name meanwhile keeps them. Gradients of
    gradients are torch's alone for convolutions.

    - Depthwise convolutions in bf16, as of EfficientNet, MobileNet and ConvNeXt: oneDNN (3.12, of torch 2.14) computes
      the weight gradient of kernels wider than 3, and the input gradient where the stride is not 1, by a grouped
      convolution that pads each group of one channel to 16. Of a training step of EfficientNet-Lite0 in bf16 with 96
      pixels this takes 85 %.
    - Dropout, also that of attention in any precision: torch draws one number after the other, which takes 9 % of a
      training step of MiniLM.
    - Attention in bf16, whose kernel trains few tokens slowly.
    """
    before = {name: getattr(functional, name) for name in _OWN}
    try:
        for name, own in _OWN.items():
            setattr(functional, name, own)
        yield
    finally:
        for name, given in before.items():
            setattr(functional, name, given)


def _conv2d_on_cpu(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> Tensor:
    strides = _pair(stride)
    is_slow = (
        input.device.type == "cpu"
        and input.dim() == 4
        and 1 < groups == weight.shape[0] == input.shape[1]
        and (max(weight.shape[2:]) > _KERNEL_SIZE or max(strides) > 1)
        and _pair(dilation) == (1, 1)
        and not isinstance(padding, str)
        and _dtype(input) == _dtype(weight) == torch.bfloat16
    )
    if not is_slow:
        return _conv2d(input, weight, bias, stride, padding, dilation, groups)
    cast = [None if value is None else value.to(torch.bfloat16) for value in (input, weight, bias)]
    return _Depthwise.apply(*cast, strides, _pair(padding))


class _Depthwise(torch.autograd.Function):
    """A convolution of each channel by itself."""

    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        stride: tuple[int, int],
        padding: tuple[int, int],
    ) -> Tensor:
        ctx.save_for_backward(input, weight)
        ctx.stride, ctx.padding = stride, padding
        return _conv2d(input, weight, bias, stride, padding, 1, len(weight))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        values = (grad_output, *ctx.saved_tensors, ctx.stride, ctx.padding)
        of_input, of_weight, of_bias = ctx.needs_input_grad[:3]
        return (
            _input_gradient(*values) if of_input else None,
            _weight_gradient(*values) if of_weight else None,
            grad_output.sum((0, 2, 3), dtype=torch.float32).to(grad_output.dtype) if of_bias else None,
            None,
            None,
        )


def _input_gradient(
    grad_output: Tensor, input: Tensor, weight: Tensor, stride: tuple[int, int], padding: tuple[int, int]
) -> Tensor:
    """With a stride in float32, for which oneDNN has a kernel."""
    dtype = torch.float32 if max(stride) > 1 else grad_output.dtype
    values = weight.to(dtype), grad_output.to(dtype)
    return grad.conv2d_input(input.shape, *values, stride, padding, groups=len(weight)).to(input.dtype)


def _weight_gradient(
    grad_output: Tensor, input: Tensor, weight: Tensor, stride: tuple[int, int], padding: tuple[int, int]
) -> Tensor:
    """Of a wide kernel in pieces of 3 by 3, each with the input moved to where the piece has its first number."""
    channels, _, height, width = weight.shape
    if max(height, width) <= _KERNEL_SIZE:
        return grad.conv2d_weight(input, weight.shape, grad_output, stride, padding, groups=channels)
    first_rows, first_columns = (range(0, length, _KERNEL_SIZE) for length in (height, width))
    # what a piece passes over; behind the input there is as much padding as the last piece needs
    rows, columns = (
        (length - 1) * step + _KERNEL_SIZE for length, step in zip(grad_output.shape[2:], stride, strict=True)
    )
    below = max(0, first_rows[-1] + rows - input.shape[2] - padding[0])
    right = max(0, first_columns[-1] + columns - input.shape[3] - padding[1])
    padded = functional.pad(input, (padding[1], right, padding[0], below))

    def piece(row: int, column: int) -> Tensor:
        window = padded[:, :, row : row + rows, column : column + columns]
        shape = (channels, 1, _KERNEL_SIZE, _KERNEL_SIZE)
        return grad.conv2d_weight(window, shape, grad_output, stride, groups=channels)

    pieces = [torch.cat([piece(row, column) for column in first_columns], 3) for row in first_rows]
    return torch.cat(pieces, 2)[:, :, :height, :width]


def _dropout_on_cpu(input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
    dropped = round(p * _LEVELS)
    if not training or inplace or input.device.type != "cpu" or not 0 < dropped < _LEVELS:
        return _dropout(input, p, training, inplace)
    return _Dropout.apply(input, dropped)


class _Dropout(torch.autograd.Function):
    """Drops with a probability of so many 65,536ths, by 16 random bits a number, and scales what is kept."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, dropped: int) -> Tensor:
        draws = torch.empty(-(-input.numel() // 4), dtype=torch.int64).random_(_LOWEST, None)  # all of their 64 bits
        is_kept = draws.view(torch.int16)[: input.numel()].view(input.shape) >= dropped - _LEVELS // 2
        scale = is_kept.to(input.dtype).mul_(_LEVELS / (_LEVELS - dropped))
        ctx.save_for_backward(scale)
        return input * scale

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, None]:
        (scale,) = ctx.saved_tensors
        return grad_output * scale, None


def _attention_on_cpu(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    trains = torch.is_grad_enabled() and any(part.requires_grad for part in (query, key, value))
    is_slow = query.device.type == "cpu" and (
        dropout_p > 0 or (trains and _dtype(query) == torch.bfloat16 and key.shape[-2] <= _MOST_KEYS)
    )
    if not is_slow or enable_gqa or (is_causal and attn_mask is not None):
        return _attention(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)
    if is_causal:
        attn_mask = torch.ones(query.shape[-2], key.shape[-2], dtype=torch.bool).tril()
    with torch.autocast("cpu", enabled=False):  # a large score rounded to bf16 would be off by half and more
        precise = torch.promote_types(query.dtype, torch.float32)
        query = query.to(precise) * (query.shape[-1] ** -0.5 if scale is None else scale)
        scores = query @ key.to(precise).transpose(-2, -1)
        weights = _masked_softmax(scores, attn_mask).to(_dtype(value))
    return _dropout_on_cpu(weights, dropout_p) @ value


def _masked_softmax(scores: Tensor, attn_mask: Tensor | None) -> Tensor:
    """Over the last dimension; zeros where all is masked, as torch's."""
    if attn_mask is None:
        return scores.softmax(-1)
    if attn_mask.dtype == torch.bool:
        attn_mask = torch.zeros(attn_mask.shape).masked_fill(~attn_mask, -torch.inf)
    has_keys = (attn_mask > -torch.inf).any(-1, keepdim=True)
    # finite: the softmax of nothing but -inf is no number, and neither is its gradient
    weights = (scores + attn_mask.to(scores.dtype).clamp_min(torch.finfo(scores.dtype).min)).softmax(-1)
    return weights if has_keys.all() else weights * has_keys


def _dtype(value: Tensor) -> torch.dtype:
    """What an operation with products computes in; autocast leaves float64 as it is."""
    if value.dtype == torch.float64 or not torch.is_autocast_enabled("cpu"):
        return value.dtype
    return torch.get_autocast_dtype("cpu")


def _pair(value: Any) -> tuple[int, ...]:
    values = (value,) if isinstance(value, int) else tuple(value)
    return values * 2 if len(values) == 1 else values


_OWN = {
    "conv2d": _conv2d_on_cpu,
    "dropout": _dropout_on_cpu,
    "scaled_dot_product_attention": _attention_on_cpu,
}
