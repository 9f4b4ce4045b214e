"""What hftl knows of any classification model: its head, its blocks in depth order, its normalisation layers.

Functions over an ordinary model, not a wrapper around it. Everything is derived from the model: for timm from
`group_matcher()` and `get_classifier()`, for transformers from `base_model_prefix` and the module lists that hold the
repeated layers, for any other model from the order of its children. There is no table of architecture names.

One block is one layer: a transformer layer, a residual (inverted residual, ConvNeXt, Inception, dense) block. So the
same architecture has the same number of blocks whether it comes from timm or from transformers, and "the last k blocks"
means about the same share of any of them. Every parameter belongs to the head or to exactly one block.
"""

from __future__ import annotations

import re
import weakref
from collections.abc import Hashable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from hftl.errors import UsageError

# Path segments that PEFT puts between a module and the parameters it had before.
_PEFT_SEGMENTS = re.compile(r"\.(base_layer|original_module|modules_to_save\.[^.]+)(?=\.|$)")

# Tables and tokens of more than one dimension that are no weights: decaying them pulls them to zero for no gain.
_NO_DECAY_NAME = re.compile(
    r"pos_emb|position_emb|positional_emb|pos_table|(^|\.)wpe$|rel_pos|relative_pos|relative_att|rel_emb"
    r"|(cls|class|mask|dist|distillation|reg|register)_?(token|embed|embedding)s?$"
)


@dataclass(frozen=True)
class Structure:
    """The parts of a classification model, as prefixes of its parameter names.

    A prefix is a module's full name or a parameter's, never a part of a segment: `layers.1` does not cover `layers.10`.

    Attributes:
        head: the freshly initialised output layer or layers (`("timm_model.head", "timm_model.head_dist")`).
        blocks: the backbone in depth order from the input; block 0 is the stem or the embeddings.
        pooler: pretrained linear layers between the last block and the head (BERT's and ALBERT's `pooler`). They only
            serve the head, and RoBERTa has the same layer in its head: they train with it.
    """

    head: tuple[str, ...]
    blocks: tuple[tuple[str, ...], ...]
    pooler: tuple[str, ...] = ()

    @property
    def trained_head(self) -> tuple[str, ...]:
        """What trains when the head trains: the fresh output layers and the pooler below them."""
        return (*self.pooler, *self.head)


def structure(model: nn.Module) -> Structure:
    """The head and the blocks of `model`.

    For a PEFT model the names are those of the model it wraps, as they were before PEFT.

    It is found anew only where modules or parameters are others than before: a training asks for it some twenty times,
    which for a network of a few hundred layers would take a second.

    Raises:
        UsageError: no output layer is found, or nothing else.
    """
    plain = without_adapters(model)
    parts = (
        tuple((name, type(module)) for name, module in plain.named_modules()),
        tuple((name, weight.shape) for name, weight in plain.named_parameters()),
    )
    before, found = _FOUND.get(plain, (None, None))
    if found is None or before != parts:
        found = _structure(plain)
        _FOUND[plain] = parts, found
    return found


#: what a model was made of when its structure was found, and the structure
_FOUND: weakref.WeakKeyDictionary[nn.Module, tuple[Hashable, Structure]] = weakref.WeakKeyDictionary()


def _structure(plain: nn.Module) -> Structure:
    if towers := _towers(plain):
        head = tuple(name for name, child in plain.named_children() if child not in towers.values())
        return Structure(head, _beside_each_other(towers))
    backbone, head = _backbone_and_head(plain)
    pooler = _pooler(plain, backbone)
    outside = (*pooler, *head)
    weights = {name: weight for name, weight in _parameters(plain).items() if not is_below_any(name, outside)}
    if not weights:
        raise UsageError(f"{type(plain).__name__} has nothing but its output layer: there is no backbone to adapt.")
    return Structure(head, _shortest_prefixes(_group(plain, backbone, weights), outside), pooler)


