"""hftl.backbones on every architecture of the table: what it finds is written here by hand."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import cache
from typing import NamedTuple

import pytest
import timm
import torch
from peft import LoraConfig, PeftModel, PromptTuningConfig, get_peft_model
from tiny_models import TINY, tiny_inputs, write_timm_folder, write_tiny_image_model, write_tiny_text_model
from torch import nn
from transformers import (
    AutoImageProcessor,
    AutoModel,
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BartConfig,
    BartForSequenceClassification,
    PreTrainedModel,
    WhisperConfig,
    WhisperForAudioClassification,
)

from hftl import backbones
from hftl.errors import UsageError


class Expected(NamedTuple):
    """What a tiny model has: its head, the number of its blocks, prefixes of its first and its last block, a pooler."""

    head: tuple[str, ...]
    blocks: int
    first: tuple[str, ...]
    last: tuple[str, ...]
    convolutional: bool
    pooler: tuple[str, ...] = ()


# The number of blocks: the stem or the embeddings, and one a layer (residual block, transformer layer) of the builder.
EXPECTED = {
    "timm_resnet18": Expected(
        ("timm_model.fc",), 9, ("timm_model.conv1", "timm_model.bn1"), ("timm_model.layer4.1",), True
    ),
    "timm_resnet50": Expected(
        ("timm_model.fc",), 6, ("timm_model.conv1", "timm_model.bn1"), ("timm_model.layer4",), True
    ),
    "timm_vgg11_bn": Expected(
        ("timm_model.head.fc",),
        8,
        ("timm_model.features.0", "timm_model.features.1"),
        ("timm_model.features.25", "timm_model.features.26", "timm_model.pre_logits"),
        True,
    ),
    "timm_inception_v3": Expected(
        ("timm_model.fc",),
        13,
        ("timm_model.Conv2d_1a_3x3", "timm_model.Conv2d_2a_3x3", "timm_model.Conv2d_2b_3x3"),
        ("timm_model.Mixed_7c",),
        True,
    ),
    "timm_densenet121": Expected(
        ("timm_model.classifier",),
        10,
        ("timm_model.features.conv0", "timm_model.features.norm0"),
        ("timm_model.features.denseblock4.denselayer2", "timm_model.features.norm5"),
        True,
    ),
    "timm_efficientnet_lite0": Expected(
        ("timm_model.classifier",),
        17,
        ("timm_model.conv_stem", "timm_model.bn1"),
        ("timm_model.blocks.6", "timm_model.conv_head", "timm_model.bn2"),
        True,
    ),
    "timm_mobilenetv3_small_100": Expected(
        ("timm_model.classifier",),
        13,
        ("timm_model.conv_stem", "timm_model.bn1"),
        ("timm_model.blocks.5", "timm_model.conv_head"),
        True,
    ),
    "timm_convnext_tiny": Expected(
        ("timm_model.head.fc",), 6, ("timm_model.stem",), ("timm_model.stages.3", "timm_model.head.norm"), True
    ),
    "timm_vit_tiny": Expected(
        ("timm_model.head",),
        4,
        ("timm_model.cls_token", "timm_model.pos_embed", "timm_model.patch_embed"),
        ("timm_model.blocks.2", "timm_model.norm"),
        False,
    ),
    "timm_deit_tiny_distilled": Expected(
        ("timm_model.head", "timm_model.head_dist"),
        4,
        ("timm_model.cls_token", "timm_model.pos_embed", "timm_model.dist_token", "timm_model.patch_embed"),
        ("timm_model.blocks.2", "timm_model.norm"),
        False,
    ),
    "timm_swin_tiny": Expected(
        ("timm_model.head.fc",), 5, ("timm_model.patch_embed",), ("timm_model.layers.2", "timm_model.norm"), False
    ),
    "timm_beit": Expected(
        ("timm_model.head",),
        4,
        ("timm_model.cls_token", "timm_model.patch_embed"),
        ("timm_model.blocks.2", "timm_model.fc_norm"),
        False,
    ),
    "vit": Expected(("classifier",), 4, ("vit.embeddings",), ("vit.layers.2", "vit.layernorm"), False),
    "dinov2": Expected(
        ("classifier",), 4, ("dinov2.embeddings",), ("dinov2.encoder.layer.2", "dinov2.layernorm"), False
    ),
    "convnext": Expected(
        ("classifier",), 6, ("convnext.embeddings",), ("convnext.encoder.stages.3", "convnext.layernorm"), True
    ),
    "swin": Expected(
        ("classifier",),
        5,
        ("swin.embeddings",),
        ("swin.encoder.layers.1.downsample", "swin.encoder.layers.2", "swin.layernorm"),
        False,
    ),
    "resnet": Expected(("classifier",), 6, ("resnet.embedder",), ("resnet.encoder.stages.3",), True),
    "bert": Expected(
        ("classifier",), 4, ("bert.embeddings",), ("bert.encoder.layer.2",), False, pooler=("bert.pooler",)
    ),
    "roberta": Expected(("classifier",), 4, ("roberta.embeddings",), ("roberta.encoder.layer.2",), False),
    "distilbert": Expected(
        ("pre_classifier", "classifier"), 4, ("distilbert.embeddings",), ("distilbert.transformer.layer.2",), False
    ),
    "deberta_v2": Expected(
        ("pooler", "classifier"),
        4,
        ("deberta.embeddings", "deberta.encoder.rel_embeddings", "deberta.encoder.LayerNorm"),
        ("deberta.encoder.layer.2",),
        False,
    ),
    "modernbert": Expected(
        ("head", "classifier"), 4, ("model.embeddings",), ("model.layers.2", "model.final_norm"), False
    ),
    "electra": Expected(
        ("classifier",), 4, ("electra.embeddings", "electra.embeddings_project"), ("electra.encoder.layer.2",), False
    ),
    "albert": Expected(
        ("classifier",),
        2,
        ("albert.embeddings", "albert.encoder.embedding_hidden_mapping_in"),
        ("albert.encoder.albert_layer_groups",),
        False,
        pooler=("albert.pooler",),
    ),
    "gpt2": Expected(
        ("score",), 4, ("transformer.wte", "transformer.wpe"), ("transformer.h.2", "transformer.ln_f"), False
    ),
    "qwen2": Expected(("score",), 4, ("model.embed_tokens",), ("model.layers.2", "model.norm"), False),
    "wav2vec2": Expected(
        ("projector", "classifier"),
        4,
        (
            "wav2vec2.masked_spec_embed",
            "wav2vec2.feature_extractor",
            "wav2vec2.feature_projection",
            "wav2vec2.encoder.pos_conv_embed",
            "wav2vec2.encoder.layer_norm",
        ),
        ("wav2vec2.encoder.layers.2",),
        False,
    ),
    "ast": Expected(
        ("classifier",),
        4,
        ("audio_spectrogram_transformer.embeddings",),
        ("audio_spectrogram_transformer.layers.2", "audio_spectrogram_transformer.layernorm"),
        False,
    ),
}

# Tables and tokens of more than one dimension, by the end of their names, that must be spared from weight decay.
TABLES = {
    "ast": {"cls_token", "distillation_token", "position_embeddings"},
    "timm_vit_tiny": {"cls_token", "pos_embed"},
    "timm_deit_tiny_distilled": {"cls_token", "pos_embed", "dist_token"},
    "timm_swin_tiny": {"relative_position_bias_table"},
    "timm_beit": {"cls_token", "relative_position_bias_table"},
    "vit": {"cls_token", "position_embeddings"},
    "dinov2": {"cls_token", "mask_token", "position_embeddings"},
    "swin": {"relative_position_bias_table"},
    "deberta_v2": {"rel_embeddings.weight"},
    "gpt2": {"wpe.weight"},
    **{key: {"position_embeddings.weight"} for key in ["bert", "roberta", "distilbert", "electra", "albert"]},
}

every_model = pytest.mark.parametrize("name", list(TINY))


@cache
def shared_model(name: str) -> PreTrainedModel:
    """A model that tests only read; those that change one build their own."""
    return TINY[name]().eval()


def below(name: str, prefixes: tuple[str, ...] | list[str]) -> bool:
    """Whether `name` is one of `prefixes` or inside one."""
    return any(name == prefix or name.startswith(prefix + ".") for prefix in prefixes)


def test_expectations_cover_the_table() -> None:
    assert set(EXPECTED) == set(TINY)


@every_model
def test_builder_gives_a_model_with_three_labels(name: str) -> None:
    model = shared_model(name)
    assert model.config.id2label == {0: "a", 1: "b", 2: "c"}
    with torch.no_grad():
        assert model(**tiny_inputs(model, batch=3)).logits.shape == (3, 3)


@every_model
def test_head_and_blocks(name: str) -> None:
    parts, expected = backbones.structure(shared_model(name)), EXPECTED[name]
    assert parts.head == expected.head
    assert parts.pooler == expected.pooler
    assert parts.trained_head == expected.pooler + expected.head
    assert len(parts.blocks) == expected.blocks
    assert parts.blocks[0] == expected.first
    assert parts.blocks[-1] == expected.last


@every_model
def test_every_parameter_belongs_to_exactly_one_part(name: str) -> None:
    model = shared_model(name)
    parts, blocks = backbones.structure(model), backbones.parameter_blocks(model)
    assert list(blocks) == [name for name, _ in model.named_parameters()]
    assert set(blocks.values()) == set(range(len(parts.blocks) + 1))
    for parameter, index in blocks.items():
        found = [
            place for place, prefixes in enumerate([*parts.blocks, parts.trained_head]) if below(parameter, prefixes)
        ]
        assert found == [index], parameter


@every_model
def test_head_is_the_output_layer(name: str) -> None:
    model = shared_model(name)
    names = backbones.head_parameters(model)
    head = EXPECTED[name].pooler + EXPECTED[name].head
    assert names == [parameter for parameter, _ in model.named_parameters() if below(parameter, head)]
    outputs = [parameter for parameter in names if model.get_parameter(parameter).shape[0] == 3]
    assert outputs
    if name.startswith("timm_"):
        classifier = model.timm_model.get_classifier()
        classifiers = classifier if isinstance(classifier, tuple) else (classifier,)
        expected = {id(parameter) for part in classifiers for parameter in part.parameters()}
        assert {id(model.get_parameter(parameter)) for parameter in names} == expected


@every_model
def test_blocks_run_in_their_order(name: str) -> None:
    model = shared_model(name)
    blocks = backbones.parameter_blocks(model)
    calls: dict[str, int] = {}

    def note(name: str, index: int) -> Callable[..., None]:
        return lambda *_: calls.update({name: calls.get(name, index)})

    handles = []
    for module_name, module in model.named_modules():
        own = [blocks[f"{module_name}.{key}"] for key, _ in module.named_parameters(recurse=False)]
        if own and not any(True for _ in module.children()):
            handles.append(module.register_forward_hook(note(module_name, own[0])))
    with torch.no_grad():
        model(**tiny_inputs(model))
    for handle in handles:
        handle.remove()
    assert list(calls.values()) == sorted(calls.values()), calls
    assert set(calls.values()) == set(range(EXPECTED[name].blocks + 1))


@every_model
def test_normalisation_modules(name: str) -> None:
    model = shared_model(name)
    found = set(backbones.normalisation_modules(model))
    named = {key for key, module in model.named_modules() if "norm" in type(module).__name__.lower()}
    # Inception's ConvNormAct, ConvNeXt's NormMlpClassifierHead and wav2vec's LayerNormConvLayer have a norm, and are
    # none; nor is what keeps a weight's norm.
    others = re.compile("Conv.*Act|Head|ConvLayer|WeightNorm")
    assert found == {key for key in named if not others.search(type(model.get_submodule(key)).__name__)}
    assert found


@every_model
def test_no_decay(name: str) -> None:
    model = shared_model(name)
    found = backbones.no_decay_parameters(model)
    shapes = {key: parameter.ndim for key, parameter in model.named_parameters()}
    assert {key for key in shapes if shapes[key] <= 1} <= found
    tables = {key for key in found if shapes[key] > 1}
    assert all(key.endswith(tuple(TABLES.get(name, ()))) for key in tables)
    assert all(any(key.endswith(table) for key in tables) for table in TABLES.get(name, ()))


@every_model
def test_is_convolutional(name: str) -> None:
    assert backbones.is_convolutional(shared_model(name)) == EXPECTED[name].convolutional


@every_model
def test_lora_targets(name: str) -> None:
    model = TINY[name]()
    parts, targets = backbones.structure(model), lora_targets(model)
    head, stem, body = parts.trained_head, parts.blocks[0], [prefix for block in parts.blocks[1:] for prefix in block]
    assert all(below(target, body) and not below(target, head + stem) for target in targets)
    # Every block after the first gets adapters; the depthwise convolutions alone would not have been enough.
    assert all(any(below(target, block) for target in targets) for block in parts.blocks[1:])

    plain, no_decay = backbones.parameter_blocks(model), backbones.no_decay_parameters(model)
    adapted = with_lora(model, targets, list(head))
    adapters = {key: parameter for key, parameter in adapted.named_parameters() if ".lora_B." in key}
    assert len(adapters) == len(targets)
    adapted.eval()(**tiny_inputs(model)).logits.square().sum().backward()
    # An adapter that no gradient reaches is one that the model ignores.
    assert [key for key, parameter in adapters.items() if not parameter.grad.abs().sum() > 0] == []

    blocks = backbones.parameter_blocks(adapted)
    assert list(blocks) == [key for key, _ in adapted.named_parameters()]
    assert backbones.structure(adapted) == parts
    for key, index in blocks.items():
        original = backbones.plain_name(adapted, key)
        module = original.split(".lora_")[0]
        owner = original if original in plain else f"{module}.weight"
        assert index == plain[owner], key
    spared = {backbones.plain_name(adapted, key) for key in backbones.no_decay_parameters(adapted)}
    assert spared & set(plain) == no_decay
    copies = {key for key in backbones.head_parameters(adapted) if ".modules_to_save." in key}
    assert copies == {key for key, parameter in adapted.named_parameters() if ".modules_to_save." in key}


def lora_targets(model: nn.Module) -> list[str]:
    """What LoRA takes of the layers that can be adapted."""
    return [name for name in backbones.adaptable_layers(model) if getattr(model.get_submodule(name), "groups", 1) == 1]


def with_lora(model: PreTrainedModel, targets: list[str], head: list[str]) -> PeftModel:
    """`model` with LoRA on `targets` and its head trained whole."""
    linear_transposed = model.config.model_type == "gpt2"
    config = LoraConfig(r=2, target_modules=targets, modules_to_save=head, fan_in_fan_out=linear_transposed)
    return get_peft_model(model, config)


def test_layers_that_are_never_called_get_no_adapter() -> None:
    targets = backbones.adaptable_layers(shared_model("timm_beit"))
    assert {target.rpartition("blocks.0.")[2] for target in targets if "blocks.0." in target} == {
        "attn.proj",
        "mlp.fc1",
        "mlp.fc2",
    }


def test_weight_standardised_convolutions_get_no_adapter() -> None:
    # BiT normalises its weights in forward: what LoRA adds beside such a layer cannot be merged into it.
    with torch.device("meta"):
        model = timm.create_model("resnetv2_50x1_bit", num_classes=3)
    assert backbones.adaptable_layers(model) == []


def test_raw_timm_model() -> None:
    model = timm.create_model("vit_tiny_patch16_224", depth=2, embed_dim=24, num_heads=2, img_size=64, num_classes=3)
    parts = backbones.structure(model)
    assert parts.head == ("head",)
    assert parts.blocks == (("cls_token", "pos_embed", "patch_embed"), ("blocks.0",), ("blocks.1", "norm"))
    assert "pos_embed" in backbones.no_decay_parameters(model)


class Unknown(nn.Module):
    """A model that follows nobody's conventions."""

    def __init__(self) -> None:
        """Five children and a parameter."""
        super().__init__()
        self.scale = nn.Parameter(torch.ones(3))
        self.stem = nn.Conv2d(3, 4, 3)
        self.norm = nn.BatchNorm2d(4)
        self.first = nn.Sequential(nn.Conv2d(4, 4, 3), nn.ReLU())
        self.second = nn.Sequential(nn.Conv2d(4, 4, 3), nn.ReLU())
        self.output = nn.Linear(4, 3)


