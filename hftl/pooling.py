"""Mean pooling within BERT's own architecture, so that plain transformers loads it without custom code.

The `…ForSequenceClassification` classes of the BERT family read the first token. A sentence encoder was trained on the
mean of all tokens, and its first token says less: on movie reviews, frozen MiniLM, 0.74 to 0.75 from the first token
and 0.78 from the mean. One more layer of the ordinary kind moves the mean there: queries and keys of zero attend to
all real tokens alike, values and output are multiples of the identity, and the feed-forward part is zero. What the head
reads is the layer norm of the mean, of which a linear classifier makes the same as of the mean itself.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import constants, try_to_load_from_cache
from torch import nn
from transformers import PreTrainedModel
from transformers.initialization import no_init_weights
from transformers.utils import cached_file

from hftl.folder import say

#: how much the mean outweighs the token's own value, which the residual path adds; fp16 still holds the sum
_SCALE = 1000.0


def declares_mean(source: str, revision: str = "main") -> bool:
    """Whether a checkpoint says that it was trained with mean pooling, in the file of sentence-transformers."""
    path = cached_file(
        source,
        "1_Pooling/config.json",
        revision=revision,
        _raise_exceptions_for_gated_repo=False,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
    )
    is_unknown = path is None and not Path(source).is_dir() and constants.HF_HUB_OFFLINE
    if is_unknown and try_to_load_from_cache(source, "1_Pooling/config.json", revision=revision) is None:
        say(f"pooling: offline {source} cannot be asked whether it was trained with mean pooling (--pooling mean)")
    return path is not None and bool(json.loads(Path(path).read_text(encoding="utf-8")).get("pooling_mode_mean_tokens"))


def pool_by_mean(model: PreTrainedModel) -> PreTrainedModel | None:
    """The model itself with mean pooling, or None where its architecture cannot express it.

    ModernBERT has a setting for it; BERT, RoBERTa, ELECTRA and their like get the layer described above.
    """
    if hasattr(model.config, "classifier_pooling"):
        model.config.classifier_pooling = "mean"
        return model
    if getattr(model.config, "mean_pooling_layer", False):
        return model  # a run of ours, adapted further
    if not _has_bert_layers(model):
        return None
    config, layers = model.config, model.base_model.encoder.layer
    few_bits: Any = getattr(config, "quantization_config", None)
    if hasattr(few_bits, "llm_int8_skip_modules"):  # of the layers before it
        name = f"{model.base_model_prefix}.encoder.layer.{len(layers)}"
        few_bits.llm_int8_skip_modules = [*(few_bits.llm_int8_skip_modules or ()), name]
    config.num_hidden_layers += 1
    config.mean_pooling_layer = True  # says what the last layer is, to a reader and to `backbones`
    with torch.device("meta"), no_init_weights():  # no room for the other layers
        deeper: Any = type(model)(config)
    layer = deeper.base_model.encoder.layer[-1].to_empty(device=layers[-1].output.dense.weight.device)
    _make_uniform(layer)
    layers.append(layer.train(model.training))
    pooler = getattr(model.base_model, "pooler", None)
    if pooler is not None:  # it was trained on the first token, if at all
        nn.init.eye_(pooler.dense.weight)
        nn.init.zeros_(pooler.dense.bias)
    return model


def _has_bert_layers(model: Any) -> bool:
    """Post-norm layers with BERT's names, and no positions inside attention."""
    layers = getattr(getattr(model.base_model, "encoder", None), "layer", None)
    if not isinstance(layers, nn.ModuleList):
        return False
    names = {name for name, _ in layers[-1].named_parameters()}
    parts = ["attention.self.query", "attention.self.key", "attention.self.value", "attention.output.dense"]
    parts += ["attention.output.LayerNorm", "intermediate.dense", "output.dense", "output.LayerNorm"]
    return names == {f"{part}.{kind}" for part in parts for kind in ("weight", "bias")}


@torch.no_grad()
def _make_uniform(layer: Any) -> None:
    for parameter in layer.parameters():
        parameter.zero_()
    nn.init.eye_(layer.attention.self.value.weight)
    nn.init.eye_(layer.attention.output.dense.weight).mul_(_SCALE)
    nn.init.ones_(layer.attention.output.LayerNorm.weight)
    nn.init.ones_(layer.output.LayerNorm.weight)