def output_layers(model: nn.Module, outputs: int) -> list[nn.Linear]:
    """The linear layers of the head that give so many outputs: one, or those whose mean is the answer (DeiT's)."""
    plain, head = without_adapters(model), structure(model).head
    return [
        module
        for name, module in plain.named_modules()
        # Beside a head that trains PEFT keeps the one that was there.
        if isinstance(module, nn.Linear) and is_below_any(name, head) and "original_module" not in name.split(".")
        if module.out_features == outputs
    ]


def head_input(model: nn.Module, name: str, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """What the output layer of that name reads, shape (rows, features)."""
    layer: Any = model.get_submodule(name)
    layer.forward = lambda features: features
    try:
        with torch.no_grad():
            return model(**batch)["logits"]
    finally:
        del layer.forward


def parameter_blocks(model: nn.Module) -> dict[str, int]:
    """Every name of `model.named_parameters()` with the index of its block; the head's is the number of blocks.

    An adapter's parameters belong to the block of the module that they adapt. What an adapter shares between all of its
    modules (a vector bank, a prompt) has no depth and counts with the last block.

    Raises:
        UsageError: as `structure`.
    """
    parts = structure(model)
    index_of = {prefix: index for index, block in enumerate(parts.blocks) for prefix in block}
    index_of |= dict.fromkeys(parts.trained_head, len(parts.blocks))
    last = len(parts.blocks) - 1
    return {
        name: next((index_of[path] for path in _paths(plain_name(model, name)) if path in index_of), last)
        for name, _ in model.named_parameters()
    }


def head_parameters(model: nn.Module) -> list[str]:
    """The names of the parameters that train with the head, the pooler's and PEFT's copies of them included.

    Raises:
        UsageError: as `structure`.
    """
    blocks = parameter_blocks(model)
    head = max(blocks.values())
    return [name for name, index in blocks.items() if index == head]


def starts_from_texts(model: nn.Module) -> bool:
    """Whether the head of a dual encoder is made of the texts of its classes: it knows them before any training."""
    return bool(getattr(getattr(without_adapters(model), "config", None), "prompts", None))


@torch.no_grad()
def scale_output_layer(model: nn.Module, factor: float) -> None:
    """Multiply weight and bias of an output layer that is one linear layer, and with them the logits."""
    layer = model.get_submodule(structure(model).head[0])
    assert isinstance(layer, nn.Linear)
    for parameter in layer.parameters():
        parameter.mul_(factor)


def feature_encoder(model: nn.Module) -> frozenset[str]:
    """The parameters of the convolutions that transformers' models of waveforms leave fixed in fine-tuning."""
    freeze = getattr(model, "freeze_feature_encoder", None)
    if freeze is None:
        return frozenset()
    before = {name for name, weight in model.named_parameters() if weight.requires_grad}
    freeze()  # it also tells the encoder not to ask for gradients of its input
    fixed = {name: weight for name, weight in model.named_parameters() if name in before and not weight.requires_grad}
    for weight in fixed.values():
        weight.requires_grad_()
    return frozenset(fixed)


def normalisation_modules(model: nn.Module) -> list[str]:
    """The names of all normalisation layers: torch's own, their subclasses, and classes that say Norm in their name."""
    return [name for name, module in model.named_modules() if _is_normalisation(module)]


def batch_norms(model: nn.Module) -> list[nn.modules.batchnorm._BatchNorm]:
    """All BatchNorm layers that keep running statistics."""
    layers = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    return [layer for layer in layers if layer.running_mean is not None]


def is_random(module: nn.Module) -> bool:
    """Whether a module is dropout or stochastic depth that does anything."""
    rate = getattr(module, "p", None) or getattr(module, "drop_prob", None) or 0.0
    return "drop" in type(module).__name__.lower() and rate > 0.0


def no_decay_parameters(model: nn.Module) -> set[str]:
    """The names of the parameters that weight decay should leave alone.

    Those with at most one dimension (biases, norms, layer scale); position embeddings, class, mask, register and
    distillation tokens, tables of relative positions; and what a timm model's own `no_weight_decay()` lists.
    """
    plain = without_adapters(model)
    found = map(_backbone, _towers(plain).values() or [plain])
    listed = set().union(*(_timm_no_decay(_name_of(plain, one), one) for one in found if _is_timm(one)))
    names = ((name, plain_name(model, name), parameter) for name, parameter in model.named_parameters())
    return {
        name
        for name, plain_one, parameter in names
        if parameter.ndim <= 1 or plain_one in listed or _is_table(plain_one)
    }


def adaptable_layers(model: nn.Module) -> list[str]:
    """The full names of the layers of a model without adapters that an adapter can go beside.

    All linear layers (GPT-2's Conv1D too) and all convolutions of the blocks after the first. Not the head, which is
    trained whole; not the stem or embeddings (of a model with more than one block); and no layer that is computed by
    other code than its own class, where an adapter would be ignored, or merged into the wrong weights.

    Raises:
        UsageError: as `structure`.
    """
    parts = structure(model)
    adapted = parts.blocks[1:] or parts.blocks
    inside = {prefix for block in adapted for prefix in block}
    outside = pooling_layer(model)
    return [
        name
        for name, module in model.named_modules()
        if _can_be_adapted(model, name, module)
        and any(path in inside for path in _paths(name))
        and not is_below_any(name, outside)
    ]


def adaptable_normalisation(model: nn.Module) -> list[str]:
    """The full names of the normalisation layers with weights outside the head, of a model without adapters.

    Raises:
        UsageError: as `structure`.
    """
    outside = (*structure(model).trained_head, *pooling_layer(model))
    return [
        name
        for name in normalisation_modules(model)
        if _has_parameters(model.get_submodule(name)) and not is_below_any(name, outside)
    ]


def pooling_layer(model: nn.Module) -> tuple[str, ...]:
    """The name of the layer that `hftl.pooling` put behind the others (of a model without adapters), if any."""
    return _pooling_layer(model, _backbone(model))


def is_convolutional(model: nn.Module) -> bool:
    """Whether most blocks after the first hold a 2-d or 3-d convolution: ResNet, R3D and ConvNeXt yes, ViT no.

    Blocks are counted and not layers or weights: by those a ConvNeXt, whose pointwise convolutions are linear layers,
    would be none. The stem does not count, since a ViT's patch embedding is a convolution; nor do 3-d convolutions of
    single channels, by which MViT pools its tokens.

    Raises:
        UsageError: as `structure`.
    """
    parts = structure(model)
    counted = parts.blocks[1:] or parts.blocks
    convolutions = {
        path
        for name, module in without_adapters(model).named_modules()
        if isinstance(module, nn.Conv2d) or (isinstance(module, nn.Conv3d) and module.groups == 1)
        for path in _paths(_strip(name))
    }
    return sum(any(prefix in convolutions for prefix in block) for block in counted) > len(counted) / 2


def to_channels_last(model: nn.Module) -> nn.Module:
    """Lay a convolutional model's weights out with the channels last, which is faster; another model stays as it is.

    Layers with an adapter keep the ordinary layout: several types (DoRA, BOFT, HRA) take views of a kernel as a matrix.
    The convolution's output is in channels_last all the same, since its input is.

    Returns:
        The model itself.

    Raises:
        UsageError: as `structure`.
    """
    if is_convolutional(model):
        for weights in (*model.parameters(), *model.buffers()):
            layout = {4: torch.channels_last, 5: torch.channels_last_3d}.get(weights.ndim)
            if layout is not None:
                weights.data = weights.data.to(memory_format=layout)
        for module in model.modules():
            if isinstance(module, BaseTunerLayer):
                module.to(memory_format=torch.contiguous_format)
    return model


def plain_name(model: nn.Module, name: str) -> str:
    """`name`, a parameter of `model`, as the model names it before PEFT wraps it (adapter names keep their own end)."""
    if not isinstance(model, PeftModel):
        return _strip(name)
    # Prompt tuning puts nothing between itself and the model; all other methods put a tuner there.
    prefix = "base_model." if model.active_peft_config.is_prompt_learning else "base_model.model."
    return _strip(name.removeprefix(prefix))


# --- names -----------------------------------------------------------------------------------------------------------


def _strip(name: str) -> str:
    return _PEFT_SEGMENTS.sub("", name)


def _join(prefix: str, name: str) -> str:
    return f"{prefix}.{name}" if prefix else name


def _paths(name: str) -> Iterator[str]:
    """`a.b.c` → `a`, `a.b`, `a.b.c`."""
    segments = name.split(".")
    return (".".join(segments[:count]) for count in range(1, len(segments) + 1))


def _name_of(model: nn.Module, wanted: nn.Module) -> str:
    return next(_strip(name) for name, module in model.named_modules() if module is wanted)


def _has_parameters(module: nn.Module) -> bool:
    return next(module.parameters(), None) is not None


def _has_children(module: nn.Module) -> bool:
    return next(module.children(), None) is not None


def is_below_any(name: str, prefixes: Iterable[str]) -> bool:
    """Whether a parameter or module is one of `prefixes`, or inside one."""
    return any(_is_below(name, prefix) for prefix in prefixes)


def _is_below(name: str, prefix: str) -> bool:
    return not prefix or name == prefix or name.startswith(prefix + ".")


def _shortest_prefixes(blocks: list[list[str]], outside: tuple[str, ...]) -> tuple[tuple[str, ...], ...]:
    """For each block of parameter names the shortest prefixes that cover it, and nothing of another or `outside`."""
    block_of = {name: index for index, block in enumerate(blocks) for name in block}
    below: dict[str, set[int]] = {}
    for name, index in [*block_of.items(), *((name, -1) for name in outside)]:
        for path in _paths(name):
            below.setdefault(path, set()).add(index)
    prefixes: list[dict[str, None]] = [{} for _ in blocks]
    for name, index in block_of.items():
        prefixes[index][next(path for path in _paths(name) if len(below[path]) == 1)] = None
    return tuple(tuple(block) for block in prefixes)


# --- the model's parts -----------------------------------------------------------------------------------------------


def inputs_of(batch: Mapping[str, Any], device: torch.device | None = None) -> dict[str, Any]:
    """What `forward` takes of a batch: all but the labels; on a device, if one is named."""
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    return inputs if device is None else {name: value.to(device) for name, value in inputs.items()}


def without_adapters(model: nn.Module) -> nn.Module:
    """The model that PEFT wraps, or the model itself."""
    return model.get_base_model() if isinstance(model, PeftModel) else model


def is_quantised(model: Any) -> bool:
    """Whether the frozen weights are held in 8 or 4 bits: what is merged into them would be rounded."""
    return bool(getattr(without_adapters(model), "is_quantized", False))


def _is_timm(module: nn.Module) -> bool:
    return callable(getattr(module, "group_matcher", None)) and callable(getattr(module, "get_classifier", None))


def _backbone(model: nn.Module) -> nn.Module:
    """The pretrained body: what the class names, or its one child that is a transformers model, or the model itself.

    timm's body includes the head. CLIP's and Whisper's classification classes name a base model that they do not have.
    """
    named = getattr(model, getattr(model, "base_model_prefix", ""), None)
    if isinstance(named, nn.Module):
        return named
    bodies = [child for child in model.children() if isinstance(child, PreTrainedModel)]
    return bodies[0] if len(bodies) == 1 else model


def _parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Parameters by the names they had before PEFT; of an original and its trained copy, one."""
    return {_strip(name): parameter for name, parameter in model.named_parameters()}


def _backbone_and_head(model: nn.Module) -> tuple[nn.Module, tuple[str, ...]]:
    """The pretrained body (timm's has the head inside it), and the names of the output layer's parts."""
    backbone = _backbone(model)
    if _is_timm(backbone):
        head = _timm_head(model, backbone)
    elif backbone is not model:
        # What a classification class adds to the base model is its head: with RoBERTa, ELECTRA, DistilBERT, DeBERTa and
        # ModernBERT dense layers too. BERT's and ALBERT's pooler is in the base model, see `_pooler`.
        body = _name_of(model, backbone)
        head = [name.split(".")[0] for name in _parameters(model) if not _is_below(name, body)]
    else:
        backbone, head = _last_child_as_head(model)
    if not head:
        raise UsageError(
            f"hftl finds no output layer in {type(model).__name__}. Load it with AutoModelForImageClassification or "
            "AutoModelForSequenceClassification."
        )
    return backbone, tuple(dict.fromkeys(head))


def _towers(model: nn.Module) -> dict[str, nn.Module]:
    """The backbones of a model that has several beside each other, and says so in `towers`."""
    return {name: model.get_submodule(name) for name in getattr(model, "towers", ())}


def _beside_each_other(towers: Mapping[str, nn.Module]) -> tuple[tuple[str, ...], ...]:
    """Blocks that hold one of each backbone: the stems are in the first, the last ones in the last."""
    each = []
    for name, tower in towers.items():
        blocks = _shortest_prefixes(_group(tower, _backbone(tower), _parameters(tower)), ())
        each.append([tuple(_join(name, prefix) for prefix in block) for block in blocks])
    joined: list[tuple[str, ...]] = [() for _ in range(max(map(len, each)))]
    for stem, *rest in each:
        joined[0] += stem
        for place, block in enumerate(rest, start=len(joined) - len(rest)):
            joined[place] += block
    return tuple(joined)


def _pooler(model: nn.Module, backbone: nn.Module) -> tuple[str, ...]:
    """The names of the parts with linear layers that a transformers body has behind its repeated layers."""
    layers = [] if _is_timm(backbone) or backbone is model else _layers(model, backbone)
    if not layers:
        return ()
    top = _name_of(model, backbone)
    children = [(_join(top, key), child) for key, child in backbone.named_children()]
    last = max(index for index, (name, _) in enumerate(children) if _is_below(layers[-1], name))
    return tuple(
        name for name, child in children[last + 1 :] if any(isinstance(part, nn.Linear) for part in child.modules())
    )


def _pooling_layer(model: nn.Module, backbone: nn.Module) -> tuple[str, ...]:
    """The name of the layer that `hftl.pooling` put behind the others, where there is one."""
    if not getattr(getattr(model, "config", None), "mean_pooling_layer", False):
        return ()
    return (_layers(model, backbone)[-1],)


def _group(model: nn.Module, backbone: nn.Module, weights: dict[str, nn.Parameter]) -> list[list[str]]:
    """The names of `weights`, all parameters but the head's, in blocks in depth order, no block empty."""
    if _is_timm(backbone):
        return _timm_blocks(_name_of(model, backbone), backbone, weights)
    layers = _layers(model, backbone)
    if layers:
        blocks = [block for block in _blocks_around(model, backbone, layers, weights) if block]
        if _pooling_layer(model, backbone):  # it only hands on what the last real block gives
            blocks[-2:] = [[*blocks[-2], *blocks[-1]]]
        return blocks
    return _merge_weightless(_children_as_blocks(model, backbone, weights), weights)


def _merge_weightless(blocks: list[list[str]], weights: dict[str, nn.Parameter]) -> list[list[str]]:
    """Join a block of norms and biases alone to the one before: timm's VGG matcher makes one of each BatchNorm."""
    merged: list[list[str]] = []
    for block in filter(None, blocks):
        if merged and all(weights[name].ndim <= 1 for name in block):
            merged[-1].extend(block)
        else:
            merged.append(list(block))
    return merged


# --- timm ------------------------------------------------------------------------------------------------------------


def _timm_no_decay(prefix: str, backbone: Any) -> set[str]:
    """What the model's `no_weight_decay()` lists; convolutional models have no such method."""
    listed = backbone.no_weight_decay() if callable(getattr(backbone, "no_weight_decay", None)) else ()
    return {_join(prefix, name) for name in listed}


def _timm_head(model: nn.Module, backbone: Any) -> list[str]:
    """The names of what `get_classifier()` gives: one layer, or several (distilled DeiT has two)."""
    classifier = backbone.get_classifier()
    parts = classifier if isinstance(classifier, (tuple, list)) else (classifier,)
    return [_name_of(model, part) for part in parts if isinstance(part, nn.Module) and _has_parameters(part)]


def _timm_blocks(prefix: str, backbone: Any, weights: dict[str, nn.Parameter]) -> list[list[str]]:
    """Blocks from the model's own `group_matcher`, with `coarse=False`: a block, not a stage of blocks.

    timm's layer decay uses the same. What the matcher does not know (ConvNeXt's `head.norm`, BEiT's `fc_norm`,
    MobileNetV3's `conv_head`, VGG's `pre_logits`) it puts together with the classifier. That is part of the pretrained
    body: it goes to block 0 if registered before all blocks, else to the last block.
    """
    from timm.models import group_parameters  # here: half a second, which models of transformers need not wait for

    groups = [
        list(dict.fromkeys(_join(prefix, _strip(name)) for name in group))
        for _, group in sorted(group_parameters(backbone, backbone.group_matcher(coarse=False)).items())
    ]
    blocks = _merge_weightless([group for group in groups if set(group) <= set(weights)], weights)
    if not blocks:
        return [list(weights)]
    known = {name for block in blocks for name in block}
    first, last = blocks[0], blocks[-1]
    seen = False
    for name in weights:
        seen = seen or name in known
        if name not in known:
            (last if seen else first).append(name)
    return blocks


# --- transformers, and models that nobody knows ----------------------------------------------------------------------


def _layers(model: nn.Module, backbone: nn.Module) -> list[str]:
    """The names of the backbone's repeated layers in depth order; empty when it keeps none in a ModuleList.

    Of the outermost lists those count that hold at least half as many parameters as the largest: the encoder's and the
    decoder's of BART, not the convolutions before Wav2Vec2's encoder.
    """
    top = _name_of(model, backbone)
    sizes: dict[str, int] = {}
    for name, module in backbone.named_modules():
        nested = any(_is_below(name, found) for found in sizes)
        if isinstance(module, nn.ModuleList) and not nested and _has_parameters(module):
            sizes[name] = sum(parameter.numel() for parameter in module.parameters())
    largest = max(sizes.values(), default=0)
    found = [name for name, size in sizes.items() if size * 2 >= largest]
    return [_join(top, layer) for name in found for layer in _unstaged(name, backbone.get_submodule(name))]


def _unstaged(name: str, layers: nn.Module) -> list[str]:
    """The names of the items of a list of layers; of a list of stages those of each stage's own list."""
    names: list[str] = []
    for key, item in layers.named_children():
        inner = _list_within_stage(item)
        if inner is None:
            names.append(f"{name}.{key}")
            continue
        path = f"{name}.{key}.{inner}".rstrip(".")
        names.extend(f"{path}.{child}" for child, _ in item.get_submodule(inner).named_children())
    return names


def _list_within_stage(module: nn.Module) -> str | None:
    """The name of the list of layers within a stage ("" for the module itself), or None for a module that is a layer.

    A stage is a list of layers of one class, with at most one thing beside it (the downsampling of Swin and ConvNeXt).
    A layer has more parts than that, or a list of unlike ones (T5's attention and feed-forward).
    """
    if isinstance(module, nn.ModuleList):
        return ""
    children = [(key, child) for key, child in module.named_children() if _has_parameters(child)]
    lists = [key for key, child in children if _is_list_of_layers(child)]
    return lists[0] if len(lists) == 1 and len(children) <= 2 else None


def _is_list_of_layers(module: nn.Module) -> bool:
    # Layers have parts of their own; a stack of convolutions or linear layers alone is a layer's inside.
    return (
        isinstance(module, (nn.ModuleList, nn.Sequential))
        and len({type(child) for child in module.children()}) == 1
        and all(_has_children(child) for child in module.children())
    )


def _blocks_around(
    model: nn.Module, backbone: nn.Module, layers: list[str], weights: dict[str, nn.Parameter]
) -> list[list[str]]:
    """Block 0, then one block a layer. Parameters outside all layers go by the order in which they are registered.

    Before all layers (embeddings, stem): block 0. Between two (downsampling): with the following one. After all (final
    norm): with the last. But embeddings are in block 0 wherever they are: tables that every layer reads,
    and norms named after them. So is what stands behind such a table in the same part of the backbone (the norm and the
    convolution behind DeBERTa's relative positions).
    """
    layer_of = {path: index for index, path in enumerate(layers, start=1)}
    tables = {_strip(name) for name, module in model.named_modules() if isinstance(module, nn.Embedding)}
    top = _name_of(model, backbone)
    parts_with_tables: set[str] = set()
    blocks: list[list[str]] = [[] for _ in range(len(layers) + 1)]
    between: list[str] = []
    seen = 0
    for name in weights:
        index = next((layer_of[path] for path in _paths(name) if path in layer_of), None)
        module = name.rpartition(".")[0]
        is_table = module in tables or _is_table(name)
        if is_table and seen:
            parts_with_tables.add(module.rpartition(".")[0])
        if index is not None:
            blocks[index].extend([*between, name])
            between, seen = [], index
        elif not seen or is_table or "embed" in module or (parts_with_tables - {top}) & set(_paths(module)):
            blocks[0].append(name)
        else:
            between.append(name)
    blocks[-1].extend(between)
    return blocks


def _children_as_blocks(model: nn.Module, backbone: nn.Module, weights: dict[str, nn.Parameter]) -> list[list[str]]:
    """For a model of unknown make: one block for each child that has parameters, as registered.

    A child that is a list of layers gives its items. Parameters outside all children come first.
    """
    children = [child for child in backbone.children() if _has_parameters(child)]
    if len(children) == 1:
        return _children_as_blocks(model, children[0], weights)
    names = [_name_of(model, part) for child in children for part in _items(child)]
    inside = [[name for name in weights if _is_below(name, part)] for part in names]
    return [[name for name in weights if not is_below_any(name, names)], *inside]


def _items(module: nn.Module) -> list[nn.Module]:
    """The items of a list of layers, stages opened; a module of any other kind by itself."""
    items = [child for child in module.children() if _has_parameters(child)]
    is_list = isinstance(module, (nn.ModuleList, nn.Sequential)) and all(_has_children(item) for item in items)
    if not items or not is_list:
        return [module]
    return [part for item in items for part in _items(item)]


def _last_child_as_head(model: nn.Module) -> tuple[nn.Module, list[str]]:
    """For a model that names no base model: the last child is the head, the only other one (or the model) the body."""
    children = [(key, child) for key, child in model.named_children() if _has_parameters(child)]
    if len(children) < 2:
        return model, []
    *others, (head, _) = children
    return (others[0][1] if len(others) == 1 else model), [head]


# --- kinds of layers -------------------------------------------------------------------------------------------------


def _is_table(name: str) -> bool:
    return _NO_DECAY_NAME.search(name.removesuffix(".weight")) is not None


def _is_normalisation(module: nn.Module) -> bool:
    if isinstance(module, (nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)):
        return True
    # Models' own classes (Qwen2RMSNorm, FrozenBatchNorm2d), not heads and layers with a norm inside them.
    state = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
    own = bool(state) and all(tensor.ndim <= 1 for tensor in state)
    return own and "norm" in type(module).__name__.lower() and not _has_children(module)


def _can_be_adapted(model: nn.Module, name: str, module: nn.Module) -> bool:
    if isinstance(module, (nn.Conv2d, nn.Conv3d)):
        # Subclasses that pad or standardise their weights in forward are not what LoRA's pair of convolutions mimics.
        return type(module).forward in (nn.Conv2d.forward, nn.Conv3d.forward)
    if isinstance(module, Conv1D):
        return True
    if not isinstance(module, nn.Linear):
        return False
    # nn.MultiheadAttention, and timm's attention with its query and value biases beside a fused qkv without one (BEiT,
    # Swin v2), hand the weights to a function and never call the layer: an adapter there would do nothing.
    parent = model.get_submodule(name.rpartition(".")[0])
    bias_beside = "q_bias" in dict(parent.named_parameters(recurse=False)) and "bias" not in dict(
        module.named_parameters()
    )
    return not bias_beside and not isinstance(module, nn.modules.linear.NonDynamicallyQuantizableLinear)