def test_unknown_model_falls_back_to_its_children() -> None:
    model = Unknown()
    parts = backbones.structure(model)
    assert parts.head == ("output",)
    assert parts.blocks == (("scale",), ("stem", "norm"), ("first",), ("second",))
    assert lora_targets(model) == ["stem", "first.0", "second.0"]
    assert backbones.is_convolutional(model)


def test_unknown_stages_give_their_layers() -> None:
    layers = [nn.Sequential(nn.Linear(4, 4), nn.ReLU()) for _ in range(4)]
    body = nn.Sequential(nn.Linear(4, 4), nn.Sequential(*layers[:2]), nn.Sequential(*layers[2:]))
    parts = backbones.structure(nn.Sequential(body, nn.Linear(4, 3)))
    assert parts.blocks == (("0.0",), ("0.1.0",), ("0.1.1",), ("0.2.0",), ("0.2.1",))


def test_prompt_tuning_keeps_the_names() -> None:
    model = TINY["modernbert"]()
    parts = backbones.structure(model)
    prompted = get_peft_model(model, PromptTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=2))
    blocks = backbones.parameter_blocks(prompted)
    assert backbones.structure(prompted) == parts
    assert blocks["prompt_encoder.default.embedding.weight"] == len(parts.blocks) - 1
    assert blocks["base_model.model.layers.0.attn.Wo.weight"] == 1


