"""Methods of transfer: functions from a pretrained model to a plan of stages."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from torch import nn

from hftl import backbones, penalties
from hftl.arguments import TransferArguments, is_pretrained
from hftl.errors import UsageError, did_you_mean
from hftl.loading import import_function
from hftl.methods.adapters import SHORT_NAMES, add_adapters, peft_settings
from hftl.methods.parts import frozen, full, lp_ft, partial, setfit, zero_shot
from hftl.methods.plan import Plan, Stage
from hftl.methods.selected import bitfit, gradual, norm, surgical
from hftl.pretrained import check_quantisation

__all__ = ["METHODS", "METHOD_ARGUMENTS", "Plan", "Stage", "build_plan", "check_method", "find_method"]

METHODS: dict[str, Callable[[Any, Any], Plan]] = {
    "full": full,
    "frozen": frozen,
    "partial": partial,
    "lora": add_adapters,
    "peft": add_adapters,
    "lp_ft": lp_ft,
    "gradual": gradual,
    "surgical": surgical,
    "bitfit": bitfit,
    "norm": norm,
    "setfit": setfit,
    "zero_shot": zero_shot,
    "auto": frozen,  # the first rung of its ladder, see hftl.auto
}

_PENALTY = {"penalty", "penalty_weight"}
_ADAPTER_ARGUMENTS = {
    "learning_rate", "head_learning_rate", "layer_decay", "peft_config", "lora_target_modules", "lora_blocks",
    "lora_layers_pattern", "load_in_8bit", "load_in_4bit", *_PENALTY,
}  # fmt: skip
_LORA_ARGUMENTS = _ADAPTER_ARGUMENTS | {"lora_r", "lora_alpha", "lora_dropout", "lora_plus_ratio"}

#: the method arguments that each method uses; any other that is given is an error
METHOD_ARGUMENTS = {
    "full": {"learning_rate", "head_learning_rate", "layer_decay", "batch_norm", "reinit_blocks", *_PENALTY},
    "frozen": {"learning_rate", "head_learning_rate", "batch_norm", "head", "feature_layers", "feature_pooling"},
    "partial": {
        "learning_rate", "head_learning_rate", "layer_decay", "batch_norm", "unfreeze_blocks", "reinit_blocks",
        *_PENALTY,
    },
    "lora": _LORA_ARGUMENTS | {"use_rslora", "use_dora", "init_lora_weights"},
    "peft": _ADAPTER_ARGUMENTS | {"peft_type"},
    "lp_ft": {
        "learning_rate", "head_learning_rate", "layer_decay", "batch_norm", "head_epochs", "reinit_blocks", *_PENALTY,
    },
    "gradual": {
        "learning_rate", "head_learning_rate", "layer_decay", "batch_norm", "head_epochs", "unfreeze_blocks",
        "reinit_blocks", *_PENALTY,
    },
    "surgical": {"learning_rate", "head_learning_rate", "batch_norm", "head_epochs", *_PENALTY},
    "bitfit": {"learning_rate", "head_learning_rate", "layer_decay", "batch_norm", *_PENALTY},
    "norm": {"learning_rate", "head_learning_rate", "layer_decay", "batch_norm", *_PENALTY},
    "setfit": {"learning_rate", "layer_decay", "head", "feature_layers", "feature_pooling"},
    "zero_shot": set(),
    "auto": {"time_budget", "preset"},
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
    reference = penalties.reference_model(model, arguments)  # before the method changes the model
    fixed = backbones.feature_encoder(model) if getattr(arguments, "freeze_feature_encoder", False) else frozenset()
    plan = method(model, arguments)
    if not isinstance(plan, Plan):
        raise UsageError(f"--method {arguments.method}: the function must return a Plan, not {type(plan).__name__}.")
    plan = replace(plan, stages=tuple(replace(stage, trainable=stage.trainable - fixed) for stage in plan.stages))
    names = {name for name, _ in plan.model.named_parameters()}
    if not plan.stages or not all(stage.trainable or not stage.epochs for stage in plan.stages):
        raise UsageError(f"--method {arguments.method}: a plan needs stages, and each of them parameters that train.")
    for stage in plan.stages:
        unknown = sorted(stage.trainable - names)
        if unknown:
            near = did_you_mean(unknown[0], names)
            raise UsageError(f"--method {arguments.method}: the model has no parameter {unknown[0]!r}.{near}")
    if arguments.batch_norm in ("adapt", "train") and not backbones.batch_norms(plan.model):
        raise UsageError(
            f"--batch_norm {arguments.batch_norm}: {type(model).__name__} has no BatchNorm layer. Leave it out."
        )
    return penalties.with_penalty(plan, arguments, reference)


def check_method(arguments: TransferArguments) -> None:
    """Refuse an unknown method, and arguments that it would ignore; needs no model.

    Raises:
        UsageError: as said.
    """
    method = find_method(arguments.method)
    penalties.check(arguments)
    _check_pretrained(arguments)
    if arguments.finds_learning_rate and arguments.repeats > 1:
        raise UsageError(
            "--learning_rate auto would find another rate for each of --repeats: find it once with hftl lr-find."
        )
    used_here = arguments_of(arguments.method)
    if used_here is None:
        return  # a method of the person's own may use any argument
    if arguments.method == "auto" and arguments.finds_learning_rate:
        raise UsageError("--method auto chooses its rates itself: leave out --learning_rate.")
    if arguments.method == "setfit":
        _check_pairs(arguments)
    if arguments.method == "zero_shot" and not hasattr(arguments, "prompts"):
        raise UsageError(
            "--method zero_shot is for image-classification with a model that reads texts too (CLIP, SigLIP), and for "
            "image-similarity: take another method."
        )
    if arguments.method == "zero_shot" and arguments.finds_learning_rate:
        raise UsageError("--method zero_shot trains nothing: leave out --learning_rate.")
    known = set().union(*METHOD_ARGUMENTS.values())
    for name in sorted(known - used_here):
        if name in arguments.given and getattr(arguments, name) not in (None, False):
            kinds = [kind for kind, (peft_type, _) in SHORT_NAMES.items() if peft_type == "LORA"]
            others = [method for method, used in METHOD_ARGUMENTS.items() if name in used]
            users = ", ".join([*others, *(kinds if name in _LORA_ARGUMENTS - _ADAPTER_ARGUMENTS else ())])
            raise UsageError(f"--method {arguments.method} does not use --{name} (used by: {users}). Leave it out.")
    if arguments.method == "frozen" and arguments.batch_norm == "train":
        raise UsageError("--batch_norm train: --method frozen trains the head alone. Take adapt, or leave it out.")
    if method is add_adapters:
        if arguments.penalty in penalties.NEED_REFERENCE:
            raise UsageError(
                f"--penalty {arguments.penalty} does not go with --method {arguments.method}: take bss or r_drop, or "
                "leave it out."
            )
        peft_settings(arguments)
        check_quantisation(arguments)


def _check_pairs(arguments: TransferArguments) -> None:
    """Refuse settings by which a training on pairs of rows would not be what it says.

    Raises:
        UsageError: as said.
    """
    mixes = [name for name in ("mixup", "cutmix") if getattr(arguments, name, None)]
    unfit = {
        "--learning_rate auto": (arguments.finds_learning_rate, "a range test needs a loss of answers"),
        "--per_device_train_batch_size 1": (arguments.per_device_train_batch_size == 1, "pairs are those of a batch"),
        "--auto_find_batch_size": (arguments.auto_find_batch_size, "pairs are those of a batch"),
        f"--{'/'.join(mixes)}": (bool(mixes), "a mixed row has no class"),
    }
    for flag, (given, why) in unfit.items():
        if given:
            raise UsageError(f"--method setfit: {why}. Leave out {flag}.")


def arguments_of(method: str) -> set[str] | None:
    """What a built-in method uses; a short name for adapters what LoRA or `peft` use."""
    if method in SHORT_NAMES:
        return _LORA_ARGUMENTS if SHORT_NAMES[method][0] == "LORA" else _ADAPTER_ARGUMENTS
    return METHOD_ARGUMENTS.get(method)


def _check_pretrained(arguments: TransferArguments) -> None:
    """Refuse what starts from pretrained weights or statistics where there are none.

    Raises:
        UsageError: as said.
    """
    wished = {
        "--reinit_blocks": arguments.reinit_blocks is not None,
        "--batch_norm adapt": arguments.batch_norm == "adapt",
        f"--penalty {arguments.penalty}": arguments.penalty in penalties.NEED_REFERENCE,
        "--wise_ft": arguments.wise_ft,
        "--keep_head": arguments.keep_head,
        "--method zero_shot": arguments.method == "zero_shot",
        "--load_in_8bit": arguments.load_in_8bit,
        "--load_in_4bit": arguments.load_in_4bit,
    }
    for flag, given in wished.items():
        if given and not is_pretrained(arguments):
            raise UsageError(
                f"{flag} needs a pretrained model, and {arguments.model_name_or_path} is none. Leave it out."
            )


def find_method(name: str) -> Callable[[Any, Any], Plan]:
    """A built-in method by name, or the function named by `module:function` or `file.py:function`."""
    if name in METHODS:
        return METHODS[name]
    if name in SHORT_NAMES:
        return add_adapters
    if ":" in name:
        return import_function(name, "--method")
    raise UsageError(
        f"Unknown method {name!r}.{did_you_mean(name, [*METHODS, *SHORT_NAMES])} There are: {', '.join(METHODS)}; "
        f"kinds of adapters: {', '.join(SHORT_NAMES)}; and module:function."
    )
