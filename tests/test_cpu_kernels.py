"""What a training step on CPUs computes otherwise than torch: equal up to rounding, or to what chance draws."""

from __future__ import annotations

import contextlib
import itertools
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import small_data
import tiny_models
import torch
from tiny_training import tiny_arguments, tiny_trainer
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from hftl import compute
from hftl import cpu_kernels as kernels
from hftl.cpu_kernels import cpu_kernels
from hftl.losses import CrossEntropyLoss
from hftl.methods import build_plan
from recipes import image_classification, text_classification

BF16 = torch.bfloat16
_NAMES = ("conv2d", "dropout", "scaled_dot_product_attention")
_TORCH = {name: getattr(functional, name) for name in _NAMES}


def in_bf16() -> Any:
    return torch.autocast("cpu", BF16)


def near(found: Tensor, expected: Tensor, part: float = 0.02) -> None:
    """Within rounding, by the largest number there."""
    assert found.shape == expected.shape
    torch.testing.assert_close(
        found.float(), expected.float(), rtol=0, atol=part * float(expected.detach().abs().max())
    )


def test_torch_has_its_own_again() -> None:
    with contextlib.suppress(KeyError), cpu_kernels(), cpu_kernels():
        assert all(getattr(functional, name) is not _TORCH[name] for name in _NAMES)
        raise KeyError
    assert all(getattr(functional, name) is _TORCH[name] for name in _NAMES)


# --- depthwise convolutions ------------------------------------------------------------------------------------------


def convolved(layer: nn.Conv2d, input: Tensor) -> tuple[list[Tensor], str]:
    """The answer, the gradients of input and weights of a loss that weighs each place otherwise; what made them."""
    input = input.detach().requires_grad_()
    layer.zero_grad()
    output = layer(input)
    node = output.grad_fn.name()
    output.float().mul(torch.linspace(-1, 1, output.numel()).view_as(output)).sum().backward()
    return [output.detach(), input.grad, *(weight.grad.clone() for weight in layer.parameters())], node


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize(
    ("kernel", "stride", "padding", "size"),
    [
        (3, 2, 1, (9, 8)),
        (3, 2, 0, (12, 13)),
        (1, 2, 0, (6, 5)),
        (5, 1, 2, (3, 3)),
        (5, 2, 0, (9, 10)),
        (5, 3, (1, 2), (11, 14)),
        (7, 1, 3, (14, 10)),
        ((1, 5), 1, (0, 2), (4, 8)),
        (9, (2, 1), 4, (10, 9)),
    ],
)
def test_a_depthwise_convolution_has_the_gradients_of_float32(
    kernel: Any, stride: Any, padding: Any, size: tuple[int, int], layout: Any, bias: bool
) -> None:
    torch.manual_seed(0)
    layer = nn.Conv2d(20, 20, kernel, stride, padding, groups=20, bias=bias)
    input = torch.randn(3, 20, *size).to(memory_format=layout)
    expected, _ = convolved(layer, input)
    with in_bf16(), cpu_kernels():
        found, node = convolved(layer, input)
    assert node == "_DepthwiseBackward"
    assert found[0].dtype == BF16
    for ours, theirs in zip(found, expected, strict=True):
        near(ours, theirs)


@pytest.mark.parametrize(
    ("settings", "precision"),
    [
        ({"kernel_size": 3, "groups": 4}, in_bf16),  # fast as it is
        ({"kernel_size": 5, "groups": 2}, in_bf16),
        ({"kernel_size": 5}, in_bf16),
        ({"kernel_size": 5, "groups": 4, "dilation": 2}, in_bf16),
        ({"kernel_size": 5, "groups": 4, "padding": "same"}, in_bf16),
        ({"kernel_size": 5, "groups": 4, "out_channels": 8}, in_bf16),
        ({"kernel_size": 5, "groups": 4}, contextlib.nullcontext),
    ],
)
def test_other_convolutions_are_torchs(settings: dict[str, Any], precision: Any) -> None:
    layer = nn.Conv2d(4, **{"out_channels": 4, **settings})
    input = torch.randn(2, 4, 12, 12)
    with precision():
        expected, name = convolved(layer, input)
        with cpu_kernels():
            found, same = convolved(layer, input)
    assert name == same == "ConvolutionBackward0"
    assert all(ours.equal(theirs) for ours, theirs in zip(found, expected, strict=True))