def test_unknown_model_with_one_body() -> None:
    body = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 4))
    parts = backbones.structure(nn.Sequential(body, nn.Linear(4, 3)))
    assert parts == backbones.Structure(head=("1",), blocks=(("0.0", "0.1"), ("0.2",)))


def test_model_that_names_no_base_model() -> None:
    # Whisper's class has an encoder and no `base_model_prefix` that leads to it; its projector is fresh too.
    sizes = {"d_model": 16, "encoder_layers": 2, "encoder_attention_heads": 2, "encoder_ffn_dim": 32, "num_labels": 3}
    parts = backbones.structure(WhisperForAudioClassification(WhisperConfig(**sizes, vocab_size=8, pad_token_id=0)))
    assert parts.head == ("projector", "classifier")
    assert parts.blocks[0] == ("encoder.conv1", "encoder.conv2", "encoder.embed_positions")
    assert parts.blocks[1:] == (("encoder.layers.0",), ("encoder.layers.1", "encoder.layer_norm"))


def test_embeddings_registered_after_the_layers_come_first() -> None:
    sizes = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32}
    bart = BartConfig(**sizes, encoder_attention_heads=2, decoder_attention_heads=2, vocab_size=64, num_labels=3)
    first, encoder, decoder = backbones.structure(BartForSequenceClassification(bart)).blocks
    assert {name.removeprefix("model.") for name in first} == {
        "shared",
        *(f"{side}.{name}" for side in ("encoder", "decoder") for name in ("embed_positions", "layernorm_embedding")),
    }
    assert (encoder, decoder) == (("model.encoder.layers",), ("model.decoder.layers",))


