"""Adapters merged into the model they adapt; and what a run holds where that cannot be done."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import load_file, save_file

from hftl.pretrained import never_pack

#: in a run folder: the adapter, and beside one that is not merged the model that it belongs to, with the trained head
ADAPTER, BASE = "adapter", "base"
#: parts of a name that PEFT puts into it, for the module that computes
_ADDED = re.compile(r"\.(base_layer|modules_to_save\.default)(?=\.)")
_MERGE_ERRORS = (NotImplementedError, ValueError, RuntimeError, TypeError, AttributeError)


def save_adapter(model: Any, folder: Path) -> None:
    """Save the adapter with its head, and the configuration, which has the labels, beside it.

    Parameters of another shape than the checkpoint's (position embeddings at another image size) go with it: PEFT loads
    what it does not know by its name.
    """
    model.save_pretrained(folder, save_embedding_layers=False)  # else PEFT looks for the base on the Hub
    (folder / "README.md").unlink(missing_ok=True)  # PEFT's empty form, with a path of this machine
    base = model.get_base_model()
    base.config.save_pretrained(folder)
    changed = getattr(base.config, "resized_parameters", [])
    if changed:
        path = folder / "adapter_model.safetensors"
        resized = {f"base_model.model.{name}": base.get_parameter(name).detach().cpu() for name in changed}
        save_file(load_file(path) | resized, path, metadata={"format": "pt"})


def merge(model: Any) -> str | None:
    """Merge the adapters in place; `model.get_base_model()` is then an ordinary model again.

    Returns:
        None, or why it cannot be done; the model is then of no use.
    """
    put_back_trained_parts(model)
    try:
        model.merge_and_unload()
    except _MERGE_ERRORS as error:
        return " ".join(str(error).split())[:200].rstrip(".")
    return None


def put_back_trained_parts(model: Any) -> None:
    """The trained head in the place of its wrapper.

    PEFT itself fails to put back a part that is no single layer (BERT's pooler, with most types), or leaves it wrapped
    (LN tuning, whose saved model then has a fresh head).
    """
    from peft.utils.other import ModulesToSaveWrapper

    for name, module in list(model.named_modules()):
        if isinstance(module, ModulesToSaveWrapper):
            parent, _, key = name.rpartition(".")
            setattr(model.get_submodule(parent), key, module.modules_to_save["default"])


def base_state(model: Any) -> dict[str, torch.Tensor]:
    """The state of the model without its adapters, with the trained head, by the plain names; copies on the CPU."""
    inner = model.get_base_model()
    layers = [name for name, module in inner.named_modules() if isinstance(module, BaseTunerLayer)]
    return {
        _ADDED.sub("", key): value.detach().cpu().clone()
        for key, value in inner.state_dict().items()
        if ".original_module." not in key
        and all(key.startswith(f"{layer}.base_layer.") or not key.startswith(f"{layer}.") for layer in layers)
    }


def load_unmerged(auto_class: Any, folder: Path, trust_remote_code: bool = False) -> Any:
    """The model of a run whose adapter is not merged: a `PeftModel`."""
    from peft import PeftModel

    if not (folder / ADAPTER / "adapter_model.safetensors").is_file():  # peft would look for a pickle
        raise OSError(f"there is no adapter_model.safetensors in {folder / ADAPTER}")
    base = auto_class.from_pretrained(
        folder / BASE, dtype=torch.float32, use_safetensors=True, trust_remote_code=trust_remote_code
    )
    never_pack(base)
    return PeftModel.from_pretrained(base, folder / ADAPTER)
