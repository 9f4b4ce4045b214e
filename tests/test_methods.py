"""Every method on every architecture of the table: what a plan trains, what a step moves, what is saved."""

from __future__ import annotations

import copy
import re
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from peft import PeftModel
from tiny_models import TINY, tiny_inputs
from tiny_training import every_tensor, logits_of, task_of, tiny_arguments, tiny_trainer
from torch import nn
from transformers import PreTrainedModel, TrainerCallback

from hftl import backbones, pretrained, saving
from hftl.errors import UsageError
from hftl.methods import METHODS, Plan, build_plan
from hftl.pooling import pool_by_mean

# _mean: with the pooling layer of `hftl.pooling`
every_model = pytest.mark.parametrize("name", [*TINY, "bert_mean", "electra_mean"])

# Rates that move what a gradient reaches well beyond rounding.
RATES = ["--learning_rate=1e-3", "--head_learning_rate=1e-2"]
# Two steps: an adapter's first matrix has no gradient before the second one, which starts at zero, has moved.
STEPS = "--max_steps=2"
FEW = ["timm_resnet18", "timm_vit_tiny", "bert", "gpt2"]
#: a gradient below this is rounding
NOTHING = 1e-8


@cache
def _built(name: str) -> PreTrainedModel:
    """A tiny model whose every part matters to its output, as a pretrained one's does."""
    model = TINY[name.removesuffix("_mean")]()
    batch_norms = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2 and not batch_norms:
                parameter.mul_(4)  # or attention is uniform, and queries and keys have no gradient to speak of
            elif 0 < parameter.abs().max() < 1e-4:
                parameter.fill_(0.5)  # ConvNeXt's layer scale starts at 1e-6
        for module in batch_norms:
            module.momentum = 1.0
        model.train()(**tiny_inputs(model, batch=8))  # statistics of real activations, or those of Inception explode
        for module in batch_norms:
            module.momentum = 0.1
    return pool_by_mean(model) if name.endswith("_mean") else model


def fresh(name: str) -> PreTrainedModel:
    return copy.deepcopy(_built(name))


def plan_of(method: str, model: PreTrainedModel, *flags: str) -> Plan:
    flags = ("--unfreeze_blocks=1", *flags) if method == "partial" else flags
    return build_plan(model, tiny_arguments(model, f"--method={method}", *flags))


@pytest.mark.parametrize("method", [name for name in METHODS if name not in ("peft", "zero_shot")])
@every_model
def test_a_plan_trains_what_its_name_says(name: str, method: str) -> None:
    model = fresh(name)
    blocks = backbones.parameter_blocks(model)
    head = max(blocks.values())
    everything = frozenset(blocks) - backbones.feature_encoder(model)  # of waveforms, which stays as it is
    only_head = frozenset(key for key, block in blocks.items() if block == head)
    norms = set(backbones.normalisation_modules(model))
    fixed = (*backbones.structure(model).head, *backbones.pooling_layer(model))
    output_layer = frozenset(key for key in blocks if backbones.is_below_any(key, fixed))
    if method == "bitfit" and not {key for key in blocks if key.endswith("bias")} - only_head:
        with pytest.raises(UsageError, match="no biases outside its head"):
            plan_of(method, model)
        return
    plan = plan_of(method, model)
    trained = [stage.trainable for stage in plan.stages]
    if method == "lora":
        check_adapters(plan, only_head)
        return
    expected = {
        "full": [everything],
        "frozen": [only_head],
        "partial": [frozenset(key for key, block in blocks.items() if block in (head - 1, head))],
        "lp_ft": [only_head, everything],
        "auto": [only_head],
        "gradual": [only_head, *_from_the_top({key: blocks[key] for key in everything})],
        "surgical": [only_head, everything],  # of which one block is chosen when the stage begins
        "bitfit": [only_head | {key for key in everything if key.endswith("bias")}],
        "setfit": [everything - output_layer, only_head],
        "norm": [only_head | {key for key in everything if key.rpartition(".")[0] in norms}],
    }
    assert trained == expected[method]
    assert plan.model is model