def test_model_without_a_head_is_refused() -> None:
    with pytest.raises(UsageError, match="no output layer"):
        backbones.structure(timm.create_model("resnet18", num_classes=0, channels=[8, 8, 8, 8]))
    with pytest.raises(UsageError, match="no output layer"):
        backbones.structure(nn.Sequential(nn.Linear(4, 3)))


def test_timm_folder_keeps_its_model_args(tmp_path) -> None:
    sizes = {"depth": 2, "embed_dim": 24, "num_heads": 2, "img_size": 48}
    write_timm_folder(tmp_path / "base", "vit_tiny_patch16_224", **sizes)
    model = AutoModelForImageClassification.from_pretrained(tmp_path / "base", num_labels=5).eval()
    model.save_pretrained(tmp_path / "again")
    again = AutoModelForImageClassification.from_pretrained(tmp_path / "again").eval()
    by_timm = timm.create_model(f"local-dir:{tmp_path / 'base'}", pretrained=True).eval()
    pixels = tiny_inputs(model)["pixel_values"]
    assert pixels.shape == (2, 3, 48, 48)
    assert AutoImageProcessor.from_pretrained(tmp_path / "again")(torch.zeros(3, 60, 60), return_tensors="pt")[
        "pixel_values"
    ].shape == (1, 3, 48, 48)
    with torch.no_grad():
        logits = model(pixels).logits
        assert torch.equal(again(pixels).logits, logits)
        assert torch.equal(by_timm(pixels), logits)


