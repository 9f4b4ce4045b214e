"""Penalties: what each computes, that parts and processes add up to one batch, and that they change training alone."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from small_data import write_texts
from test_methods import RATES, fresh, plan_of
from tiny_models import tiny_inputs, write_tiny_text_model
from tiny_training import TinyData, every_tensor, tiny_trainer
from torch import nn
from transformers import PreTrainedModel

from hftl import backbones, cli, penalties
from hftl.errors import UsageError
from hftl.methods import Stage


def calm(name: str) -> PreTrainedModel:
    """A tiny model without dropout, so that two passes give the same."""
    model = fresh(name)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model


def moved(model: PreTrainedModel) -> PreTrainedModel:
    """The model some way from where it started."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return model


def stage_of(penalty: str, model: PreTrainedModel, *flags: str) -> Stage:
    (stage,) = plan_of("full", model, f"--penalty={penalty}", *flags).stages
    return stage


def value(stage: Stage, model: PreTrainedModel, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    assert stage.penalty is not None
    with penalties.watching(model, penalties.watched(model)) as seen:
        outputs = model(**batch)
    return stage.penalty(stage, model, batch, {**outputs, **seen})


@pytest.mark.parametrize("name", ["bert", "timm_resnet18", "bert_mean"])
def test_l2_sp_is_half_the_squared_distance_of_the_backbone(name: str) -> None:
    model = calm(name)
    stage = stage_of("l2_sp", model)
    start = copy.deepcopy(dict(model.named_parameters()))
    assert value(stage, model, tiny_inputs(model)) == 0
    moved(model)
    head = backbones.structure(model).head
    expected = 0.0
    for key, parameter in model.named_parameters():
        if not backbones.is_below_any(key, head):
            expected += float((parameter.double() - start[key].double()).square().sum()) / 2
    assert expected > 0
    assert float(value(stage, model, tiny_inputs(model))) == pytest.approx(expected, rel=1e-4)


def test_l2_sp_takes_the_place_of_decay_in_the_backbone(tmp_path: Path) -> None:
    model = calm("bert")
    trainer = tiny_trainer(model, stage_of("l2_sp", model), tmp_path, "--weight_decay=0.1")
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    decayed = {
        names[id(parameter)]
        for group in trainer.create_optimizer().param_groups
        for parameter in group["params"]
        if group["weight_decay"]
    }
    assert decayed == {"classifier.weight", "bert.pooler.dense.weight"}


@pytest.mark.parametrize("name", ["bert", "timm_resnet18", "vit", "timm_swin_tiny", "gpt2"])
def test_delta_compares_what_four_blocks_give(name: str) -> None:
    model = calm(name).eval()
    stage = stage_of("delta", model)
    batch = tiny_inputs(model, batch=3)
    assert value(stage, model, batch) == 0
    start = {}
    for part in ("start", "moved"):
        with penalties.watching(model, penalties.watched(model)) as seen, torch.no_grad():
            model(**batch)
        start[part] = seen["blocks"]
        if part == "start":
            moved(model)
    assert 2 <= len(start["start"]) <= 4
    expected = 0.0
    for key, values in start["start"].items():
        for row in range(3):  # a direct transcription: rows, positions, channels
            before, after = values[row].double(), start["moved"][key][row].double()
            if before.ndim == 3 and name != "timm_swin_tiny":
                before, after = before.flatten(1).T, after.flatten(1).T
            before, after = before.reshape(-1, before.shape[-1]), after.reshape(-1, after.shape[-1])
            real = [True] * len(before)
            if "attention_mask" in batch:
                real = batch["attention_mask"][row].bool().tolist()
            distances = [float((b - a).square().sum()) for b, a, r in zip(before, after, real, strict=True) if r]
            expected += sum(distances) / len(distances) / 3 / 2
    assert expected > 0
    assert float(value(stage, model, batch)) == pytest.approx(expected, rel=1e-3)


def test_weighed_distances_are_not_computed_in_half_precision() -> None:
    torch.manual_seed(0)
    values, start, weights = torch.randn(6, 4, 8), torch.randn(6, 4, 8), torch.rand(8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = penalties._distance(values, start, None, weights)
    assert found.dtype == torch.float32
    assert float(found) == pytest.approx(float(((values - start).square() * weights).sum(dim=2).mean()), rel=1e-6)


def test_channels_weigh_by_the_loss_without_them() -> None:
    """Behind the last block of a ResNet all is linear, and so is this loss: the first order is exact there."""
    model = calm("timm_resnet18").eval()
    batches = [tiny_inputs(model, batch=size) | {"labels": torch.arange(size) % 2} for size in (2, 3)]
    towards = torch.randn(2, model(**backbones.inputs_of(batches[0]))["logits"].shape[1])

    def loss(outputs: Any, labels: torch.Tensor) -> torch.Tensor:
        return (outputs["logits"] * towards[labels]).sum()

    found = penalties.channel_weights(model, loss, batches)
    assert list(found) == list(penalties.watched(model).blocks)
    assert all(float(weights.mean()) == pytest.approx(1) and float(weights.min()) > 0 for weights in found.values())
    last = model.get_submodule(list(found)[-1])
    rises = []
    for channel in range(len(list(found.values())[-1])):

        def without(module: Any, inputs: Any, output: torch.Tensor, channel: int = channel) -> torch.Tensor:
            return output.index_fill(1, torch.tensor([channel]), 0.0)

        before = sum(float(loss(model(**backbones.inputs_of(batch)), batch["labels"])) for batch in batches)
        hook = last.register_forward_hook(without)
        rises.append(
            sum(float(loss(model(**backbones.inputs_of(batch)), batch["labels"])) for batch in batches) - before
        )
        hook.remove()
    rise = np.array(rises)
    powers = np.exp((rise - rise.mean()) / rise.std() / 5)
    np.testing.assert_allclose(list(found.values())[-1], powers / powers.mean(), rtol=1e-3)


@pytest.mark.parametrize("name", ["bert", "timm_resnet18", "timm_swin_tiny"])
def test_delta_weighs_channels(name: str) -> None:
    """Each by its weight: the weight of one channel alone gives its part, and all parts make the whole."""
    model = calm(name).eval()
    batch = tiny_inputs(model, batch=3)
    loss = lambda outputs, labels: torch.nn.functional.cross_entropy(outputs["logits"], labels)  # noqa: E731
    weights = penalties.channel_weights(model, loss, [batch | {"labels": torch.tensor([0, 1, 1])}])
    stage = stage_of("delta", model)
    moved(model)
    alike = {key: torch.ones_like(value) for key, value in weights.items()}
    whole = float(value(stage, model, batch))
    assert float(value(replace(stage, channel_weights=alike), model, batch)) == pytest.approx(whole, rel=1e-5)
    weighed = float(value(replace(stage, channel_weights=weights), model, batch))
    (key, of_last) = list(weights.items())[-1]
    parts = []
    for channel in range(len(of_last)):
        one = {name: torch.zeros_like(value) for name, value in weights.items()}
        one[key][channel] = 1.0
        parts.append(float(value(replace(stage, channel_weights=one), model, batch)))
    of_others = alike | {key: torch.zeros_like(of_last)}
    others = float(value(replace(stage, channel_weights=of_others), model, batch))
    assert others + sum(parts) == pytest.approx(whole, rel=1e-4)
    of_others = weights | {key: torch.zeros_like(of_last)}
    others = float(value(replace(stage, channel_weights=of_others), model, batch))
    expected = others + sum(part * float(weight) for part, weight in zip(parts, of_last, strict=True))
    assert weighed == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize(("method", "weighs"), [("lp_ft", [True]), ("full", [False]), ("gradual", [True] * 4)])
def test_channels_are_weighed_behind_a_stage_that_taught_the_head(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str, weighs: list[bool]
) -> None:
    write_tiny_text_model(tmp_path / "bert")
    write_texts(tmp_path / "texts", {"train": 12, "validation": 8})
    seen: dict[str, bool] = {}
    delta = penalties.delta

    def noted(stage: Any, *given: Any) -> torch.Tensor:
        seen[stage.name] = bool(stage.channel_weights)
        return delta(stage, *given)

    monkeypatch.setattr(penalties, "delta", noted)
    monkeypatch.setitem(penalties.PENALTIES, "delta", noted)
    flags = (
        f"--model={tmp_path / 'bert'} --dataset={tmp_path / 'texts'} --output_dir={tmp_path / 'run'} --penalty=delta"
    )
    cli._run(["train", "text-classification", *flags.split(), f"--method={method}", "--num_train_epochs=1"])
    assert list(seen.values()) == weighs


@pytest.mark.parametrize("name", ["bert", "roberta", "timm_resnet18", "timm_vit_tiny", "convnext"])
def test_bss_shrinks_the_smallest_singular_value_of_what_the_output_layer_reads(name: str) -> None:
    model = calm(name).eval()
    stage = stage_of("bss", model)
    batch = tiny_inputs(model, batch=3)
    with penalties.watching(model, penalties.watched(model)) as seen:
        logits = model(**batch)["logits"]
    layer = model.get_submodule(penalties.watched(model).output)
    torch.testing.assert_close(layer(seen["features"]), logits)
    penalty = value(stage, model, batch)
    smallest = torch.linalg.eigvalsh(seen["features"].double() @ seen["features"].double().T)[0]
    assert float(penalty) == pytest.approx(float(smallest), rel=1e-3, abs=1e-6)
    penalty.backward()
    assert any(parameter.grad is not None and parameter.grad.abs().max() > 0 for parameter in model.parameters())


def test_padding_of_choices_does_not_count() -> None:
    torch.manual_seed(0)
    values, start = torch.randn(6, 4, 8), torch.randn(6, 4, 8)
    mask = torch.ones(2, 3, 4)
    mask[..., 2:] = 0
    found = penalties._distance(values, start, mask)
    assert found == pytest.approx(float((values - start)[:, :2].square().sum(dim=2).mean()))


@pytest.mark.parametrize(
    ("shape", "channels"),
    [((2, 5, 3, 4, 4), 1), ((2, 3, 4, 4, 5), 4), ((2, 5, 4, 4), 1), ((2, 4, 4, 5), 3), ((2, 4, 5), 2)],
)
def test_distances_of_maps_are_summed_over_channels(shape: tuple[int, ...], channels: int) -> None:
    """Of networks of convolutions and of Swin, of videos and images, and of tokens."""
    torch.manual_seed(0)
    values, start = torch.randn(shape), torch.randn(shape)
    expected = float((values - start).square().sum(dim=channels).mean())
    assert float(penalties._distance(values, start, None)) == pytest.approx(expected)


def test_bss_without_one_vector_a_row() -> None:
    model = calm("gpt2")
    with pytest.raises(UsageError, match="does not read one vector a row"):
        value(stage_of("bss", model), model, tiny_inputs(model))


def test_r_drop_is_the_mean_divergence_of_two_passes() -> None:
    model = fresh("bert").train()
    stage = stage_of("r_drop", model)
    batch = tiny_inputs(model, batch=3)
    torch.manual_seed(3)
    first, second = (model(**batch)["logits"].detach().double().softmax(dim=-1) for _ in range(2))
    torch.manual_seed(3)
    expected = 0.0
    for p, q in zip(first, second, strict=True):
        for a, b in zip(p.tolist(), q.tolist(), strict=True):
            expected += (a - b) * (torch.tensor(a).log() - torch.tensor(b).log()).item() / 2 / 3
    assert expected > 0
    assert float(value(stage, model, batch)) == pytest.approx(expected, rel=1e-2)


def test_r_drop_without_dropout(tmp_path: Path) -> None:
    model = calm("bert")
    with pytest.raises(UsageError, match="BertForSequenceClassification has none where it trains"):
        tiny_trainer(model, stage_of("r_drop", model), tmp_path)


def test_r_drop_with_statistics_that_train(tmp_path: Path) -> None:
    model = fresh("timm_resnet18")
    stage = stage_of("r_drop", model, "--batch_norm=train")
    model.get_submodule("timm_model.layer1").add_module("drop", nn.Dropout(0.1))
    with pytest.raises(UsageError, match="into its statistics twice: use --batch_norm frozen"):
        tiny_trainer(model, stage, tmp_path)


def rowwise(stage: Any, model: Any, batch: Any, outputs: Any) -> torch.Tensor:
    """A mean over rows that knows nothing of the rest of the step."""
    return outputs["logits"].square().mean() + (batch["labels"][:, None] * outputs["logits"]).mean()


@pytest.mark.parametrize("penalty", ["l2_sp", "delta", "r_drop", "own"])
def test_accumulated_parts_add_up_to_one_batch(penalty: str, tmp_path: Path) -> None:
    """One step of SGD from the same place: 6 rows, or 3 parts of 2; the lengths of texts differ from part to part."""
    results, losses = [], []
    for size, parts in ((6, 1), (2, 3)):
        model = calm("bert")
        stage = stage_of("l2_sp" if penalty == "own" else penalty, model, "--penalty_weight=0.5", *RATES)
        if penalty == "own":
            stage = replace(stage, penalty=rowwise)
        if penalty == "r_drop":  # dropout in eval mode would be none; a second pass that differs, but by no chance
            model.classifier = _Alternating(model.classifier)
            stage = replace(stage, trainable=frozenset(name for name, _ in model.named_parameters()))
        moved(model)
        flags = [f"--per_device_train_batch_size={size}", f"--gradient_accumulation_steps={parts}", "--max_steps=1"]
        trainer = tiny_trainer(model, stage, tmp_path, *flags, "--optim=sgd", "--max_grad_norm=0", rows=6)
        before = every_tensor(model)
        trainer.train()
        after = every_tensor(model)
        results.append({key: after[key] - before[key] for key in before})
        losses.append(trainer.state.log_history[0]["loss"])
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
    assert max(float(change.abs().max()) for change in results[0].values()) > 1e-4
    torch.testing.assert_close(results[0], results[1], rtol=1e-3, atol=1e-7)


class _Alternating(nn.Module):
    """Every second pass is another, as with dropout."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.layer, self.calls, self.drop = layer, 0, nn.Dropout(1e-9)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return self.layer(features * (1.0 if self.calls % 2 else 0.5))


def test_the_penalty_is_in_training_and_not_in_evaluation(tmp_path: Path) -> None:
    scores = []
    for weight in ("0", "1000"):
        model = calm("bert")
        stage = stage_of("l2_sp", model, f"--penalty_weight={weight}", *RATES)
        moved(model)
        trainer = tiny_trainer(model, stage, tmp_path, "--max_steps=1", eval_dataset=TinyData(model, 4))
        evaluated = trainer.evaluate()["eval_loss"]
        trainer.train()
        scores.append((evaluated, trainer.state.log_history[-2]["loss"]))
    assert scores[0][0] == scores[1][0]
    assert scores[1][1] > 100 * scores[0][1]


@pytest.mark.parametrize("penalty", penalties.PENALTIES)
def test_penalties_in_half_precision(penalty: str, tmp_path: Path) -> None:
    model = fresh("bert")
    stage = stage_of(penalty, model, *RATES)
    trainer = tiny_trainer(model, stage, tmp_path, "--bf16", "--max_steps=2")
    before = every_tensor(model)
    trainer.train()
    after = every_tensor(model)
    assert any(not torch.equal(before[key], after[key]) for key in before)
    assert all(tensor.isfinite().all() and tensor.dtype is before[key].dtype for key, tensor in after.items())


def test_a_strong_penalty_keeps_the_weights_where_they_started(tmp_path: Path) -> None:
    distances = []
    for weight in ("0", "100"):
        model = calm("bert")
        stage = stage_of("l2_sp", model, f"--penalty_weight={weight}", "--learning_rate=1e-3")
        start = every_tensor(model)
        tiny_trainer(model, stage, tmp_path, "--max_steps=20", "--optim=sgd").train()
        end = every_tensor(model)
        distances.append(sum(float((end[key] - start[key]).square().sum()) for key in start if "encoder" in key))
    assert distances[1] < 0.9 * distances[0]


def test_a_stage_of_the_head_alone_has_no_penalty() -> None:
    first, second = plan_of("lp_ft", fresh("bert"), "--penalty=l2_sp").stages
    assert first.penalty is None
    assert second.penalty is penalties.l2_sp
    assert second.penalty_weight == penalties.WEIGHTS["l2_sp"]
    assert second.reference is not None
    assert not any(parameter.requires_grad for parameter in second.reference.parameters())


@pytest.mark.parametrize("penalty", ["bss", "r_drop"])
def test_adapters_train_with_a_penalty(penalty: str, tmp_path: Path) -> None:
    losses = []
    for flags in ([], [f"--penalty={penalty}", "--penalty_weight=100"]):
        torch.manual_seed(0)
        plan = plan_of("lora", fresh("bert"), *flags)
        before = every_tensor(plan.model)
        trainer = tiny_trainer(plan.model, plan.stages[0], tmp_path, "--max_steps=2")
        trainer.train()
        changed = {name for name, value in every_tensor(plan.model).items() if not value.equal(before[name])}
        assert changed
        assert changed <= plan.stages[0].trainable
        losses.append(trainer.state.log_history[0]["loss"])
    assert losses[1] > 1.01 * losses[0]


@pytest.mark.parametrize("penalty", ["bss", "r_drop"])
def test_nothing_is_copied_where_nothing_is_compared(penalty: str) -> None:
    assert stage_of(penalty, fresh("bert"), "--model=random:bert").reference is None