@pytest.mark.parametrize("trained", ["weight", "input"])
def test_what_does_not_train_has_no_gradient(trained: str) -> None:
    torch.manual_seed(0)
    layer, input = nn.Conv2d(20, 20, 5, 2, groups=20, bias=False), torch.randn(2, 20, 9, 9)
    parts = {"weight": layer.weight, "input": input}
    for name, part in parts.items():
        part.requires_grad_(name == trained)
    layer(input).sum().backward()
    expected, parts[trained].grad = parts[trained].grad, None
    with in_bf16(), cpu_kernels():
        output = layer(input)
    assert output.grad_fn.name() == "_DepthwiseBackward"
    output.float().sum().backward()
    assert [name for name, part in parts.items() if part.grad is not None] == [trained]
    near(parts[trained].grad, expected)


def test_a_model_in_bf16_and_one_in_float64() -> None:
    """Without autocast, and with one that leaves float64 alone."""
    torch.manual_seed(0)
    layer, input = nn.Conv2d(20, 20, 5, groups=20), torch.randn(2, 20, 9, 9)
    expected, _ = convolved(layer, input)
    with cpu_kernels():
        found, node = convolved(layer.to(BF16), input.to(BF16))
        assert node == "_DepthwiseBackward"
        with pytest.raises(RuntimeError, match="type"):  # as torch
            layer.float()(input.to(BF16))
        with in_bf16():
            _, node = convolved(layer.double(), input.double())
    assert node == "ConvolutionBackward0"
    for ours, theirs in zip(found, expected, strict=True):
        near(ours, theirs, part=0.04)


def test_what_is_not_on_a_cpu_is_torchs() -> None:
    def nodes(device: str) -> list[str]:
        layer = nn.Conv2d(4, 4, 5, groups=4, device=device, dtype=BF16)
        image, part = (
            torch.ones(1, 4, 9, 9, device=device, dtype=BF16),
            torch.ones(1, 1, 2, 8, device=device, dtype=BF16),
        )
        part.requires_grad_()
        made = (layer(image), functional.dropout(part, 0.5), functional.scaled_dot_product_attention(part, part, part))
        return [output.grad_fn.name() for output in made]

    expected = nodes("meta")
    with cpu_kernels():
        assert nodes("meta") == expected
        assert all(ours != torchs for ours, torchs in zip(nodes("cpu"), expected, strict=True))