@pytest.mark.parametrize("kind", ["bert", "distilbert", "roberta", "gpt2"])
def test_tiny_text_folder_is_an_ordinary_checkpoint(kind: str, tmp_path) -> None:
    write_tiny_text_model(tmp_path, kind)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path, num_labels=3).eval()
    batch = tokenizer("a good film", "a zebra", return_tensors="pt")
    assert tokenizer.unk_token_id not in batch["input_ids"][0, 1:-1] or kind == "gpt2"
    assert model(**batch).logits.shape == (1, 3)
    assert len(tokenizer) == model.config.vocab_size


@pytest.mark.parametrize("kind", ["vit", "resnet"])
def test_tiny_image_folder_is_an_ordinary_checkpoint(kind: str, tmp_path) -> None:
    write_tiny_image_model(tmp_path, kind)
    pixels = AutoImageProcessor.from_pretrained(tmp_path)(
        torch.zeros(3, 40, 50, dtype=torch.uint8), return_tensors="pt"
    )
    assert AutoModel.from_pretrained(tmp_path).eval()(**pixels).last_hidden_state.shape[0] == 1


def test_a_model_that_was_changed_has_another_structure() -> None:
    model = TINY["bert"]()
    before = backbones.structure(model)
    assert backbones.structure(model) is before
    model.bert.encoder.layer = model.bert.encoder.layer[:2]
    shorter = backbones.structure(model)
    assert shorter.blocks == before.blocks[:-1]
    model.classifier = nn.Sequential(nn.Linear(16, 8), nn.Linear(8, 3))
    model.dropout = nn.LayerNorm(16)
    assert backbones.structure(model).head == ("dropout", "classifier")
