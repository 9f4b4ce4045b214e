"""What a method gives: a plan of stages; and what methods share: rates and a stage's defaults."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from hftl import backbones
from hftl.arguments import TransferArguments, is_pretrained
from hftl.errors import UsageError
from hftl.problems import problem_of


@dataclass(frozen=True)
class Stage:
    """One training with a fixed set of trained parameters.

    Attributes:
        name: how it is called in messages and folders.
        trainable: names of the parameters that train; all others stay as they are, and so do their modules. None do in
            a stage of 0 epochs, whose model is only scored.
        learning_rate: of the backbone's last block.
        head_learning_rate: of the head.
        epochs: passes over the training rows.
        layer_decay: factor from the rate of a block to that of the block before it.
        batch_norm: "frozen" keeps the running statistics of every BatchNorm layer, "train" updates those of the
            layers that train, "adapt" keeps those that the training images gave before the first stage.
        least_steps: fewer steps than this are made up by further epochs (at most 50): on a few dozen rows a handful of
            epochs is too short to fit anything (Mosbach et al. 2021, Zhang et al. 2021). 0 keeps `epochs` as it is.
        factors: what the rates of single parameters, by name, are multiplied with.
        loss: `(outputs, labels, num_items_in_batch=None) -> scalar`; None takes the task's own.
        headless: the model gives what its output layer reads in the place of logits, which is what `loss` gets, and
            nothing is evaluated.
        choose: `(model, loss, batches, trainable) -> (name, parameters)`, called when the stage begins: which of
            `trainable` train.
        penalty: `(stage, model, batch, outputs) -> scalar`, a mean over the rows of the batch, see `hftl.penalties`.
        penalty_weight: the loss in training is the task's plus this times the penalty.
        reference: the model as it was pretrained, for penalties that compare with it.
        channel_weights: of a penalty that weighs what blocks give, by the names of their modules, shape (channels,);
            set when the stage begins.
        solved_head_scale: what a head that the stage before solved is multiplied with as the stage begins; below 1
            with less where its logits would still move by more than 20 when a row's features move by their own length.
    """

    name: str
    trainable: frozenset[str]
    learning_rate: float
    head_learning_rate: float
    epochs: float
    layer_decay: float = 1.0
    batch_norm: str = "frozen"
    least_steps: int = 0
    factors: Mapping[str, float] = field(default_factory=dict)
    loss: Callable[..., Any] | None = None
    headless: bool = False
    choose: Callable[..., tuple[str, frozenset[str]]] | None = None
    penalty: Callable[..., Any] | None = None
    penalty_weight: float = 0.0
    reference: nn.Module | None = None
    channel_weights: Mapping[str, torch.Tensor] = field(default_factory=dict)
    solved_head_scale: float = 1.0

    def __post_init__(self) -> None:
        """Take any collection of names."""
        object.__setattr__(self, "trainable", frozenset(self.trainable))


@dataclass(frozen=True)
class Plan:
    """A model and the stages that adapt it, in order.

    Attributes:
        model: the ordinary model, or a `PeftModel` around it.
        stages: run one after the other, each by a fresh trainer.
        settings: arguments as the method resolved them, for the run's recipe.
        callbacks: `transformers.TrainerCallback`s that belong to the method.
    """

    model: nn.Module
    stages: tuple[Stage, ...]
    settings: dict[str, Any] = field(default_factory=dict)
    callbacks: tuple[Any, ...] = ()


@dataclass(frozen=True)
class Rates:
    """Learning rates that suit a model."""

    backbone: float
    head: float
    adapters: float


def default_rates(model: nn.Module, pretrained: bool = True) -> Rates:
    """Learning rates for AdamW by family and width.

    - Convolutional: 2e-4 and 3e-3. EfficientNet-Lite0, everything trained, three epochs: cats against dogs, near to
      ImageNet, 0.979 at 2e-4 as at 1e-4, 0.971 at 3e-4; 2,700 MNIST digits, far from it, 0.984 against 0.968.
    - Transformers: 1e-4 at width 384 (MiniLM on movie reviews: 0.878, Trainer's 5e-5 gave 0.831), less for wider models
      in inverse proportion, which meets the 5e-5 of the BERT paper at 768; a fresh head takes ten times that of width
      384.
    - Adapters start at zero and take larger steps than full fine-tuning (Hu et al. 2022): 1e-3, at a width above 384
      less in inverse proportion. That is ten times the rate of the backbone in Transformers, five times in
      convolutional models.
    - A model that is not pretrained has no features to spare: 1e-3 everywhere.
    """
    if not pretrained:
        return Rates(1e-3, 1e-3, 1e-3)
    if backbones.is_convolutional(model):
        return Rates(2e-4, 3e-3, 1e-3)
    config: Any = getattr(model, "config", None)
    width = getattr(config, "hidden_size", None) or getattr(config, "num_features", None) or 768
    return Rates(1e-4 * min(1.0, 384 / width), 1e-3, 1e-3 * min(1.0, 384 / width))


#: of biases and norms, as a multiple of the rate of adapters, between 3 and 10. Once, 3 and 10 times gave `bitfit` on
#: TREC with 16 a class 0.767, 0.800, 0.811 and `norm` 0.694, 0.784, 0.798 (two draws); on digits, mirrored ones among
#: them, with 16 a class 0.817, 0.814, 0.858 and 0.814, 0.827, 0.877, with all rows 0.910, 0.916, 0.934 and 0.919,
#: 0.932, 0.952 (one draw); on 2,000 movie reviews 0.798, 0.806, 0.797 and 0.810, 0.817, 0.795 (one draw)
RATE_OF_FEW = 5.0
#: about three epochs of a thousand rows
LEAST_STEPS = 80
#: of a stage whose epochs were added to reach the least number of steps
MOST_EVALUATIONS = 10
#: epochs of pairs and their least steps, see `hftl.methods.parts.setfit`
PAIR_EPOCHS, PAIR_STEPS = 10.0, 20
#: more epochs than this are never added to reach the least number of steps
MOST_EPOCHS = 50


def later_half(blocks: int) -> int:
    """So many of a model's blocks are the later half; of 13 it is 6, so that what runs before them can be kept."""
    return max(1, blocks // 2)


def resolved_rates(model: nn.Module, arguments: TransferArguments, key: str = "backbone", factor: float = 1.0) -> Rates:
    """The person's rates, else the defaults; a given rate of the backbone scales the head's along.

    `--learning_rate` is the rate of `key`, whose default is multiplied by `factor`. That of adapters, biases and norms
    says nothing of the head: between their types it differs a thousandfold.
    """
    default = default_rates(model, is_pretrained(arguments))
    default = replace(default, **{key: getattr(default, key) * factor})
    scale = arguments.learning_rate / getattr(default, key) if arguments.learning_rate else 1.0
    head = arguments.head_learning_rate or default.head * (scale if key == "backbone" else 1.0)
    return Rates(default.backbone * scale, head, default.adapters * scale)


def make_stage(arguments: TransferArguments, name: str, trainable: list[str], backbone: float, head: float) -> Stage:
    """A stage of as many epochs as are usual for the data, unless the person says otherwise."""
    return Stage(
        name=name,
        trainable=frozenset(trainable),
        learning_rate=backbone,
        head_learning_rate=head,
        epochs=arguments.num_train_epochs or arguments.usual_epochs,
        layer_decay=arguments.layer_decay or 1.0,
        batch_norm=arguments.batch_norm or _batch_norm(arguments),
        least_steps=0 if arguments.num_train_epochs else LEAST_STEPS,
    )


def with_least_steps(stage: Stage, steps_an_epoch: int) -> Stage:
    """The stage with as many epochs as its least number of steps takes."""
    return replace(stage, epochs=max(stage.epochs, least_epochs(stage.least_steps, steps_an_epoch)))


def least_epochs(steps: int, steps_an_epoch: int) -> int:
    """Epochs that so many steps take, at most `MOST_EPOCHS`."""
    return min(MOST_EPOCHS, math.ceil(steps / steps_an_epoch))


def whole_epochs(epochs: float) -> float:
    """Whole ones, from two on: a part of one at the end would see some rows more often than others."""
    return float(math.floor(epochs)) if epochs >= 2 else round(epochs, 2)


def epochs_between_evaluations(stage: Stage) -> int:
    """1; where epochs were added as many as leave ten evaluations.

    An evaluation and its checkpoint after each two or three steps would take longer than the steps, and the best of
    fifty by a few dozen rows is the luckiest.
    """
    return math.ceil(stage.epochs / MOST_EVALUATIONS) if stage.least_steps else 1


def _batch_norm(arguments: TransferArguments) -> str:
    """Statistics of a pretrained model stay; what starts anew has none to keep."""
    return "frozen" if is_pretrained(arguments) and not arguments.reinit_blocks else "train"


def head_stage(model: nn.Module, arguments: TransferArguments, rates: Rates) -> Stage:
    """The stage before others, in which the head trains alone, or with the blocks that start anew."""
    stage = make_stage(arguments, "head", fresh_parameters(model, arguments), rates.backbone, rates.head)
    if not arguments.reinit_blocks:
        stage = replace(stage, learning_rate=rates.head, batch_norm="frozen", layer_decay=1.0)
    least = 0 if arguments.head_epochs else LEAST_STEPS // 2
    return replace(stage, epochs=arguments.head_epochs or 2.0, least_steps=least)


#: blocks that `partial` trains by default
PARTIAL_BLOCKS = 2
#: what a solved head is multiplied with before more of the model trains
_SOLVED_HEAD_SCALE = 0.1


def after_head(stage: Stage, model: nn.Module, arguments: TransferArguments) -> Stage:
    """The stage behind that of the head: it starts from a tenth of a head that was solved.

    A solved head fits a few rows so well that hardly any loss is left to move the backbone (Ren et al. 2023, "How to
    prepare your task head for finetuning"); a tenth of it gives the same answers, less sure. What `lp_ft` gains by it
    stands there. With 16 a class `surgical` has 3.9 points more and `gradual` 2.3 (three draws of five data sets); with
    all rows of digits 0.8 and 0.3 less (one draw). Not a head that knows the classes from before, nor of regression.
    """
    knows_classes = backbones.starts_from_texts(model) or arguments.keep_head
    solves = problem_of(arguments).head == "logistic" and not knows_classes
    return replace(stage, solved_head_scale=_SOLVED_HEAD_SCALE) if solves else stage


def fresh_parameters(model: nn.Module, arguments: TransferArguments) -> list[str]:
    """The head's parameters and those of re-initialised blocks: what has learned nothing yet."""
    blocks = backbones.parameter_blocks(model)
    first = max(blocks.values()) - (arguments.reinit_blocks or 0)
    return [name for name, block in blocks.items() if block >= first]


def blocks_to_unfreeze(arguments: TransferArguments, blocks: int, default: int) -> int:
    """`--unfreeze_blocks`, of a model of so many blocks.

    Raises:
        UsageError: it is less than one, or there are fewer.
    """
    count = arguments.unfreeze_blocks if arguments.unfreeze_blocks is not None else default
    if not 1 <= count <= blocks:
        raise UsageError(f"--unfreeze_blocks must lie between 1 and the model's {blocks} blocks, not {count}.")
    return count


def all_parameters(model: nn.Module) -> list[str]:
    """Names of all parameters."""
    return [name for name, _ in model.named_parameters()]


def prepare_modules(model: nn.Module, stage: Stage) -> list[nn.Module]:
    """Set what trains in a stage, and every module to its mode in it; the modules that stay in eval mode."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in stage.trainable)
    frozen = frozen_modules(model, stage)
    model.train()
    for module in frozen:
        module.training = False
    return frozen


def frozen_modules(model: nn.Module, stage: Stage) -> list[nn.Module]:
    """Modules that must stay in eval mode: those in which nothing trains, and BatchNorm whose statistics are kept.

    A module without parameters (dropout, stochastic depth, pooling) goes with the block that it is inside. Outside all
    blocks it goes with the parameter that follows it in depth order: the dropout before a trained head is on.
    """
    blocks = backbones.parameter_blocks(model)
    trained_blocks = {blocks[name] for name in stage.trainable}
    block_of: dict[str, int] = {}
    block = max(blocks.values())
    for prefix, module in reversed(list(model.named_modules())):
        own = [f"{prefix}.{name}" if prefix else name for name, _ in module.named_parameters(recurse=False)]
        block = next((blocks[name] for name in own if name in blocks), block)
        block_of[prefix] = block
    below: dict[str, set[int]] = {}
    for name, block in blocks.items():
        while name := name.rpartition(".")[0]:
            below.setdefault(name, set()).add(block)
    frozen = []
    for prefix, module in model.named_modules():
        # Shared parameters have one name only; a module that holds them under another one is judged by its block.
        names = [f"{prefix}.{name}" if prefix else name for name, _ in module.named_parameters()]
        known = [name for name in names if name in blocks]
        around = prefix
        while around and around not in below:
            around = around.rpartition(".")[0]
        inside = below.get(around, set())
        block = next(iter(inside)) if len(inside) == 1 else block_of[prefix]
        trains = any(name in stage.trainable for name in known) if known else block in trained_blocks
        keeps_statistics = stage.batch_norm != "train" and isinstance(module, nn.modules.batchnorm._BatchNorm)
        if keeps_statistics or not trains:
            frozen.append(module)
    return frozen
