"""Pretrained models: found, given a fresh head, checked, and saved so that plain libraries load them."""

from __future__ import annotations

import contextlib
import copy
import importlib.util
import json
import os
import pickle
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import constants
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModelForAudioClassification,
    AutoModelForImageClassification,
    AutoModelForMultipleChoice,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoModelForVideoClassification,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.utils import SAFE_WEIGHTS_NAME

from hftl import backbones
from hftl.arguments import TransferArguments
from hftl.errors import UsageError, did_you_mean, load_reason
from hftl.folder import read_json, say
from hftl.hub import check_hub
from hftl.weights import LEAST_LOADED

# Else transformers would ask a service to convert a model that has pickles alone, and propose that to its authors.
os.environ.setdefault("DISABLE_SAFETENSORS_CONVERSION", "1")
#: what the libraries raise for files that are not there, torn, or of another kind
LOAD_ERRORS = (
    OSError, ValueError, KeyError, RuntimeError, ImportError, TypeError, SafetensorError, pickle.UnpicklingError,
)  # fmt: skip


def check_model_name(name: str | None, trust_remote_code: bool = False) -> None:
    """Refuse a name that cannot be a model, before any data is read; code of others runs here, where that is allowed.

    Raises:
        UsageError: as `find_model`.
    """
    if trust_remote_code and name is not None and name.startswith("torchhub:"):
        from hftl.origins import torchhub_model

        torchhub_model(name.partition(":")[2], trusted=True)
    if name is None or not name.startswith("random:"):
        find_model(name)


def find_model(name: str | None) -> str:
    """What transformers can load for the name that a person gave: a folder, or a Hub id.

    Raises:
        UsageError: no name, or a folder that is not there or holds no model.
    """
    if not name:
        raise UsageError(
            "--model is missing: name a Hub id, a local folder, builtin:NAME, torchvision:NAME, "
            "torchhub:OWNER/REPO:ENTRY, pytorchvideo:NAME, keras:NAME or random:ARCH."
        )
    if name.startswith("builtin:"):
        from hftl.builtin import builtin_model

        return str(builtin_model(name.partition(":")[2]))
    if name.startswith(("torchvision:", "torchhub:", "pytorchvideo:", "keras:")):
        from hftl import origins

        library, _, model = name.partition(":")
        return getattr(origins, f"{library}_model")(model)
    path = Path(os.path.expanduser(name))
    if os.path.isdir(path):
        if (path / "adapter_config.json").is_file():
            raise UsageError(
                f"--model {name!r} is an adapter: name the folder of the run, which holds the merged model."
            )
        if (path / "base" / "config.json").is_file() and not (path / "model.safetensors").is_file():
            raise UsageError(
                f"--model {name!r} is a run with an adapter that is not merged. Name {str(path / 'base')!r} to start "
                "from the model that it goes on, without the adapter."
            )
        if not (path / "config.json").is_file():
            raise UsageError(f"--model {name!r}: the folder holds no model (there is no config.json in it).")
        return str(path)
    looks_local = name.startswith((".", "/", "~")) or name.count("/") > 1 or os.path.exists(path)
    if looks_local:
        siblings = [str(path.parent / entry.name) for entry in path.parent.glob("*") if entry.is_dir()]
        raise UsageError(f"--model {name!r}: there is no such folder.{did_you_mean(str(path), siblings)}")
    check_hub()
    return name