# --- dropout ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, BF16])
@pytest.mark.parametrize("part", [0.1, 0.5, 0.93])
def test_dropout_leaves_out_its_part_and_keeps_the_mean(part: float, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    input = torch.ones(999, 301, dtype=dtype, requires_grad=True)
    with cpu_kernels():
        output = nn.Dropout(part)(input)
    output.backward(torch.ones_like(output))
    kept = output != 0
    error = (part * (1 - part) / kept.numel()) ** 0.5
    assert abs(float((~kept).float().mean()) - part) < 5 * error
    factor = torch.tensor(1 / (1 - part), dtype=dtype)
    torch.testing.assert_close(output[kept].detach(), factor.expand(int(kept.sum())), rtol=1e-3, atol=0)
    assert input.grad is not None
    assert input.grad.equal(output)  # the same numbers, raised by the same
    for neighbours in (kept[:, 1:] & kept[:, :-1], kept[1:] & kept[:-1], kept[4:] & kept[:-4]):
        assert abs(float(neighbours.float().mean()) - (1 - part) ** 2) < 0.01  # drawn one without the other


def test_dropout_of_what_does_not_lie_in_a_row() -> None:
    input = torch.ones(4, 6, 5).transpose(0, 2).requires_grad_()
    with cpu_kernels():
        output = functional.dropout(input, 0.5)
    output.sum().backward()
    assert output.shape == (5, 6, 4)
    assert output.equal(input.grad)
    assert set(output.flatten().tolist()) == {0.0, 2.0}


def test_dropout_is_a_function_of_the_seed() -> None:
    input, drawn = torch.ones(7, 3), []
    with cpu_kernels():
        for seed in (1, 1, 2):
            torch.manual_seed(seed)
            drawn.append(functional.dropout(input, 0.5))
    assert drawn[0].equal(drawn[1])
    assert not drawn[0].equal(drawn[2])


def test_dropout_that_leaves_nothing_or_all() -> None:
    input = torch.ones(50)
    with cpu_kernels():
        assert functional.dropout(input, 0.0).equal(input)
        assert functional.dropout(input, 1.0).equal(torch.zeros(50))
        assert functional.dropout(input, 0.5, training=False) is input
        assert functional.dropout(torch.ones(0, 3), 0.5).shape == (0, 3)
        functional.dropout(input, 0.5, inplace=True)
        assert set(input.tolist()) == {0.0, 2.0}


# --- attention -------------------------------------------------------------------------------------------------------


def attended(dtype: torch.dtype, mask: Tensor | None, size: float = 1.0, **settings: Any) -> list[Tensor]:
    """The answer and the gradients of query, key and value."""
    draws = torch.Generator().manual_seed(0)
    parts = [size * torch.randn(2, 3, length, 8, generator=draws) for length in (5, 7, 7)]
    parts = [part.to(BF16).to(dtype).requires_grad_() for part in parts]
    output = functional.scaled_dot_product_attention(*parts, attn_mask=mask, **settings)
    output.float().mul(torch.linspace(-1, 1, output.numel()).view_as(output)).sum().backward()
    return [output.detach(), *(part.grad for part in parts if part.grad is not None)]


PADDED = torch.tensor([[True] * 7, [True] * 4 + [False] * 3])[:, None, None, :]
MASKS = [
    None,
    PADDED,
    PADDED.expand(2, 1, 5, 7),
    torch.zeros(2, 1, 1, 7).masked_fill(~PADDED, torch.finfo(torch.float32).min),
]


@pytest.mark.parametrize(
    ("mask", "settings"), [*itertools.product(MASKS, [{}, {"scale": 0.2}]), (None, {"is_causal": True})]
)
def test_attention_is_that_of_torch(
    mask: Tensor | None, settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = attended(torch.float32, mask, **settings)
    monkeypatch.setattr(kernels, "_attention", None)  # not asked
    with cpu_kernels(), in_bf16():
        found = attended(torch.float32, mask, **settings)
    for ours, theirs in zip(found, expected, strict=True):
        near(ours, theirs)


def test_attention_of_large_scores_is_that_of_float32() -> None:
    """Of 100 and more, which bf16 has to a half."""
    expected = attended(torch.float32, PADDED, size=6.0)
    with cpu_kernels(), in_bf16():
        found = attended(torch.float32, PADDED, size=6.0)
    for ours, theirs in zip(found, expected, strict=True):
        near(ours, theirs, part=0.01)


def test_attention_with_dropout_has_the_mean_of_that_without(monkeypatch: pytest.MonkeyPatch) -> None:
    expected, *_ = attended(torch.float32, PADDED)
    monkeypatch.setattr(kernels, "_attention", None)
    torch.manual_seed(0)
    with cpu_kernels():
        drawn = torch.stack([attended(torch.float32, PADDED, dropout_p=0.2)[0] for _ in range(400)])
    assert drawn.std(dim=0).min() > 0
    error = drawn.std(dim=0) / 400**0.5
    assert ((drawn.mean(dim=0) - expected).abs() < 5 * error).all()


@pytest.mark.parametrize("kind", ["bool", "float"])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_a_row_of_nothing_but_padding_is_zeros(kind: str, dropout: float) -> None:
    """As torch's, and as `nn.MultiheadAttention` needs it, whose mask is one of numbers."""
    mask: Tensor = PADDED.clone()
    mask[0] = False
    if kind == "float":
        mask = torch.zeros(mask.shape).masked_fill(~mask, -torch.inf)
    expected = attended(torch.float32, mask)
    with cpu_kernels(), in_bf16() if dropout == 0 else contextlib.nullcontext():
        found = attended(torch.float32, mask, dropout_p=dropout)
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.isfinite().all()
        assert not ours[0].any()
        if dropout == 0:
            near(ours, theirs)


def test_attention_with_dropout_has_the_gradients_of_its_draws() -> None:
    parts = [torch.randn(1, 2, length, 4, dtype=torch.float64, requires_grad=True) for length in (3, 5, 5)]

    def drawn(*given: Tensor) -> Tensor:
        torch.manual_seed(0)
        with cpu_kernels():
            return functional.scaled_dot_product_attention(*given, dropout_p=0.4)

    assert torch.autograd.gradcheck(drawn, parts)


def test_a_mask_beside_causality_is_refused_as_by_torch() -> None:
    with cpu_kernels(), pytest.raises(RuntimeError, match="is_causal"):
        attended(torch.float32, PADDED, is_causal=True, dropout_p=0.1)


@pytest.mark.parametrize("reentrant", [False, True])
def test_what_is_computed_again_draws_again_what_it_drew(reentrant: bool) -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.3, batch_first=True)
    input = torch.randn(2, 5, 8)
    found = []
    for again in (False, True):
        torch.manual_seed(0)
        layer.zero_grad()
        given = input.clone().requires_grad_()
        with cpu_kernels(), in_bf16():
            output = checkpoint(layer, given, use_reentrant=reentrant) if again else layer(given)
            output.float().square().sum().backward()
        found.append([output, given.grad, *(weight.grad for weight in layer.parameters())])
    for ours, theirs in zip(*found, strict=True):
        near(ours, theirs, part=1e-5)


def test_attention_that_torch_does_well_is_torchs(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []

    def torchs(*parts: Any, **settings: Any) -> Tensor:
        asked.append(len(asked))
        return _TORCH["scaled_dot_product_attention"](*parts, **settings)

    monkeypatch.setattr(kernels, "_attention", torchs)
    with cpu_kernels():
        attended(torch.float32, PADDED)
        grouped = [torch.randn(1, heads, 4, 8, requires_grad=True) for heads in (4, 2, 2)]
        functional.scaled_dot_product_attention(*grouped, dropout_p=0.1, enable_gqa=True)
        with in_bf16(), torch.no_grad():
            functional.scaled_dot_product_attention(*(torch.randn(1, 1, 4, 8) for _ in range(3)))
        with in_bf16():
            functional.scaled_dot_product_attention(*(torch.randn(1, 1, 300, 8, requires_grad=True) for _ in range(3)))
    assert len(asked) == 4


# --- in a training ---------------------------------------------------------------------------------------------------


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often each of them was asked."""
    found: Counter[str] = Counter()

    def counting(name: str, own: Any) -> Any:
        def call(*values: Any, **settings: Any) -> Any:
            found[name] += 1
            return own(*values, **settings)

        return call

    for name, own in kernels._OWN.items():
        monkeypatch.setitem(kernels._OWN, name, counting(name, own))
    monkeypatch.setattr(kernels, "_weight_gradient", counting("weight gradient", kernels._weight_gradient))
    return found


def test_an_image_training_in_bf16_takes_its_gradients_here(tmp_path: Path, counted: Counter[str]) -> None:
    small_data.write_images(tmp_path / "images", {"train": 8, "val": 3, "test": 3})
    model = tiny_models.write_timm_folder(tmp_path / "model", "mobilenetv3_small_050")
    flags = [
        f"--model={model}",
        f"--dataset={tmp_path / 'images'}",
        "--image_size=64",
        "--method=full",
        "--max_steps=2",
    ]
    flags += ["--per_device_train_batch_size=4", "--report_to=none"]
    image_classification.main([*flags, "--precision=fp32", f"--output_dir={tmp_path / 'fp32'}"])
    assert counted["weight gradient"] == 0
    image_classification.main([*flags, "--precision=bf16", f"--output_dir={tmp_path / 'bf16'}"])
    assert counted["weight gradient"] > 0
    assert all(getattr(functional, name) is _TORCH[name] for name in _NAMES)


def test_a_text_training_draws_here(tmp_path: Path, counted: Counter[str]) -> None:
    small_data.write_texts(tmp_path / "texts", {"train": 24, "validation": 6, "test": 6})
    model = tiny_models.write_tiny_text_model(tmp_path / "model")
    flags = [f"--model={model}", f"--dataset={tmp_path / 'texts'}", "--method=full", "--max_steps=2"]
    text_classification.main([*flags, "--report_to=none", f"--output_dir={tmp_path / 'run'}"])
    assert counted["dropout"] > 0
    assert counted["scaled_dot_product_attention"] > 0
    assert all(getattr(functional, name) is _TORCH[name] for name in _NAMES)


@pytest.mark.parametrize("training", [True, False])
def test_what_a_row_takes_is_measured_with_them(training: bool, counted: Counter[str]) -> None:
    model = tiny_models.TINY["bert"]()
    batch = {**tiny_models.tiny_inputs(model), "labels": torch.tensor([0, 1])}
    compute.seconds_a_row(model.train(training), batch, CrossEntropyLoss(), training, "bf16")
    assert (counted["dropout"] > 0) == training


@pytest.mark.parametrize(
    "flags", [[], ["--torch_compile", "--torch_compile_backend=aot_eager"]], ids=["plain", "compiled"]
)
def test_compiled_code_is_made_of_torchs(flags: list[str], tmp_path: Path, counted: Counter[str]) -> None:
    model = tiny_models.TINY["bert"]()
    (stage,) = build_plan(model, tiny_arguments(model, *flags)).stages
    tiny_trainer(model, stage, tmp_path, "--max_steps=1", *flags).train()
    assert (counted["dropout"] > 0) == (not flags)
