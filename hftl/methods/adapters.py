"""Methods that train small tensors beside the model's own, by PEFT."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from dataclasses import replace
from statistics import median
from typing import Any, NamedTuple

from torch import nn
from transformers.pytorch_utils import Conv1D

from hftl import backbones
from hftl.arguments import TransferArguments
from hftl.errors import UsageError, did_you_mean
from hftl.inert import public_name
from hftl.methods.plan import RATE_OF_FEW, Plan, make_stage, resolved_rates


class AdapterType(NamedTuple):
    """What a type of PEFT adapts.

    Attributes:
        layers: kinds of layers that it takes, as `_kind` names them.
        rate: its learning rate as a multiple of LoRA's.
    """

    layers: frozenset[str]
    rate: float = 1.0


_LINEAR = frozenset({"linear"})
_LINEAR_OR_CONV1D = _LINEAR | {"Conv1D"}
_CONVOLUTIONS = frozenset({"convolution", "pointwise convolution"})

#: The types of PEFT that give the same logits after saving and loading, and (all but Lily, which has no such thing)
#: after merging: tests/test_adapters.py. Beside each its paper.
#:
#: Rates: those other than LoRA's have the best of a few on one draw of TREC with 16 a class (MiniLM; AdaMSS as far as
#: LoRA's moves a layer, on made-up data); docs/methods/adapters.md has what all score. For PVeRA and UniLoRA none that
#: was tried, up to 200 times LoRA's, was of use; the rest has LoRA's own, mostly with no other tried.
TYPES = {
    "ADALORA": AdapterType(_LINEAR_OR_CONV1D | _CONVOLUTIONS, rate=30.0),  # Zhang et al. 2023
    "ADAMSS": AdapterType(_LINEAR, rate=3.0),  # Zheng et al. 2025
    "BEFT": AdapterType(_LINEAR, rate=10.0),  # arXiv:2509.15974
    "BOFT": AdapterType(_LINEAR | _CONVOLUTIONS),  # Liu et al. 2024
    "C3A": AdapterType(_LINEAR, rate=300.0),  # Chen et al. 2025
    "DEFT": AdapterType(_LINEAR_OR_CONV1D),  # NeurIPS 2025
    "DELORA": AdapterType(_LINEAR),  # Bini et al. 2025
    "FOURIERFT": AdapterType(_LINEAR_OR_CONV1D, rate=30.0),  # Gao et al. 2024
    "FROD": AdapterType(_LINEAR_OR_CONV1D),  # doi:10.1609/aaai.v40i31.39813
    "GLORA": AdapterType(_LINEAR),  # Chavan et al. 2023
    "GRALORA": AdapterType(_LINEAR_OR_CONV1D),  # Jung et al. 2025
    "HIRA": AdapterType(_LINEAR_OR_CONV1D | _CONVOLUTIONS, rate=3.0),  # Huang et al. 2025
    "HRA": AdapterType(_LINEAR | _CONVOLUTIONS),  # Yuan et al. 2024
    "IA3": AdapterType(_LINEAR_OR_CONV1D | _CONVOLUTIONS | {"grouped convolution"}, rate=10.0),  # Liu et al. 2022
    "LILY": AdapterType(_LINEAR),  # arXiv:2407.09946
    "LN_TUNING": AdapterType(frozenset({"normalisation"}), rate=RATE_OF_FEW),  # Zhao et al. 2024
    "LOHA": AdapterType(_LINEAR | _CONVOLUTIONS | {"grouped convolution"}, rate=3.0),  # Hyeon-Woo et al. 2022
    "LOKR": AdapterType(_LINEAR | _CONVOLUTIONS | {"grouped convolution"}, rate=3.0),  # Yeh et al. 2024
    "LORA": AdapterType(_LINEAR_OR_CONV1D | _CONVOLUTIONS | {"3-d convolution"}),  # Hu et al. 2022
    "MISS": AdapterType(_LINEAR, rate=0.3),  # arXiv:2409.15371
    # Of other convolutions it forgets the padding.
    "OFT": AdapterType(_LINEAR | {"pointwise convolution"}),  # Qiu et al. 2023
    "OSF": AdapterType(_LINEAR),  # Nayak et al. 2025
    "PEANUT": AdapterType(_LINEAR),  # arXiv:2410.01870
    "PSOFT": AdapterType(_LINEAR),  # ICLR 2026
    "PVERA": AdapterType(_LINEAR_OR_CONV1D),  # arXiv:2512.07703
    "RANDLORA": AdapterType(_LINEAR_OR_CONV1D, rate=0.3),  # Albert et al. 2025
    "ROAD": AdapterType(_LINEAR, rate=10.0),  # Liao and Monz 2024
    "SHIRA": AdapterType(_LINEAR),  # Bhardwaj et al. 2024
    "SUPERTUNING": AdapterType(_LINEAR, rate=10.0),  # arXiv:2607.09287
    "TINYLORA": AdapterType(_LINEAR_OR_CONV1D, rate=5.0),  # arXiv:2602.04118
    "UNILORA": AdapterType(_LINEAR_OR_CONV1D),  # arXiv:2506.00799
    "VBLORA": AdapterType(_LINEAR_OR_CONV1D, rate=10.0),  # Li et al. 2024
    "VERA": AdapterType(_LINEAR_OR_CONV1D, rate=30.0),  # Kopiczko et al. 2024
    "WAVEFT": AdapterType(_LINEAR_OR_CONV1D),  # Bilican et al. 2025
}

#: the other types of PEFT, and why they are not offered
LEFT_OUT = {
    **dict.fromkeys(
        (
            "ADAPTION_PROMPT", "CARTRIDGE", "CPT", "MULTITASK_PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING",
            "PROMPT_TUNING",
        ),
        "it trains what stands before a text and adapts no layer",
    ),
    "POLY": "it shares adapters between several tasks",
    "SHADOW": "it is for the decoders of language models",
    "TRAINABLE_TOKENS": "it trains the embeddings of chosen tokens and adapts no layer",
    "XLORA": "it mixes adapters that were trained before",
}  # fmt: skip

#: Method names beside `lora` and `peft`: kinds of LoRA by their usual names, and every other type in lower case.
SHORT_NAMES: dict[str, tuple[str, dict[str, Any]]] = {
    "dora": ("LORA", {"use_dora": True}),  # Liu et al. 2024
    "rslora": ("LORA", {"use_rslora": True}),  # Kalajdzievski 2023
    "pissa": ("LORA", {"init_lora_weights": "pissa"}),  # Meng et al. 2024
    **{name.lower(): (name, {}) for name in TYPES if name != "LORA"},
}

#: the types with layers of their own for weights in 8 and 4 bits (IA3 too, but PEFT does not take it off again)
QUANTISED = ("ADALORA", "HIRA", "LORA", "PVERA", "RANDLORA", "ROAD")

#: LoRA's settings that have a flag, by their names in PEFT
_LORA_FLAGS = {
    "r": "lora_r",
    "lora_alpha": "lora_alpha",
    "lora_dropout": "lora_dropout",
    "use_rslora": "use_rslora",
    "use_dora": "use_dora",
    "init_lora_weights": "init_lora_weights",
}
#: starts that PEFT computes from the weights of linear layers alone
_FROM_WEIGHTS = ("pissa", "olora", "orthogonal")
#: what hftl sets in the configuration of PEFT → what to use instead
_OURS = {
    "target_modules": "--lora_target_modules",
    "exclude_modules": "--lora_layers_pattern",
    "layers_pattern": "--lora_layers_pattern",
    "layers_to_transform": "--lora_blocks or --lora_layers_pattern",
    "modules_to_save": "nothing: the head is always saved",
    "peft_type": "--peft_type",
    "task_type": "another task of hftl",
    "total_step": "--max_steps or --num_train_epochs",
}
#: what PEFT raises for sizes and settings that do not go together
_PEFT_ERRORS = (ValueError, TypeError, RuntimeError, KeyError, AttributeError, ImportError, ArithmeticError)


def adapter_type(arguments: TransferArguments) -> str:
    """The type of PEFT that `--method` and `--peft_type` name, as in `TYPES`.

    Raises:
        UsageError: there is no such type, or none is given.
    """
    if arguments.method in SHORT_NAMES:
        return SHORT_NAMES[arguments.method][0]
    if arguments.peft_type is None and arguments.method == "peft":
        raise UsageError(f"--method peft needs --peft_type: one of {', '.join(TYPES)}.")
    if arguments.peft_type is None:
        return "LORA"  # --method lora, or a method of the person's own that calls it
    name = arguments.peft_type.upper()
    if name not in TYPES:
        why = f": {LEFT_OUT[name]}." if name in LEFT_OUT else f".{did_you_mean(name, TYPES)}"
        raise UsageError(
            f"--peft_type {arguments.peft_type!r} is not a type that hftl trains{why} There are: {', '.join(TYPES)}."
        )
    return name


def add_adapters(model: nn.Module, arguments: TransferArguments) -> Plan:
    """Adapters of one type of PEFT on the backbone's layers, and the head, train (LoRA, Hu et al. 2022; `TYPES`).

    They are on every layer of the blocks that the type can take, rather than on query and value alone (Dettmers et al.
    2023, "QLoRA", figure 2). With `--lora_plus_ratio` LoRA's second matrices learn faster (Hayou et al. 2024).
    BatchNorm keeps its statistics: the adapter's file would not hold others.

    Raises:
        UsageError: the type is unknown or finds no layer that it can take, or its settings do not fit.
    """
    name = adapter_type(arguments)
    given = peft_settings(arguments)
    targets = _targets(model, name, arguments)
    settings = _sizes_that_fit(name, [model.get_submodule(target) for target in targets]) | given
    if name == "LORA":
        settings.setdefault("lora_alpha", 2 * settings["r"])
    rates = resolved_rates(model, arguments, "adapters", TYPES[name].rate)
    pooling = backbones.pooling_layer(model)  # kept with the adapter, since the checkpoint has no such layer
    whole = [*backbones.structure(model).trained_head, *pooling]
    ours: dict[str, Any] = {"target_modules": targets, "modules_to_save": whole}
    if name == "ADALORA":
        ours["total_step"] = 10**9  # PEFT wants one; the callback knows it when training begins
    adapted = _adapted(model, name, settings | ours)
    # The name that the person gave; PEFT would write the path of a folder of this machine.
    adapted.peft_config["default"].base_model_name_or_path = public_name(arguments.model_name_or_path)
    names = [key for key, parameter in adapted.named_parameters() if parameter.requires_grad]
    names = [key for key in names if not backbones.is_below_any(backbones.plain_name(adapted, key), pooling)]
    stage = replace(
        make_stage(arguments, "adapters", names, rates.adapters, rates.head),
        batch_norm="frozen",
        factors={key: arguments.lora_plus_ratio for key in names if arguments.lora_plus_ratio and ".lora_B." in key},
    )
    resolved = _resolved_settings(name, settings, arguments)
    resolved |= {"learning_rate": rates.adapters, "head_learning_rate": rates.head}
    return Plan(adapted, (stage,), resolved, _callbacks(name, adapted, settings))


def peft_settings(arguments: TransferArguments) -> dict[str, Any]:
    """The settings that were asked for, by their names in PEFT: those of `--peft_config`, and those with a flag.

    Raises:
        UsageError: `--peft_config` is no JSON object, or has a key that the type does not have, or that hftl sets, or
            a rank that cannot be.
    """
    from peft import PEFT_TYPE_TO_CONFIG_MAPPING

    name = adapter_type(arguments)
    if name not in PEFT_TYPE_TO_CONFIG_MAPPING:
        raise UsageError(f"--peft_type {name}: the installed peft does not have it. Try: pip install --upgrade peft")
    few_bits = arguments.load_in_8bit or arguments.load_in_4bit
    if few_bits and name not in QUANTISED:
        raise UsageError(
            f"--method {arguments.method}: {name} does not go with weights in 8 or 4 bits. These do: "
            f"{', '.join(QUANTISED)}."
        )
    settings = _parsed(arguments.peft_config)
    keys = {item.name for item in dataclasses.fields(PEFT_TYPE_TO_CONFIG_MAPPING[name]) if item.init}
    implied = SHORT_NAMES.get(arguments.method, (name, {}))[1]
    flags = {key: getattr(arguments, flag) for key, flag in _LORA_FLAGS.items()} if name == "LORA" else {}
    flags = {key: value for key, value in flags.items() if value is not None and value is not False}
    wanted = implied | settings | flags
    if arguments.load_in_8bit and wanted.get("use_dora") and arguments.device.type == "cpu":
        # peft 0.21 and bitsandbytes 0.50: the scales of the weights are lost in the first step.
        raise UsageError("--load_in_8bit does not go with DoRA on a CPU: take --load_in_4bit.")
    if few_bits and wanted.get("init_lora_weights") in _FROM_WEIGHTS:
        source = "--peft_config" if "init_lora_weights" in settings else f"--method {arguments.method}"
        source = "--init_lora_weights" if "init_lora_weights" in flags else source
        raise UsageError(f"{source}: this start is computed from the weights, which 8 or 4 bits do not hold.")
    for key in settings:
        if key in _OURS:
            raise UsageError(f"--peft_config: {key!r} is set by hftl; use {_OURS[key]}.")
        if key not in keys:
            raise UsageError(f"--peft_config: {name} has no setting {key!r}.{did_you_mean(key, keys)}")
        if settings[key] is None:
            raise UsageError(f"--peft_config: {key!r} is null. Leave it out.")
        if key in flags:
            raise UsageError(f"--peft_config: {key!r} is also given by --{_LORA_FLAGS[key]}. Leave one out.")
        if key in implied:
            raise UsageError(f"--peft_config: {key!r} is what --method {arguments.method} stands for. Leave it out.")
    _check_ranks(name, settings)
    return wanted


def _check_ranks(name: str, settings: dict[str, Any]) -> None:
    """Refuse ranks by which PEFT fails in the midst of a training, or trains nothing.

    Raises:
        UsageError: as said.
    """
    for key in {"r", "init_r", "target_r"} & set(settings) if name != "OFT" else ():  # whose r may be 0
        if not isinstance(settings[key], int) or settings[key] < 1:
            raise UsageError(f"--peft_config: {key!r} must be a whole number of 1 or more, not {settings[key]!r}.")
    if name == "ADALORA":
        from peft import AdaLoraConfig

        start, end = settings.get("init_r", AdaLoraConfig.init_r), settings.get("target_r", AdaLoraConfig.target_r)
        if end >= start:
            raise UsageError(f"--peft_config: the 'init_r' of AdaLoRA ({start}) must be above its 'target_r' ({end}).")


def _no_number(name: str) -> None:
    """Refuse NaN and Infinity, which Python reads and JSON has not."""
    raise ValueError(f"{name} is no number of JSON")


def _parsed(text: str | None) -> dict[str, Any]:
    try:
        settings = json.loads(text or "{}", parse_constant=_no_number)
    except ValueError as error:
        raise UsageError(f"--peft_config is no JSON ({error}): write it as '{{\"r\": 4}}'.") from error
    if not isinstance(settings, dict):
        raise UsageError(f"--peft_config must be a JSON object such as '{{\"r\": 4}}', not {text}.")
    return settings


def _adapted(model: nn.Module, name: str, settings: dict[str, Any]) -> Any:
    """The model with adapters around its layers."""
    from peft import PEFT_TYPE_TO_CONFIG_MAPPING, get_peft_model

    try:
        return get_peft_model(model, PEFT_TYPE_TO_CONFIG_MAPPING[name](**settings))
    except _PEFT_ERRORS as error:
        raise UsageError(f"--peft_config: {name} cannot be built so: {' '.join(str(error).split())[:300]}") from error


def _resolved_settings(name: str, settings: dict[str, Any], arguments: TransferArguments) -> dict[str, Any]:
    """The settings as arguments, for the recipe: those with a flag by it, the others in `--peft_config`."""
    settings = dict(settings)
    for key in SHORT_NAMES.get(arguments.method, (name, {}))[1]:
        settings.pop(key)
    given = _parsed(arguments.peft_config)
    flags = {flag: settings.pop(key) for key, flag in _LORA_FLAGS.items() if key in settings and key not in given}
    if name != "LORA" or arguments.method == "peft":  # which have no such flags
        settings, flags = settings | {key: flags[flag] for key, flag in _LORA_FLAGS.items() if flag in flags}, {}
    return flags | {"peft_config": json.dumps(settings) if settings else None}


# --- which layers ----------------------------------------------------------------------------------------------------


def _kind(module: nn.Module) -> str | None:
    if isinstance(module, nn.Conv2d):
        if module.groups > 1:
            return "grouped convolution"
        return "pointwise convolution" if module.kernel_size == (1, 1) else "convolution"
    if isinstance(module, nn.Conv3d):
        # PEFT merges no kernel of 1 x 1 x 1: it takes it for one of two dimensions.
        kind = "pointwise 3-d convolution" if module.kernel_size[:2] == (1, 1) else "3-d convolution"
        return f"grouped {kind}" if module.groups > 1 else kind
    if isinstance(module, Conv1D):
        return "Conv1D"
    return "linear" if isinstance(module, nn.Linear) else None


def _candidates(model: nn.Module) -> dict[str, str]:
    """Names of the layers that adapters could go to → their kinds."""
    layers = {name: str(_kind(model.get_submodule(name))) for name in backbones.adaptable_layers(model)}
    return layers | dict.fromkeys(backbones.adaptable_normalisation(model), "normalisation")


def takes_lora(model: nn.Module) -> bool:
    """Whether LoRA has a layer to go beside."""
    return not TYPES["LORA"].layers.isdisjoint(_candidates(model).values())


def _targets(model: nn.Module, name: str, arguments: TransferArguments) -> list[str]:
    """Full names of the layers to adapt: chosen from the structure, or those that the person's names end.

    Raises:
        UsageError: the type takes none of them, with the types that do.
    """
    layers = _named_by_person(model, arguments.lora_target_modules) or _candidates(model)
    layers = _matching(_in_last_blocks(model, layers, arguments), arguments.lora_layers_pattern)
    taken = TYPES[name].layers
    if peft_settings(arguments).get("init_lora_weights") in _FROM_WEIGHTS:
        taken = _LINEAR
    found = [layer for layer, kind in layers.items() if kind in taken]
    if not found:
        kinds = sorted(set(layers.values()))
        fitting = [other for other, adapter in TYPES.items() if adapter.layers & set(kinds)]
        advice = f"Types that can: {', '.join(fitting)}" if fitting else "No type can: use partial, full or frozen"
        raise UsageError(
            f"--method {arguments.method}: {name} takes layers of the kinds {', '.join(sorted(taken))}, and "
            f"{type(model).__name__} has to offer: {', '.join(kinds) or 'none'}. {advice}."
        )
    return found


def _named_by_person(model: nn.Module, wanted: list[str] | None) -> dict[str, str]:
    """The layers outside the head whose names end with one of `wanted`, with their kinds."""
    if not wanted:
        return {}
    layers = {name: kind for name, module in model.named_modules() if (kind := _kind(module))}
    layers |= dict.fromkeys(backbones.adaptable_normalisation(model), "normalisation")
    whole = (*backbones.structure(model).trained_head, *backbones.pooling_layer(model))
    layers = {name: kind for name, kind in layers.items() if not backbones.is_below_any(name, whole)}
    for entry in wanted:
        if not any(f".{name}".endswith(f".{entry}") for name in layers):
            last_parts = sorted({name.rpartition(".")[2] for name in layers})
            hint = did_you_mean(entry, last_parts) or f" There are: {', '.join(last_parts[:12])}."
            raise UsageError(f"--lora_target_modules: no layer outside the head is named {entry!r}.{hint}")
    return {name: kind for name, kind in layers.items() if any(f".{name}".endswith(f".{entry}") for entry in wanted)}


def _in_last_blocks(model: nn.Module, layers: dict[str, str], arguments: TransferArguments) -> dict[str, str]:
    """Those of `layers` in the last `--lora_blocks` blocks."""
    count = arguments.lora_blocks
    if count is None:
        return layers
    blocks = backbones.structure(model).blocks
    if not 1 <= count <= len(blocks):
        raise UsageError(f"--lora_blocks must lie between 1 and the model's {len(blocks)} blocks, not {count}.")
    last = [prefix for block in blocks[-count:] for prefix in block]
    chosen = {name: kind for name, kind in layers.items() if backbones.is_below_any(name, last)}
    if not chosen:
        raise UsageError(f"--lora_blocks {count}: the last blocks have no layer that can be adapted. Take more blocks.")
    return chosen


def _matching(layers: dict[str, str], pattern: str | None) -> dict[str, str]:
    """Those of `layers` whose full names a regular expression is found in."""
    if pattern is None:
        return layers
    try:
        chosen = {name: kind for name, kind in layers.items() if re.search(pattern, name)}
    except re.error as error:
        raise UsageError(f"--lora_layers_pattern {pattern!r} is no regular expression: {error}.") from error
    if not chosen:
        examples = ", ".join(list(layers)[:3])
        raise UsageError(f"--lora_layers_pattern {pattern!r} is found in no layer's name; the first are {examples}.")
    return chosen


# --- sizes -----------------------------------------------------------------------------------------------------------


def _sizes_that_fit(name: str, layers: list[nn.Module]) -> dict[str, Any]:
    """PEFT's own sizes, made for layers of 768 and more, or the largest below that these layers can take.

    LoRA: rank 8 and a scale of twice the rank (Hu et al. 2022). Types whose adapter is not zero at the start by default
    (C3A, FourierFT) start there, since a fresh head has enough to learn: with FourierFT's scale of 150 a layer of width
    384 would start with weights of the size of the trained ones. DeLoRA's change is as long as its boundary from the
    first step on, and moves an output by about boundary / √inputs of its own length: PEFT's 15 is for 4,096 inputs, and
    leaves MiniLM at chance.
    """
    if name == "LORA":
        return {"r": 8, "lora_dropout": 0.0}
    if name in ("IA3", "LN_TUNING"):
        return {"feedforward_modules": []} if name == "IA3" else {}  # each layer's output is scaled
    sides = [_sides(layer) for layer in layers]
    common, smallest = math.gcd(*(side for pair in sides for side in pair)), min(min(pair) for pair in sides)
    entries = min(one * other for one, other in sides)
    ranks = min(one * other // (one + other) for one, other in sides)
    return {
        "BOFT": {"boft_block_size": _divisor(common, 4)},
        "C3A": {"block_size": _divisor(common, 256), "init_weights": True},
        "DELORA": {"delora_lambda": min(15, math.ceil(15 * math.sqrt(median(inputs for _, inputs in sides) / 4096)))},
        "FOURIERFT": {"n_frequency": min(1000, entries), "init_weights": True},
        "MISS": {"r": min(64, smallest)},
        "OFT": {"oft_block_size": _divisor(common, 32)},
        "PSOFT": {"r": min(32, smallest)},
        "ROAD": {"group_size": _divisor(common, 64)},
        "SHIRA": {"r": min(32, ranks), "random_seed": 0},  # else a resumed run would choose other entries
        "VBLORA": {"vector_length": _divisor(common, 256)},
        "WAVEFT": {"n_frequency": min(2592, entries)},
    }.get(name, {})


def _sides(layer: Any) -> tuple[int, int]:
    """Outputs, and inputs to each; the weight of a quantised layer has another shape."""
    if isinstance(layer, nn.Linear):
        return layer.out_features, layer.in_features
    return layer.weight.shape[0], layer.weight[0].numel()


def _divisor(number: int, most: int) -> int:
    """The largest divisor of `number` that is not above `most`."""
    return next(divisor for divisor in range(min(number, most), 0, -1) if number % divisor == 0)


def _callbacks(name: str, model: Any, settings: dict[str, Any]) -> tuple[Any, ...]:
    if name != "ADALORA":
        return ()
    from hftl.methods.adalora import RankSchedule

    return (RankSchedule(model, settings),)
