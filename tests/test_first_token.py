"""The last layer for the first token alone: where no other is read, and the training is that of the whole layer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from tiny_models import TINY, tiny_inputs
from tiny_training import TinyData, tiny_arguments, tiny_trainer
from torch import nn

from hftl import first_token
from hftl.methods import build_plan
from hftl.pooling import pool_by_mean

SIZES = {"vocab_size": 64, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}


def of_class(name: str, **settings: Any) -> Any:
    torch.manual_seed(0)
    model_class: Any = getattr(transformers, name)
    return model_class(model_class.config_class(**SIZES, pad_token_id=0, num_labels=3, **settings)).eval()


def with_adapters(model: Any) -> Any:
    torch.manual_seed(0)
    adapted = get_peft_model(model, LoraConfig(target_modules="all-linear", init_lora_weights=False))
    for name, parameter in adapted.named_parameters():
        parameter.requires_grad_("lora_" in name or "classifier" in name)
    return adapted


BUILDERS = {name: lambda name=name: of_class(name) for name in sorted(first_token._CLASSES)} | {
    "mean of the tokens": lambda: pool_by_mean(TINY["bert"]()),
    "lora": lambda: with_adapters(TINY["bert"]()),
}


def without_dropout(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if hasattr(module, "dropout_prob"):  # of attention
            module.dropout_prob = 0.0


def lengths_behind_attention(model: nn.Module) -> list[int]:
    """Tokens that the last layer computes behind its attention, one number for each time it runs."""
    seen: list[int] = []
    layer = next(module.layer[-1] for name, module in model.named_modules() if name.endswith("encoder"))
    layer.intermediate.register_forward_pre_hook(lambda module, given: seen.append(given[0].shape[1]))
    return seen


@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "checkpointing"])
@pytest.mark.parametrize("name", BUILDERS)
def test_outputs_and_gradients_are_those_of_the_whole_layer(name: str, checkpointing: bool) -> None:
    model = BUILDERS[name]()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    without_dropout(model.train())  # there are no checkpoints in eval mode
    batch = tiny_inputs(model, batch=4)
    part = first_token.last_part(model)
    assert part is not None
    seen = lengths_behind_attention(model)
    logits, gradients = [], []
    for given in (None, part):
        with first_token.first_token_alone(given):
            logits.append(model(**batch).logits)
            logits[-1].square().sum().backward()
        gradients.append({key: value.grad.clone() for key, value in model.named_parameters() if value.grad is not None})
        model.zero_grad()
    assert seen == [8, 8, 1, 1] if checkpointing else [8, 1]
    torch.testing.assert_close(logits[0], logits[1])
    assert gradients[0].keys() == gradients[1].keys()
    for key, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][key], rtol=1e-4, atol=1e-5)


class OwnBertForSequenceClassification(transformers.BertForSequenceClassification):
    """A class of somebody's own, whose head may read anything."""


@pytest.mark.parametrize("name", ["distilbert", "deberta_v2", "modernbert", "albert", "gpt2", "qwen2", "vit"])
def test_other_architectures_are_left_as_they_are(name: str) -> None:
    assert first_token.last_part(TINY[name]()) is None


def test_what_may_read_other_tokens_gets_them() -> None:
    own: Any = OwnBertForSequenceClassification(TINY["bert"]().config)
    assert first_token.last_part(own) is None
    own.__class__.__name__ = "BertForSequenceClassification"
    assert first_token.last_part(own) is None
    assert first_token.last_part(of_class("BertForTokenClassification")) is None
    name = "BertForSequenceClassification"
    for settings in ({"output_hidden_states": True}, {"is_decoder": True}, {"chunk_size_feed_forward": 2}):
        assert first_token.last_part(of_class(name, **settings)) is None
    assert first_token.last_part(of_class(name)) is not None


@pytest.mark.parametrize("flags", [[], ["--gradient_accumulation_steps=2"], ["--penalty=l2_sp"]], ids=str)
def test_a_training_is_that_of_the_whole_layer(tmp_path: Path, flags: list[str]) -> None:
    """Evaluations have the whole layer, steps the first token where no penalty may look at the others."""
    trained = []
    for alone in (True, False):
        model = TINY["bert"]()
        without_dropout(model)
        arguments = tiny_arguments(model, "--learning_rate=1e-2", "--per_device_train_batch_size=2", *flags)
        (stage,) = build_plan(model, arguments).stages
        trainer = tiny_trainer(
            model, stage, tmp_path / str(alone), *flags, "--per_device_train_batch_size=2", "--eval_strategy=epoch",
            eval_dataset=TinyData(model, 2),
        )  # fmt: skip
        trainer.last_part = trainer.last_part if alone else None
        seen = lengths_behind_attention(model)
        trainer.train()
        trained.append({name: value.detach() for name, value in model.named_parameters()})
        assert (seen[:2], seen[-1]) == ([1 if alone and "--penalty=l2_sp" not in flags else 8] * 2, 8)
    for name, value in trained[0].items():
        torch.testing.assert_close(value, trained[1][name], rtol=1e-3, atol=1e-5)
