"""What torch computes slowly in a training step on CPUs, computed otherwise: equal up to rounding and random draws."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

#: keys to which a row of bf16 attention trains faster by plain products than by torch's kernel (by measurement: five
#: times as fast with 35 tokens in 12 heads, 1.6 times with 197, .7 times with 512)
_PLAIN_KEYS = 256
#: width of the depthwise kernels that oneDNN has a gradient of their own for
_WIDTH = 3

_conv2d, _dropout, _attention = functional.conv2d, functional.dropout, functional.scaled_dot_product_attention
_LOWEST, _STEPS = torch.iinfo(torch.int64).min, 2**16


@contextlib.contextmanager
def cpu_kernels() -> Iterator[None]:
    """Have `torch.nn.functional` take what is faster here for tensors on a CPU; others go the way they went.

    - Depthwise convolutions in bf16, as of EfficientNet, MobileNet and ConvNeXt: oneDNN (3.12, of torch 2.14) takes the
      gradient of kernels wider than 3, and that of the input where the stride is not 1, by a grouped convolution that
      pads each group of one channel to 16. It is 85 % of a training step of EfficientNet-Lite0 with 96 pixels.
    - Dropout: torch draws one number after the other, which takes 9 % of a training step of MiniLM.
    - Attention: the kernel for bf16 trains few tokens slowly, and has no dropout.
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
    strides, paddings = _pair(stride), _pair(padding)
    is_slow = (
        input.device.type == "cpu"
        and input.dim() == 4
        and 1 < groups == weight.shape[0] == input.shape[1]
        and (max(weight.shape[2:]) > _WIDTH or max(strides) > 1)
        and _pair(dilation) == (1, 1)
        and not isinstance(padding, str)
        and _dtype(input) == torch.bfloat16
        and torch.is_grad_enabled()
        and (input.requires_grad or weight.requires_grad)
    )
    if not is_slow:
        return _conv2d(input, weight, bias, stride, padding, dilation, groups)
    low = [None if value is None else value.to(torch.bfloat16) for value in (input, weight, bias)]
    return _Depthwise.apply(*low, strides, paddings)