@contextlib.contextmanager
def explained_load(name: str, auto_class: type) -> Iterator[None]:
    """Turn what the libraries raise for a model that they cannot load into one clear error."""
    try:
        yield
    except UsageError:
        raise
    except LOAD_ERRORS as error:
        reason = load_reason(error)
        if (
            "Unrecognized configuration class" in reason
            or "does not appear to have a file named preprocessor" in reason
        ):
            raise UsageError(
                f"--model {name!r} is not a model for {_kind(auto_class)[0]} ({auto_class.__name__} does not take it): "
                f"choose another.{tasks_of(name)}"
            ) from error
        local = Path(os.path.expanduser(name))
        if "file named model.safetensors" in reason and (not local.is_dir() or any(local.glob("*.bin"))):
            raise UsageError(
                f"--model {name!r} has no model.safetensors. Pickled weights could run code when they are read: if you "
                "trust where they come from, --allow_pickle reads them, as tensors alone."
            ) from error
        if "trust_remote_code" in reason:
            raise UsageError(
                f"--model {name!r} needs Python code that comes with it: read that code, and --trust_remote_code runs "
                "it."
            ) from error
        if not os.path.isdir(os.path.expanduser(name)) and (constants.HF_HUB_OFFLINE or "connect" in reason.lower()):
            raise UsageError(
                f"--model {name!r} is neither a local folder nor in the cache, and the Hub cannot be reached: check "
                "the name and the connection, or use a folder, builtin:NAME or random:ARCH."
                f"{did_you_mean(name, map(str, Path(name).parent.glob('*')))}"
            ) from error
        raise UsageError(f"--model {name!r} cannot be loaded: {reason[:400]}") from error


def tasks_of(name: str) -> str:
    """A sentence with the tasks that a checkpoint fits, for messages; nothing where its architecture is not known."""
    settings, _ = PreTrainedConfig.get_config_dict(find_model(name))
    kind = settings.get("model_type")
    config_class = CONFIG_MAPPING[kind] if kind in CONFIG_MAPPING else None  # noqa: SIM401 - its `get` knows none
    fitting = {
        "image-classification": AutoModelForImageClassification,
        "image-similarity": AutoModelForImageClassification,
        "audio-classification, as pictures of sounds": AutoModelForImageClassification,
        "audio-classification": AutoModelForAudioClassification,
        "video-classification": AutoModelForVideoClassification,
        "text-classification": AutoModelForSequenceClassification,
        "token-classification": AutoModelForTokenClassification,
        "multiple-choice": AutoModelForMultipleChoice,
    }
    found = [task for task, auto_class in fitting.items() if config_class in auto_class._model_mapping]
    return f" It is for {'; '.join(found)}." if found else ""


def _kind(auto_class: Any) -> tuple[str, str]:
    """What the models of an Auto class are for, and an architecture among them."""
    kinds = {"Image": ("images", "vit"), "Audio": ("recordings", "wav2vec2"), "Video": ("videos", "videomae")}
    kinds |= {"Choice": ("texts with choices", "bert"), "Token": ("words", "bert")}
    return next((kinds[word] for word in kinds if word in auto_class.__name__), ("texts", "bert"))


def hub_options(arguments: TransferArguments, source: str | Path) -> dict[str, Any]:
    """Which revision of a checkpoint to load, and whether its code may run."""
    revision = {} if os.path.isdir(source) else {"revision": arguments.model_revision}
    return {**revision, "trust_remote_code": arguments.trust_remote_code}


def model_kind(arguments: TransferArguments, source: str | Path) -> str:
    """The `model_type` of a checkpoint; to make its configuration takes 0.06 s for a model of timm."""
    revision = {} if os.path.isdir(source) else {"revision": arguments.model_revision}
    return PreTrainedConfig.get_config_dict(source, **revision)[0].get("model_type", "")


def weight_options(arguments: TransferArguments) -> dict[str, Any]:
    """Which files weights are read from: a pickle may run code, so that only a flag allows it, and tensors alone."""
    return {"use_safetensors": not arguments.allow_pickle or None, "weights_only": True}


#: within `read_once`: the models, by what read them and their checkpoint
_READ: ContextVar[dict[tuple[Any, str], PreTrainedModel] | None] = ContextVar("read", default=None)


@contextlib.contextmanager
def read_once() -> Iterator[None]:
    """Read a checkpoint only the first time; all get copies, and have to have the same flags."""
    token = _READ.set({})
    try:
        yield
    finally:
        _READ.reset(token)


