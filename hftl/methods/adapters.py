"""Methods that train small matrices beside the model's own, by PEFT."""

from __future__ import annotations

from dataclasses import replace

from torch import nn

from hftl import backbones
from hftl.arguments import TransferArguments
from hftl.errors import UsageError, did_you_mean
from hftl.methods.plan import Plan, make_stage, resolved_rates
from hftl.pretrained import public_name


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
    rates = resolved_rates(model, arguments)
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
    stage = replace(make_stage(arguments, "adapters", names, rates.adapters, rates.head), batch_norm="frozen")
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
