"""The last layer for the first token alone: where no other is read, and the training is that of the whole layer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny_models import TINY, tiny_inputs
from tiny_training import TinyData, tiny_arguments, tiny_trainer
from torch import nn
from transformers import BertConfig, BertForTokenClassification

from hftl import first_token
from hftl.methods import build_plan
from hftl.pooling import pool_by_mean


def with_adapters(model: Any) -> Any:
    torch.manual_seed(0)
    adapted = get_peft_model(model, LoraConfig(target_modules="all-linear", init_lora_weights=False))
    for name, parameter in adapted.named_parameters():
        parameter.requires_grad_("lora_" in name or "classifier" in name)
    return adapted


def mean_pooled() -> Any:
    return pool_by_mean(TINY["bert"]())


BUILDERS = {name: TINY[name] for name in ("bert", "roberta", "electra")} | {
    "mean of the tokens": mean_pooled,
    "lora": lambda: with_adapters(TINY["bert"]()),
}


def lengths_behind_attention(model: nn.Module) -> list[int]:
    """Tokens that the last layer computes behind its attention, one number for each time it runs."""
    seen: list[int] = []
    layer = next(module.layer[-1] for name, module in model.named_modules() if name.endswith("encoder"))
    layer.intermediate.register_forward_pre_hook(lambda module, given: seen.append(given[0].shape[1]))
    return seen


@pytest.mark.parametrize("name", BUILDERS)
def test_outputs_and_gradients_are_those_of_the_whole_layer(name: str) -> None:
    model = BUILDERS[name]()
    batch = tiny_inputs(model, batch=4)
    part = first_token.unread_part(model, batch | {"labels": torch.tensor([0, 1, 2, 0])})
    assert part is not None
    assert all(parameter.grad is None for parameter in model.parameters())
    seen = lengths_behind_attention(model)
    logits, gradients = [], []
    for given in (None, part):
        with first_token.first_token_alone(given):
            logits.append(model.eval()(**batch).logits)
        logits[-1].square().sum().backward()
        gradients.append({key: value.grad.clone() for key, value in model.named_parameters() if value.grad is not None})
        model.zero_grad()
    assert seen == [8, 1]
    torch.testing.assert_close(logits[0], logits[1])
    assert gradients[0].keys() == gradients[1].keys()
    for key, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][key], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["distilbert", "deberta_v2", "modernbert", "albert", "gpt2", "qwen2"])
def test_other_architectures_are_left_as_they_are(name: str) -> None:
    model = TINY[name]()
    assert first_token.unread_part(model, tiny_inputs(model)) is None


def test_a_head_that_reads_other_tokens_gets_them() -> None:
    config = BertConfig(
        vocab_size=64, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, num_labels=3
    )
    words: Any = BertForTokenClassification(config)
    model: Any = TINY["bert"]()
    batch = tiny_inputs(model)
    assert first_token.unread_part(model, batch) is not None
    assert first_token.unread_part(words, batch) is None
    pooler = model.bert.pooler
    model.bert.pooler.forward = lambda states: pooler.activation(pooler.dense(states[:, :3].mean(dim=1)))
    assert first_token.unread_part(model, batch) is None


def test_what_else_may_be_looked_at_or_has_no_gradient_stays_whole() -> None:
    model: Any = TINY["bert"]()
    batch = tiny_inputs(model)
    one = {name: values[:, :1] for name, values in batch.items()}
    assert first_token.unread_part(model, one) is None
    model.config.output_hidden_states = True
    assert first_token.unread_part(model, batch) is None
    model.config.output_hidden_states = False
    model.base_model.requires_grad_(False)
    assert first_token.unread_part(model, batch) is None


@pytest.mark.parametrize(("flags", "alone"), [((), True), (("--penalty=l2_sp",), False)], ids=["plain", "penalty"])
def test_a_training_is_that_of_the_whole_layer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flags: tuple[str, ...], alone: bool
) -> None:
    """Evaluations have the whole layer, steps the first token where no penalty may look at the others."""
    trained = []
    for part in ("own", "whole"):
        model = TINY["bert"]()
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
            if hasattr(module, "dropout_prob"):
                module.dropout_prob = 0.0
        arguments = tiny_arguments(model, "--learning_rate=1e-2", *flags)
        (stage,) = build_plan(model, arguments).stages
        trainer = tiny_trainer(model, stage, tmp_path / part, "--eval_strategy=epoch", eval_dataset=TinyData(model, 2))
        trainer.looks_for_unread &= part == "own"
        seen = lengths_behind_attention(model)
        trainer.train()
        trained.append({name: value.detach() for name, value in model.named_parameters()})
        steps, evaluations = (seen[1:] if part == "own" and alone else seen)[:2], seen[-1]
        assert (steps, evaluations) == ([1 if part == "own" and alone else 8] * 2, 8)
    for name, value in trained[0].items():
        torch.testing.assert_close(value, trained[1][name], rtol=1e-3, atol=1e-5)