def load_model(
    auto_class: Any, source: str, label_names: Sequence[str], arguments: TransferArguments
) -> PreTrainedModel:
    """The ordinary model of a checkpoint, in float32, with a fresh head for the labels.

    Args:
        auto_class: `AutoModelForImageClassification`, `AutoModelForSequenceClassification`, …
        source: what `find_model` gave.
        label_names: name of each class id; it goes into the configuration.
        arguments: for the revision, `keep_head` and `trust_remote_code`.

    Raises:
        UsageError: the model cannot be loaded, is of another kind, or its weights do not fill the architecture.
    """
    read = _READ.get()
    if read is None:
        return _load_model(auto_class, source, label_names, arguments)
    if (auto_class, source) not in read:
        read[auto_class, source] = _load_model(auto_class, source, label_names, arguments)
    return copy.deepcopy(read[auto_class, source])


def _load_model(
    auto_class: Any, source: str, label_names: Sequence[str], arguments: TransferArguments
) -> PreTrainedModel:
    name = str(arguments.model_name_or_path)
    labels = dict(enumerate(label_names))
    options = hub_options(arguments, source)
    if arguments.trust_remote_code:
        say(f"--trust_remote_code: Python code that comes with {name!r} may run on this machine")
    with explained_load(name, auto_class):
        if arguments.keep_head:
            _check_kept_labels(AutoConfig.from_pretrained(source, **options), label_names, name)
        model, report = auto_class.from_pretrained(
            source,
            num_labels=len(labels),  # without it id2label would silently be dropped for timm models
            id2label=labels,
            label2id={label: index for index, label in labels.items()},
            ignore_mismatched_sizes=True,
            output_loading_info=True,
            dtype=torch.float32,  # the checkpoint's own type could be bf16, whose updates get lost
            **_quantisation(auto_class, source, arguments),
            **weight_options(arguments),
            **options,
        )
    _check_loaded(model, report, name)
    _check_few_bits(model, arguments)
    never_pack(model)
    if not arguments.keep_head:
        reset_head(model)
    if model.config.model_type == "timm_wrapper":
        model.config.label_names = list(label_names)  # else the names of the checkpoint are saved again
    return model


def check_quantisation(arguments: TransferArguments) -> None:
    """Refuse 8 and 4 bits together, for a model that is not pretrained, or without bitsandbytes.

    Raises:
        UsageError: as said.
    """
    flag = few_bits_flag(arguments)
    if flag is None:
        return
    if arguments.load_in_8bit and arguments.load_in_4bit:
        raise UsageError("--load_in_8bit and --load_in_4bit exclude each other: leave one out.")
    if arguments.finds_learning_rate or arguments.auto_find_batch_size:
        other = "--learning_rate auto" if arguments.finds_learning_rate else "--auto_find_batch_size"
        raise UsageError(f"{flag}: {other} cannot put weights of so few bits back. Leave one of them out.")
    if importlib.util.find_spec("bitsandbytes") is None:
        raise UsageError(f"{flag} needs bitsandbytes, which is not installed: pip install 'hftl[quantized]'")


def few_bits_flag(arguments: TransferArguments) -> str | None:
    """`--load_in_8bit` or `--load_in_4bit`, where one is given."""
    return next((f"--{name}" for name in ("load_in_8bit", "load_in_4bit") if getattr(arguments, name)), None)


