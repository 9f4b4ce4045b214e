"""Methods of transfer: functions from a pretrained model to a plan of stages."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import sys
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import nn

from hftl import backbones
from hftl.arguments import TransferArguments
from hftl.errors import UsageError, did_you_mean
from hftl.pretrained import public_name


@dataclass(frozen=True)
class Stage:
    """One training with a fixed set of trained parameters.

    Attributes:
        name: how it is called in messages and folders.
        trainable: names of the parameters that train; all others stay as they are, and so do their modules.
        learning_rate: of the backbone's last block.
        head_learning_rate: of the head.
        epochs: passes over the training rows.
        layer_decay: factor from the rate of a block to that of the block before it.
        batch_norm: "frozen" keeps the running statistics of every BatchNorm layer, "train" updates those of the
            layers that train.
        least_steps: fewer steps than this are made up by further epochs (at most 50): on a few dozen rows a handful of
            epochs is too short to fit anything (Mosbach et al. 2021, Zhang et al. 2021). 0 keeps `epochs` as it is.
        loss: `(outputs, labels, num_items_in_batch=None) -> scalar`; None takes the task's own.
    """

    name: str
    trainable: frozenset[str]
    learning_rate: float
    head_learning_rate: float
    epochs: float
    layer_decay: float = 1.0
    batch_norm: str = "frozen"
    least_steps: int = 0
    loss: Callable[..., Any] | None = None


@dataclass(frozen=True)
class Plan:
    """A model and the stages that adapt it, in order.

    Attributes:
        model: the ordinary model, or a `PeftModel` around it.
        stages: run one after the other, each by a fresh trainer.
        settings: arguments as the method resolved them, for the run's recipe.
    """

    model: nn.Module
    stages: tuple[Stage, ...]
    settings: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Rates:
    """Learning rates that suit a model."""

    backbone: float
    head: float
    adapters: float


def default_rates(model: nn.Module, pretrained: bool = True) -> Rates:
    """Learning rates for AdamW by family and width.

    - Convolutional: 1e-4 and 3e-3, the best of a grid on cats against dogs with EfficientNet-Lite0 (0.979; 3e-4 gave
      0.971).
    - Transformers: 1e-4 at width 384 (MiniLM on movie reviews: 0.878, Trainer's 5e-5 gave 0.831), less for wider models
      in inverse proportion, which meets the 5e-5 of the BERT paper at 768; a fresh head takes ten times that of width
      384.
    - Adapters start at zero and take ten times the rate of full fine-tuning (Hu et al. 2022).
    - A model that is not pretrained has no features to spare: 1e-3 everywhere.
    """
    if not pretrained:
        return Rates(1e-3, 1e-3, 1e-3)
    if backbones.is_convolutional(model):
        return Rates(1e-4, 3e-3, 1e-3)
    config: Any = getattr(model, "config", None)
    width = getattr(config, "hidden_size", None) or getattr(config, "num_features", None) or 768
    return Rates(1e-4 * min(1.0, 384 / width), 1e-3, 1e-3 * min(1.0, 384 / width))


#: about three epochs of a thousand rows
LEAST_STEPS = 80


def _resolved_rates(model: nn.Module, arguments: TransferArguments) -> Rates:
    """The person's rates, else the defaults; a given rate of the backbone scales the head's along."""
    default = default_rates(model, _is_pretrained(arguments))
    key = "adapters" if arguments.method == "lora" else "backbone"
    scale = arguments.learning_rate / getattr(default, key) if arguments.learning_rate else 1.0
    head = arguments.head_learning_rate or default.head * scale
    return Rates(default.backbone * scale, head, default.adapters * scale)


def _is_pretrained(arguments: TransferArguments) -> bool:
    return not str(arguments.model_name_or_path).startswith("random:")


def _stage(arguments: TransferArguments, name: str, trainable: list[str], backbone: float, head: float) -> Stage:
    """A stage of three epochs, unless the person says otherwise.

    Three: on 8,000 movie reviews more gained nothing (MiniLM, 0.874 to 0.878).
    """
    return Stage(
        name=name,
        trainable=frozenset(trainable),
        learning_rate=backbone,
        head_learning_rate=head,
        epochs=arguments.num_train_epochs or 3.0,
        layer_decay=arguments.layer_decay or 1.0,
        batch_norm=arguments.batch_norm or ("frozen" if _is_pretrained(arguments) else "train"),
        least_steps=0 if arguments.num_train_epochs else LEAST_STEPS,
    )


def full(model: nn.Module, arguments: TransferArguments) -> Plan:
    """Everything trains, the new head faster than the backbone.

    Running statistics of BatchNorm stay the pretrained ones: small batches of a small data set estimate them badly
    (cats against dogs: 0.971 frozen, 0.961 trained).
    """
    rates = _resolved_rates(model, arguments)
    stage = _stage(arguments, "all", _all_parameters(model), rates.backbone, rates.head)
    return Plan(model, (stage,), {"learning_rate": rates.backbone, "head_learning_rate": rates.head})


def frozen(model: nn.Module, arguments: TransferArguments) -> Plan:
    """The head alone trains, on fixed features (linear probing). Five epochs: the problem is small and convex."""
    rate = arguments.head_learning_rate or arguments.learning_rate or default_rates(model).head
    stage = _stage(arguments, "head", backbones.head_parameters(model), rate, rate)
    stage = replace(stage, epochs=arguments.num_train_epochs or 5.0, batch_norm="frozen", layer_decay=1.0)
    return Plan(model, (stage,), {"head_learning_rate": rate})


def partial(model: nn.Module, arguments: TransferArguments) -> Plan:
    """The last k blocks and the head train (Yosinski et al. 2014: late features are the specific ones)."""
    count = arguments.unfreeze_blocks if arguments.unfreeze_blocks is not None else 2
    blocks = backbones.parameter_blocks(model)
    head = max(blocks.values())
    if not 1 <= count <= head:
        raise UsageError(f"--unfreeze_blocks must lie between 1 and the model's {head} blocks, not {count}.")
    names = [name for name, block in blocks.items() if block >= head - count]
    rates = _resolved_rates(model, arguments)
    stage = _stage(arguments, f"last {count} blocks", names, rates.backbone, rates.head)
    settings = {"learning_rate": rates.backbone, "head_learning_rate": rates.head, "unfreeze_blocks": count}
    return Plan(model, (stage,), settings)


def lp_ft(model: nn.Module, arguments: TransferArguments) -> Plan:
    """First the head, then everything at half the rate (Kumar et al. 2022: a fitted head distorts features less)."""
    rates = _resolved_rates(model, arguments)
    first = _stage(arguments, "head", backbones.head_parameters(model), rates.head, rates.head)
    first = replace(first, epochs=arguments.head_epochs or 2.0, batch_norm="frozen", layer_decay=1.0)
    first = replace(first, least_steps=0 if arguments.head_epochs else LEAST_STEPS // 2)
    second = _stage(arguments, "all", _all_parameters(model), rates.backbone / 2, rates.head / 2)
    settings = {"learning_rate": rates.backbone, "head_learning_rate": rates.head, "head_epochs": first.epochs}
    return Plan(model, (first, second), settings)


def lora(model: nn.Module, arguments: TransferArguments) -> Plan:
    """Low-rank adapters on the backbone's matrices and the head train (Hu et al. 2022).

    Rank 8 and a scale of twice the rank, on every linear layer of the blocks rather than on query and value alone
    (Dettmers et al. 2023, "QLoRA", figure 2); on convolutional networks the pointwise and ordinary convolutions.
    """
    from peft import LoraConfig, get_peft_model

    rank = arguments.lora_r or 8
    settings = {
        "lora_r": rank,
        "lora_alpha": arguments.lora_alpha or 2 * rank,
        "lora_dropout": arguments.lora_dropout or 0.0,
    }
    rates = _resolved_rates(model, arguments)
    pooling = backbones.pooling_layer(model)  # kept with the adapter, since the checkpoint has no such layer
    config = LoraConfig(
        r=rank,
        lora_alpha=settings["lora_alpha"],
        lora_dropout=settings["lora_dropout"],
        target_modules=_in_last_blocks(model, _lora_targets(model, arguments.lora_target_modules), arguments),
        modules_to_save=[*backbones.structure(model).trained_head, *pooling],
    )
    adapted = get_peft_model(model, config)
    # The name that the person gave; PEFT would write the path of a folder of this machine.
    adapted.peft_config["default"].base_model_name_or_path = public_name(arguments.model_name_or_path)
    names = [name for name, parameter in adapted.named_parameters() if parameter.requires_grad]
    names = [name for name in names if not backbones.is_below_any(backbones.plain_name(adapted, name), pooling)]
    stage = replace(
        _stage(arguments, "adapters", names, rates.adapters, rates.head), batch_norm="frozen", layer_decay=1.0
    )
    settings |= {"learning_rate": rates.adapters, "head_learning_rate": rates.head}
    return Plan(adapted, (stage,), settings)


def _lora_targets(model: nn.Module, wanted: list[str] | None) -> list[str]:
    """Full names of the layers to adapt: chosen from the structure, or those that the person's names end."""
    if not wanted:
        return backbones.lora_targets(model)
    kinds = (nn.Linear, nn.Conv2d)
    layers = [
        name for name, module in model.named_modules() if isinstance(module, kinds) or "Conv1D" in str(type(module))
    ]
    whole = (*backbones.structure(model).trained_head, *backbones.pooling_layer(model))
    layers = [name for name in layers if not backbones.is_below_any(name, whole)]
    found = [name for name in layers if any(f".{name}".endswith(f".{entry}") for entry in wanted)]
    for entry in wanted:
        if not any(f".{name}".endswith(f".{entry}") for name in layers):
            last_parts = sorted({name.rpartition(".")[2] for name in layers})
            hint = did_you_mean(entry, last_parts) or f" There are: {', '.join(last_parts[:12])}."
            raise UsageError(f"--lora_target_modules: no layer outside the head is named {entry!r}.{hint}")
    return found


def _in_last_blocks(model: nn.Module, targets: list[str], arguments: TransferArguments) -> list[str]:
    """Those of `targets` in the last `--lora_blocks` blocks."""
    count = arguments.lora_blocks
    if count is None:
        return targets
    blocks = backbones.structure(model).blocks
    if not 1 <= count <= len(blocks):
        raise UsageError(f"--lora_blocks must lie between 1 and the model's {len(blocks)} blocks, not {count}.")
    last = [prefix for block in blocks[-count:] for prefix in block]
    chosen = [name for name in targets if backbones.is_below_any(name, last)]
    if not chosen:
        raise UsageError(f"--lora_blocks {count}: the last blocks have no layer that LoRA can adapt. Take more blocks.")
    return chosen


def _all_parameters(model: nn.Module) -> list[str]:
    return [name for name, _ in model.named_parameters()]


METHODS: dict[str, Callable[[Any, Any], Plan]] = {
    "full": full,
    "frozen": frozen,
    "partial": partial,
    "lora": lora,
    "lp_ft": lp_ft,
}

#: the method arguments that each method uses; any other that is given is an error
METHOD_ARGUMENTS = {
    "full": {"learning_rate", "head_learning_rate", "layer_decay", "batch_norm"},
    "frozen": {"learning_rate", "head_learning_rate"},
    "partial": {"learning_rate", "head_learning_rate", "layer_decay", "batch_norm", "unfreeze_blocks"},
    "lora": {
        "learning_rate", "head_learning_rate", "lora_r", "lora_alpha", "lora_dropout", "lora_target_modules",
        "lora_blocks",
    },
    "lp_ft": {"learning_rate", "head_learning_rate", "layer_decay", "batch_norm", "head_epochs"},
}  # fmt: skip


def build_plan(model: nn.Module, arguments: TransferArguments) -> Plan:
    """The plan of `--method` for a model.

    Raises:
        UsageError: no such method, or an argument that it does not use.
    """
    check_method(arguments)
    method = find_method(arguments.method)
    try:
        inspect.signature(method).bind(model, arguments)
    except TypeError as error:
        raise UsageError(f"--method {arguments.method}: the function must take (model, arguments): {error}.") from error
    plan = method(model, arguments)
    if not isinstance(plan, Plan):
        raise UsageError(f"--method {arguments.method}: the function must return a Plan, not {type(plan).__name__}.")
    names = {name for name, _ in plan.model.named_parameters()}
    for stage in plan.stages:
        unknown = sorted(stage.trainable - names)
        if unknown:
            near = did_you_mean(unknown[0], names)
            raise UsageError(f"--method {arguments.method}: the model has no parameter {unknown[0]!r}.{near}")
    return plan


def check_method(arguments: TransferArguments) -> None:
    """Refuse an unknown method, and arguments that it would ignore; needs no model.

    Raises:
        UsageError: as said.
    """
    find_method(arguments.method)
    if arguments.method not in METHODS:
        return  # a method of the person's own may use any argument
    known = set().union(*METHOD_ARGUMENTS.values())
    for name in sorted(known - METHOD_ARGUMENTS[arguments.method]):
        if name in arguments.given and getattr(arguments, name) is not None:
            users = ", ".join(method for method, used in METHOD_ARGUMENTS.items() if name in used)
            raise UsageError(f"--method {arguments.method} does not use --{name} (used by: {users}). Leave it out.")


def find_method(name: str) -> Callable[[Any, Any], Plan]:
    """A built-in method by name, or the function named by `module:function` or `file.py:function`."""
    if name in METHODS:
        return METHODS[name]
    if ":" in name:
        return import_function(name, "--method")
    raise UsageError(
        f"Unknown method {name!r}.{did_you_mean(name, METHODS)} There are: {', '.join(METHODS)}, and module:function."
    )


def import_function(name: str, flag: str) -> Callable[..., Any]:
    """The function named by `package.module:function` or `path/file.py:function`.

    Raises:
        UsageError: no such file, module or function.
    """
    where, _, attribute = name.rpartition(":")
    module = load_file(Path(where), flag) if where.endswith(".py") else _load_module(where, flag)
    function = getattr(module, attribute, None)
    if not callable(function):
        own = [key for key, value in vars(module).items() if inspect.isroutine(value)]
        raise UsageError(f"{flag} {name}: {where} has no function {attribute!r}.{did_you_mean(attribute, own)}")
    return function


def load_file(path: Path, what: str) -> Any:
    """The module in a Python file.

    Raises:
        UsageError: there is no such file, or it is not Python.
    """
    if not path.is_file():
        siblings = [str(sibling) for sibling in path.parent.glob("*.py")] if path.parent.is_dir() else []
        raise UsageError(f"{what}: there is no file {str(path)!r}.{did_you_mean(str(path), siblings)}")
    path = path.resolve()
    name = path.stem
    loaded = sys.modules.get(name)
    if loaded is not None and getattr(loaded, "__file__", None) == str(path):
        return loaded  # a recipe whose method stands in the same file: one module, or its classes would exist twice
    if loaded is not None:  # my datasets.py must not take the place of the package
        name = f"{name}_{zlib.crc32(str(path).encode())}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look up the types of their fields there
    try:
        spec.loader.exec_module(module)
    except SyntaxError as error:
        del sys.modules[name]
        raise UsageError(f"{what}: {error.filename}, line {error.lineno}: {error.msg}.") from error
    return module


def _load_module(name: str, flag: str) -> Any:
    if not name or name.startswith("."):
        raise UsageError(f"{flag}: name the function as package.module:function or file.py:function.")
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name and not name.startswith(error.name):
            raise
        raise UsageError(f"{flag}: there is no module {name!r} on the Python path.") from error