def _from_the_top(blocks: dict[str, int]) -> list[frozenset[str]]:
    """What gradual unfreezing trains after the head: quarters of the depth, or single blocks where there are few."""
    head = max(blocks.values())
    stages = min(4, head)
    depths = [-(-head * stage // stages) for stage in range(1, stages + 1)]
    assert depths[-1] == head
    return [frozenset(key for key, block in blocks.items() if block >= head - depth) for depth in depths]


def check_adapters(plan: Plan, head: frozenset[str]) -> None:
    """Adapters outside the head, PEFT's copies of the whole head, and nothing else."""
    (stage,) = plan.stages
    adapters = {key for key in stage.trainable if ".lora_" in key}
    copies = {backbones.plain_name(plan.model, key) for key in stage.trainable - adapters}
    assert all(".modules_to_save.default." in key for key in stage.trainable - adapters)
    assert copies == head
    blocks = backbones.parameter_blocks(plan.model)
    assert {blocks[key] for key in adapters} == set(range(1, max(blocks.values())))


class Watch(TrainerCallback):
    """Notes the largest gradient of each parameter, and whether each module was in training mode when it ran."""

    def __init__(self, model: nn.Module) -> None:
        self.gradients: dict[str, float] = {}
        self.training: dict[str, bool] = {}
        for name, module in model.named_modules():
            module.register_forward_hook(lambda module, *_, name=name: self.training.update({name: module.training}))

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        for name, parameter in others["model"].named_parameters():
            if parameter.grad is not None:
                size = float(parameter.grad.abs().max())
                self.gradients[name] = max(size, self.gradients.get(name, 0.0))


def train(model: PreTrainedModel, method: str, folder: Path, *flags: str) -> tuple[Plan, list[str]]:
    """Two steps of each stage, with everything checked; the plan, and what should have moved and had no gradient."""
    plan = plan_of(method, model, *RATES, *flags)
    idle: list[str] = []
    for stage in plan.stages:
        trainer = tiny_trainer(plan.model, stage, folder, STEPS)
        watch = Watch(plan.model)
        trainer.add_callback(watch)
        before = every_tensor(plan.model)
        trainer.train()
        after = every_tensor(plan.model)
        moved = {key for key in before if not torch.equal(before[key], after[key])}
        reached = {key for key, size in watch.gradients.items() if size > NOTHING}
        assert moved - stage.trainable == updated_statistics(plan.model, stage)
        assert reached <= moved
        idle += sorted(stage.trainable - reached)
        check_modes(plan.model, stage, watch.training)
    return plan, idle


def updated_statistics(model: nn.Module, stage: Any) -> set[str]:
    """The buffers of BatchNorm that change with `--batch_norm train`: those of the layers that train, else none."""
    if stage.batch_norm == "frozen":
        return set()
    names = {key.rpartition(".")[0] for key in stage.trainable}
    layers = {name for name in names if isinstance(model.get_submodule(name), nn.modules.batchnorm._BatchNorm)}
    return {f"{name}.{key}" for name in layers for key in ("running_mean", "running_var", "num_batches_tracked")}


def check_modes(model: nn.Module, stage: Any, seen: dict[str, bool]) -> None:
    """Frozen modules ran in eval mode, trained ones in training mode."""
    blocks = backbones.parameter_blocks(model)
    trained = {blocks[key] for key in stage.trainable}
    parts = backbones.structure(model)
    prefixes = {prefix: index for index, block in enumerate(parts.blocks) for prefix in block}
    prefixes |= dict.fromkeys(parts.trained_head, len(parts.blocks))
    for name, module in model.named_modules():
        if name not in seen:
            continue
        below = [f"{name}.{key}".lstrip(".") for key, _ in module.named_parameters()]
        plain = backbones.plain_name(model, name)
        inside = [index for prefix, index in prefixes.items() if f"{plain}.".startswith(f"{prefix}.")]
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            trains = stage.batch_norm == "train" and any(key in stage.trainable for key in below)
            assert seen[name] == trains, name
        elif any(key in blocks for key in below):
            assert seen[name] == any(key in stage.trainable for key in below), name
        elif inside:
            assert seen[name] == (inside[0] in trained), name
        elif plain.endswith(("head_drop", "dropout")) and plain != "wav2vec2.encoder.dropout":  # before the blocks
            assert seen[name], name  # before the head, which always trains


# Without a gradient: softmax does not see what a key's bias adds to all scores alike, no image has masked patches, and
# of the pooling layer (the fourth here) attention and the feed-forward part start at zero. No moment
# of a sound is masked.
WITHOUT_GRADIENT = re.compile(
    r"\.(key|k_lin|k_proj)\.bias$|mask_token$|masked_spec_embed$"
    r"|layer\.3\.(attention\.self\.(query|key)|intermediate|output\.dense)"
)


@pytest.mark.parametrize("method", ["full", "partial", "lora"])
@every_model
def test_steps_move_what_trains_and_the_saved_model_is_the_trained_one(name: str, method: str, tmp_path: Path) -> None:
    model = fresh(name)
    plan, idle = train(model, method, tmp_path / "training")
    assert [key for key in idle if not WITHOUT_GRADIENT.search(key)] == []
    batch = tiny_inputs(model)
    expected = logits_of(plan.model, batch)
    task, folder = task_of(model), tmp_path / "saved"
    saving.save_checked(task, plan.model, batch, folder)

    # The same weights in another memory layout are added up in another order; a merged sum is rounded once more.
    close = {"rtol": 1e-3, "atol": 1e-4} if method == "lora" else {"rtol": 1e-5, "atol": 1e-5}
    loaded = task.auto_class.from_pretrained(folder)
    torch.testing.assert_close(logits_of(loaded, batch), expected, **close)
    if method != "lora":
        torch.testing.assert_close(every_tensor(loaded), every_tensor(plan.model), rtol=0, atol=0)
    assert loaded.config.id2label == {0: "a", 1: "b", 2: "c"}
    if name.startswith("timm_"):
        by_timm = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
        with torch.no_grad():
            torch.testing.assert_close(by_timm(batch["pixel_values"]), expected, **close)
    if method == "lora":
        base = fresh(name)
        pretrained.reset_head(base)
        if name.endswith("_mean"):
            base.base_model.encoder.layer[-1].apply(base._init_weights)  # the checkpoint has no such layer
        adapted = PeftModel.from_pretrained(base, folder / "adapter")
        torch.testing.assert_close(logits_of(adapted, batch), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("method", ["frozen", "lp_ft"])
@pytest.mark.parametrize("name", FEW)
def test_the_head_alone_trains_first(name: str, method: str, tmp_path: Path) -> None:
    train(fresh(name), method, tmp_path)


@pytest.mark.parametrize("method", ["full", "partial"])
@pytest.mark.parametrize("name", ["timm_resnet18", "timm_efficientnet_lite0", "resnet"])
def test_batch_norm_trains_where_it_is_asked_to(name: str, method: str, tmp_path: Path) -> None:
    plan, _ = train(fresh(name), method, tmp_path, "--batch_norm=train")
    (stage,) = plan.stages
    assert updated_statistics(plan.model, stage)


def test_rates_and_epochs_are_those_that_were_given() -> None:
    model = fresh("bert")
    flags = ["--learning_rate=2e-4", "--head_learning_rate=5e-3", "--num_train_epochs=4"]
    (stage,) = plan_of("full", model, *flags, "--layer_decay=0.5").stages
    assert (stage.learning_rate, stage.head_learning_rate, stage.epochs, stage.least_steps) == (2e-4, 5e-3, 4, 0)
    assert stage.layer_decay == 0.5
    (stage,) = plan_of("frozen", model, "--head_learning_rate=5e-3").stages
    assert stage.head_learning_rate == 5e-3
    first, second = plan_of("lp_ft", model, *flags, "--head_epochs=1").stages
    assert (first.epochs, second.epochs) == (1, 4)
    assert first.head_learning_rate == 5e-3
    assert (second.learning_rate, second.head_learning_rate) == (2e-4, 5e-3)
    _, second = plan_of("lp_ft", model, "--learning_rate=2e-4").stages
    assert (second.learning_rate, second.head_learning_rate) == (2e-4, 2e-4)
    for method in ("lp_ft", "gradual", "surgical"):
        first, second, *others = plan_of(method, model).stages
        assert (first.solved_head_scale, second.solved_head_scale) == (1.0, 0.1)
        assert {stage.solved_head_scale for stage in others} <= {1.0}  # the head is no longer what was solved
        for flag in ("--problem_type=regression", "--keep_head=true"):  # whose outputs are what they should be
            assert plan_of(method, model, flag).stages[1].solved_head_scale == 1.0
    pairs, head = plan_of("setfit", model, "--layer_decay=0.5").stages
    assert (pairs.layer_decay, head.layer_decay) == (0.5, 1.0)
    (stage,) = plan_of("lora", model, *flags, "--layer_decay=0.5").stages
    assert stage.layer_decay == 0.5
    assert (stage.learning_rate, stage.head_learning_rate) == (2e-4, 5e-3)


#: rates of the blocks or adapters and of the head, by method; vit as if it were 768 wide
DEFAULT_RATES = {
    "bert": {"full": (1e-4, 1e-3), "partial": (1e-4, 1e-3), "lora": (1e-3, 1e-3), "frozen": (1e-3, 1e-3)},
    "vit": {"full": (5e-5, 1e-3), "partial": (5e-5, 1e-3), "lora": (5e-4, 1e-3), "frozen": (1e-3, 1e-3)},
    "timm_resnet18": {"full": (2e-4, 3e-3), "partial": (2e-4, 3e-3), "lora": (1e-3, 3e-3), "frozen": (3e-3, 3e-3)},
}


@pytest.mark.parametrize("method", ["full", "partial", "lora", "frozen"])
@pytest.mark.parametrize("name", DEFAULT_RATES)
def test_default_rates(name: str, method: str) -> None:
    for model_name, expected in (("some/model", DEFAULT_RATES[name][method]), ("random:any", (1e-3, 1e-3))):
        model = fresh(name)
        if name == "vit":
            model.config.hidden_size = 768  # where the width is read
        (stage,) = plan_of(method, model, f"--model={model_name}").stages
        assert (stage.learning_rate, stage.head_learning_rate) == pytest.approx(expected), model_name


@pytest.mark.parametrize(("method", "rate"), [("bitfit", 5e-3), ("norm", 5e-3), ("vera", 3e-2), ("miss", 3e-4)])
def test_what_trains_few_numbers_has_a_multiple_of_the_rate_of_adapters(method: str, rate: float) -> None:
    (stage,) = plan_of(method, fresh("bert")).stages
    assert (stage.learning_rate, stage.head_learning_rate) == pytest.approx((rate, 1e-3))
    (stage,) = plan_of(method, fresh("bert"), "--learning_rate=1e-3").stages
    assert (stage.learning_rate, stage.head_learning_rate) == pytest.approx((1e-3, 1e-3))


def test_a_given_rate_of_the_backbone_takes_the_head_along() -> None:
    model = fresh("vit")
    (plain,), (slower,) = plan_of("full", model).stages, plan_of("full", model, "--learning_rate=5e-5").stages
    assert slower.head_learning_rate / slower.learning_rate == pytest.approx(
        plain.head_learning_rate / plain.learning_rate
    )


def test_an_untrained_model_takes_larger_steps_and_learns_its_own_statistics() -> None:
    model = fresh("timm_resnet18")
    (stage,) = plan_of("full", model, "--model=random:resnet18").stages
    assert stage.batch_norm == "train"
    assert stage.learning_rate > plan_of("full", model).stages[0].learning_rate


def test_lora_settings() -> None:
    model = fresh("bert")
    plan = plan_of("lora", model, "--lora_r=4", "--lora_alpha=32", "--lora_target_modules", "query", "value")
    adapted = {key.split(".lora_")[0].rpartition(".")[2] for key in plan.stages[0].trainable if ".lora_" in key}
    assert adapted == {"query", "value"}
    assert plan.model.get_submodule("base_model.model.bert.encoder.layer.0.attention.self.query").scaling == {
        "default": 8.0
    }
    assert (plan.settings["lora_r"], plan.settings["lora_alpha"]) == (4, 32)
    twice = plan_of("lora", fresh("bert"), "--lora_r=4").settings  # the scale follows the rank
    assert (twice["lora_r"], twice["lora_alpha"]) == (4, 8)
    assert plan.model.peft_config["default"].base_model_name_or_path == "some/model"


def test_lora_targets_that_are_not_there() -> None:
    with pytest.raises(UsageError, match=r"no layer outside the head is named 'qurey'.*query"):
        plan_of("lora", fresh("bert"), "--lora_target_modules", "qurey")


@pytest.mark.parametrize("count", [0, 5])
def test_blocks_that_are_not_there(count: int) -> None:
    model = fresh("bert")
    with pytest.raises(UsageError, match="between 1 and the model's 4 blocks"):
        plan_of("partial", model, f"--unfreeze_blocks={count}")


def test_an_argument_that_the_method_does_not_use() -> None:
    with pytest.raises(UsageError, match="does not use --lora_r"):
        plan_of("full", fresh("bert"), "--lora_r=4")


def test_the_plan_of_a_function_in_a_file(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(
        "from hftl import Plan, Stage\n"
        "def biases(model, arguments):\n"
        "    names = frozenset(name for name, _ in model.named_parameters() if name.endswith('bias'))\n"
        "    return Plan(model, (Stage('biases', names, 1e-3, 1e-2, 1.0),))\n"
        "def nothing(model, arguments):\n"
        "    return None\n"
    )
    model = fresh("bert")
    (stage,) = build_plan(model, tiny_arguments(model, f"--method={tmp_path / 'mine.py'}:biases")).stages
    trainer = tiny_trainer(model, stage, tmp_path / "training", "--max_steps=1")
    before = every_tensor(model)
    trainer.train()
    moved = {key for key, tensor in every_tensor(model).items() if not torch.equal(before[key], tensor)}
    assert moved
    assert moved <= stage.trainable
    with pytest.raises(UsageError, match="must return a Plan"):
        build_plan(model, tiny_arguments(model, f"--method={tmp_path / 'mine.py'}:nothing"))
    with pytest.raises(UsageError, match=r"has no function 'biasses'.*biases"):
        build_plan(model, tiny_arguments(model, f"--method={tmp_path / 'mine.py'}:biasses"))


def test_the_plan_of_a_function_in_a_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own_package_of_methods").mkdir()
    (tmp_path / "own_package_of_methods" / "few.py").write_text(
        "from hftl import Plan, Stage\n"
        "def last_bias(model, arguments):\n"
        "    return Plan(model, (Stage('bias', ['classifier.bias'], 1e-3, 1e-2, arguments.num_train_epochs),))\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    model = fresh("bert")
    flags = ["--method=own_package_of_methods.few:last_bias", "--num_train_epochs=7"]
    plan = build_plan(model, tiny_arguments(model, *flags))
    (stage,) = plan.stages
    assert plan.model is model
    assert (stage.name, stage.trainable, stage.epochs) == ("bias", {"classifier.bias"}, 7)