def never_pack(model: nn.Module) -> None:
    """Have 4-bit weights stay as they are when a CPU predicts.

    bitsandbytes 0.50 packs them for AVX512, which rounds their scales, and no step can be trained behind it.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False  # type: ignore[assignment]


def _check_few_bits(model: nn.Module, arguments: TransferArguments) -> None:
    """Refuse 8 and 4 bits where nothing is held in them (only linear layers are), and where the checkpoint has others.

    Raises:
        UsageError: as said.
    """
    flag = few_bits_flag(arguments)
    if backbones.is_quantised(model):
        held = next(
            (f"--load_in_{bits}bit" for bits in (8, 4) if getattr(model, f"is_loaded_in_{bits}bit", False)), None
        )
        if held is None or held != flag:
            advice = f"--method lora {held}, say; or name" if held else "name"
            raise UsageError(
                f"--model {str(arguments.model_name_or_path)!r} holds its weights in few bits, on which adapters alone "
                f"train: {advice} the checkpoint that it was made from."
            )
    if flag and not any(weights.dtype in (torch.int8, torch.uint8) for weights in model.parameters()):
        raise UsageError(
            f"{flag}: {type(model).__name__} has no linear layer outside of its head, and no "
            "other weights are held in so few bits. Leave it out."
        )


def _quantisation(auto_class: Any, source: str, arguments: TransferArguments) -> dict[str, Any]:
    """What `from_pretrained` is told for a base in 8 or 4 bits; what trains as a whole is left in float32.

    Four bits as in QLoRA (Dettmers et al. 2023): normal float, its scales quantised again.
    """
    if few_bits_flag(arguments) is None:
        return {}
    from transformers import BitsAndBytesConfig

    with torch.device("meta"):
        config = AutoConfig.from_pretrained(source, **hub_options(arguments, source))
        empty = auto_class.from_config(config, trust_remote_code=arguments.trust_remote_code)
    whole = [*backbones.structure(empty).trained_head, *backbones.pooling_layer(empty)]
    if arguments.load_in_8bit:
        return {"quantization_config": BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=whole)}
    compute = torch.bfloat16 if arguments.bf16 else torch.float32
    return {
        "quantization_config": BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=compute,
            llm_int8_skip_modules=whole,
        )
    }


def _check_kept_labels(config: Any, label_names: Sequence[str], name: str) -> None:
    kept = [str(label) for _, label in sorted(config.id2label.items())]
    if config.problem_type == "regression" and len(kept) == len(label_names) == 1:
        return  # a number has no name of its own
    if len(kept) != len(label_names):
        raise UsageError(
            f"--keep_head: {name!r} has {len(kept)} outputs ({', '.join(kept[:8])}), and {len(label_names)} are wanted "
            f"({', '.join(label_names[:8])}). Leave it out for a fresh head."
        )
    if kept != list(label_names):
        raise UsageError(
            f"--keep_head: the classes of {name!r} ({', '.join(kept[:8])}) are not those of the data "
            f"({', '.join(label_names[:8])}). Leave it out for a fresh head."
        )


def _check_loaded(model: PreTrainedModel, report: dict[str, Any], name: str) -> None:
    """Refuse a checkpoint whose weights are for another architecture: transformers only warns of it."""
    head = backbones.structure(model).trained_head
    missing = set(report["missing_keys"]) | {entry[0] for entry in report["mismatched_keys"]}
    tensors = [key for key, _ in model.named_parameters() if not backbones.is_below_any(key, head)]
    loaded = [key for key in tensors if key not in missing]
    if len(loaded) < LEAST_LOADED * len(tensors):
        first = next(key for key in tensors if key in missing)
        raise UsageError(
            f"--model {name!r}: its weights fill {len(loaded)} of the {len(tensors)} tensors of the backbone (first "
            f"missing: {first}). The files are for another architecture, or name their tensors differently."
        )


def reset_head(model: PreTrainedModel) -> None:
    """Initialise the fresh output layers anew: with the same number of classes transformers keeps the trained ones."""
    for prefix in backbones.structure(model).head:
        for module in model.get_submodule(prefix).modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=0.02)  # as BERT and ViT initialise theirs
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif hasattr(module, "reset_parameters"):
                module.reset_parameters()


def settings_of(config: Any) -> dict[str, Any]:
    """A configuration as a dictionary, for another one to hold, without the place that it was loaded from."""
    return {name: value for name, value in config.to_dict().items() if name != "_name_or_path"}


def save_model(
    model: PreTrainedModel, folder: Path, state: dict[str, torch.Tensor] | None = None, written: Path | None = None
) -> None:
    """Save a model, or another state of it, so that transformers, and timm for its own models, load it.

    Where `written` has the model's very weights, as `save_pretrained` wrote them, their file gets a second name.
    """
    if written is not None and _has_weights_of(model, written) and _linked(written / SAFE_WEIGHTS_NAME, folder):
        model.config.architectures = [type(model).__name__]  # as `save_pretrained` does, which a resumed run has not
        model.config.dtype = str(model.dtype).removeprefix("torch.")
        model.config.save_pretrained(folder)
    else:
        # transformers 5.24 cannot undo how it reads a checkpoint of 4 bits, and need not.
        model.save_pretrained(folder, state_dict=state, save_original_format=not backbones.is_quantised(model))
    if model.config.model_type == "timm_wrapper":
        path = folder / "config.json"
        config = read_json(path)
        # timm fails on null here, and on a number of classes given twice.
        config["model_args"] = {
            key: value for key, value in (config.get("model_args") or {}).items() if key != "num_classes"
        }
        path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _has_weights_of(model: PreTrainedModel, folder: Path) -> bool:
    """Whether a folder has the weights of a model in one file; not of one of which more is saved (code, generation)."""
    path = folder / SAFE_WEIGHTS_NAME
    if not path.is_file() or model.is_remote_code() or model.can_generate():
        return False
    state = model.state_dict()
    with safe_open(path, framework="pt") as content:
        names = content.keys()
        return all(name in state and torch.equal(content.get_tensor(name), state[name].cpu()) for name in names)


def _linked(path: Path, folder: Path) -> bool:
    """Whether a file could be given a second name, in another folder; not every file system can."""
    folder.mkdir(exist_ok=True)
    try:
        os.link(path, folder / path.name)
    except OSError:
        return False
    return True


def random_timm_folder(architecture: str, image_size: int | None) -> str:
    """A timm architecture with random weights as an ordinary checkpoint folder (removed when the process ends).

    Going through a folder makes it the same as a pretrained one: one path to load, and keys that timm reads.

    Raises:
        UsageError: timm has no such architecture.
    """
    import atexit

    import timm
    from timm.models import save_for_hf

    if not timm.is_model(architecture):
        raise UsageError(
            f"--model random:{architecture}: no such architecture.{did_you_mean(architecture, timm.list_models())}"
        )
    sizes = {"img_size": image_size} if image_size and timm.get_pretrained_cfg(architecture).fixed_input_size else {}
    model = timm.create_model(architecture, pretrained=False, **sizes)
    folder = tempfile.mkdtemp(prefix="hftl-random-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    save_for_hf(model, folder, model_args=dict(sizes) or None, safe_serialization=True)
    path = Path(folder) / "config.json"
    config = read_json(path)
    config["model_args"] = sizes
    path.write_text(json.dumps(config), encoding="utf-8")
    return folder


#: what makes a transformers architecture small; each configuration takes those that it has
_SMALL = {
    "hidden_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 512, "n_embd": 128,
    "n_layer": 4, "n_head": 4, "dim": 128, "n_layers": 4, "n_heads": 4, "hidden_dim": 512, "embedding_size": 128,
    "num_key_value_heads": 2,
}  # fmt: skip


def random_config(model_type: str, auto_class: Any, label_names: list[str], **settings: Any) -> Any:
    """A small configuration of a transformers architecture, with the labels.

    Raises:
        UsageError: transformers has no such architecture, or not for `auto_class`.
    """
    if model_type not in CONFIG_MAPPING:
        import timm

        if timm.is_model(model_type):
            raise UsageError(f"--model random:{model_type} is a model of images: name one of texts, as random:bert.")
        raise UsageError(
            f"--model random:{model_type}: no such architecture.{did_you_mean(model_type, CONFIG_MAPPING)}"
        )
    config_class = CONFIG_MAPPING[model_type]
    default = config_class()
    small = {key: value for key, value in _SMALL.items() if isinstance(getattr(default, key, None), int)}
    labels = dict(enumerate(label_names))
    settings |= {"id2label": labels, "label2id": {name: index for index, name in labels.items()}}
    try:
        config = config_class(**small, **settings)
    except Exception as error:  # each architecture checks its own sizes with errors of its own
        raise UsageError(
            f"--model random:{model_type} cannot be made small: choose another, such as random:bert."
        ) from error
    if config_class not in auto_class._model_mapping:
        data, other = _kind(auto_class)
        raise UsageError(
            f"--model random:{model_type} is not a model for {data}: choose another, such as random:{other}."
        )
    return config