class _Depthwise(torch.autograd.Function):
    """A convolution of each channel by itself."""

    @staticmethod
    def forward(
        context: Any,
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        stride: tuple[int, int],
        padding: tuple[int, int],
    ) -> Tensor:
        context.save_for_backward(input, weight)
        context.stride, context.padding = stride, padding
        return _conv2d(input, weight, bias, stride, padding, 1, len(weight))

    @staticmethod
    @once_differentiable
    def backward(context: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        input, weight = context.saved_tensors
        of_input, of_weight, of_bias = context.needs_input_grad[:3]
        return (
            _input_gradient(gradient, input, weight, context.stride, context.padding) if of_input else None,
            _weight_gradient(gradient, input, weight, context.stride, context.padding) if of_weight else None,
            gradient.sum((0, 2, 3), dtype=torch.float32).to(gradient.dtype) if of_bias else None,
            None,
            None,
        )


def _input_gradient(
    gradient: Tensor, input: Tensor, weight: Tensor, stride: tuple[int, int], padding: tuple[int, int]
) -> Tensor:
    """With a stride in float32, for which oneDNN has a kernel."""
    values = (gradient, input, weight)
    if max(stride) > 1:  # of the input only the shape counts
        values = (gradient.float(), torch.empty_like(input, dtype=torch.float32), weight.float())
    return _gradients(*values, stride, padding, (True, False))[0].to(input.dtype)


def _weight_gradient(
    gradient: Tensor, input: Tensor, weight: Tensor, stride: tuple[int, int], padding: tuple[int, int]
) -> Tensor:
    """In pieces of 3 by 3, each with the input moved to where the piece has its first number."""
    if max(weight.shape[2:]) <= _WIDTH:
        return _gradients(gradient, input, weight, stride, padding, (False, True))[1]
    size, pieces = weight.shape[2:], [-(-width // _WIDTH) for width in weight.shape[2:]]
    # what a piece of the kernel passes over, and with the last piece all of the input
    passed = [(length - 1) * step + _WIDTH for length, step in zip(gradient.shape[2:], stride, strict=True)]
    missing = [
        max(0, (count - 1) * _WIDTH + length - width - pad)
        for count, length, width, pad in zip(pieces, passed, input.shape[2:], padding, strict=True)
    ]
    padded = functional.pad(input, (padding[1], missing[1], padding[0], missing[0]))

    def piece(row: int, column: int) -> Tensor:
        part = padded[:, :, row : row + passed[0], column : column + passed[1]]
        shape = weight.new_empty(len(weight), 1, _WIDTH, _WIDTH)
        return _gradients(gradient, part, shape, stride, (0, 0), (False, True))[1]

    rows, columns = ([_WIDTH * number for number in range(count)] for count in pieces)
    whole = torch.cat([torch.cat([piece(row, column) for column in columns], 3) for row in rows], 2)
    return whole[:, :, : size[0], : size[1]]


def _gradients(
    gradient: Tensor,
    input: Tensor,
    weight: Tensor,
    stride: tuple[int, int],
    padding: tuple[int, int],
    wanted: tuple[bool, bool],
) -> Any:
    """Torch's, of the input and of the weight."""
    return torch.ops.aten.convolution_backward(
        gradient, input, weight, None, stride, padding, (1, 1), False, (0, 0), len(weight), (*wanted, False)
    )


def _dropout_on_cpu(input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
    dropped = round(p * _STEPS)
    if not training or inplace or input.device.type != "cpu" or not 0 < dropped < _STEPS:
        return _dropout(input, p, training, inplace)
    return _Dropout.apply(input, dropped)


class _Dropout(torch.autograd.Function):
    """Dropout by 16 random bits a number: p is that of the nearest 65536th, and so is what the others are raised by."""

    @staticmethod
    def forward(context: Any, input: Tensor, dropped: int) -> Tensor:
        draws = torch.empty(-(-input.numel() // 4), dtype=torch.int64).random_(_LOWEST, None).view(torch.int16)
        kept = draws[: input.numel()].view(input.shape) >= dropped - _STEPS // 2
        factor = kept.to(input.dtype).mul_(_STEPS / (_STEPS - dropped))
        context.save_for_backward(factor)
        return input * factor

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (factor,) = context.saved_tensors
        return gradient * factor, None


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
        dropout_p > 0 or (trains and _dtype(query) == torch.bfloat16 and key.shape[-2] <= _PLAIN_KEYS)
    )
    if not is_slow or enable_gqa:
        return _attention(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)
    scores = query @ key.transpose(-2, -1) * (query.shape[-1] ** -0.5 if scale is None else scale)
    if is_causal:
        attn_mask = torch.ones(scores.shape[-2:], dtype=torch.bool).tril()
    if attn_mask is not None:
        is_left_out = attn_mask.dtype == torch.bool
        lowest = torch.finfo(scores.dtype).min  # not -inf: a row of nothing but padding would have no numbers
        scores = scores.masked_fill(~attn_mask, lowest) if is_left_out else scores + attn_mask
    weights = scores.softmax(-1, dtype=torch.float32).to(value.dtype)
    return _dropout_on_cpu(weights, dropout_p) @ value


def _dtype(value: Tensor) -> torch.dtype:
    """What an operation with products computes in."""
    return torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else value.dtype


def _pair(value: Any) -> tuple[int, ...]:
    values = (value,) if isinstance(value, int) else tuple(value)
    return values * 2 if len(values) == 1 else values


_OWN = {
    "conv2d": _conv2d_on_cpu,
    "dropout": _dropout_on_cpu,
    "scaled_dot_product_attention": _attention_on_cpu,
}
