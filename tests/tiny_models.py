"""Tiny models of real architectures, built offline in well under a second each: one table for all tests.

`TINY` maps a name to a builder of a classification model with three labels; `tiny_inputs` gives a valid batch for any
of them. timm models go the way that users' do: a timm checkpoint folder, loaded by transformers.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import timm
import torch
import transformers
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import AutoModelForImageClassification, PreTrainedModel, PreTrainedTokenizerFast

ID2LABEL = {0: "a", 1: "b", 2: "c"}
LABEL2ID = {"a": 0, "b": 1, "c": 2}
LABELS: dict[str, Any] = {"num_labels": 3, "id2label": ID2LABEL, "label2id": LABEL2ID}
VOCABULARY_SIZE = 64

# A made-up vocabulary; single letters are in it too, so that every lower-case word has tokens.
WORDS = [
    "good",
    "bad",
    "fine",
    "dull",
    "bright",
    "slow",
    "fast",
    "warm",
    "cold",
    "plain",
    "film",
    "book",
    "song",
    "game",
]
WORDS += ["meal", "room", "trip", "show", "plot", "cast", "the", "a", "an", "is", "was", "it", "this", "that", "not"]
LETTERS = [*"abcdefghijklmnopqrstuvwxyz"]


# --- timm ------------------------------------------------------------------------------------------------------------


def write_tiny_cnn(folder: Path, **model_args: Any) -> Path:
    """A convolutional network with BatchNorm (a narrow ResNet-18) as a timm checkpoint folder."""
    return write_timm_folder(folder, "resnet18", channels=[8, 16, 16, 32], stem_width=8, **model_args)


def write_timm_folder(folder: str | Path, architecture: str, num_classes: int = 5, **model_args: Any) -> Path:
    """Write a random timm model to `folder` as a timm checkpoint, as on the Hub, and return the folder.

    `config.json` has `architecture`, `num_classes`, `model_args` and `pretrained_cfg`, `model.safetensors` bare keys.
    transformers and timm pass `model_args` on to `timm.create_model`, so that a load gives the same small model; it may
    not hold `num_classes`, which transformers passes itself. The default number of classes is not three, so that a load
    with three labels resets the head.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    model: Any = timm.create_model(architecture, pretrained=False, num_classes=num_classes, **model_args)
    # Convolutional models take any size, and small images are fast; Inception's need 75 pixels or more.
    size = model_args.get("img_size") or (96 if architecture.startswith("inception") else 64)
    config = {
        "architecture": architecture,
        "num_classes": num_classes,
        "num_features": model.num_features,
        "model_args": model_args,
        "pretrained_cfg": model.pretrained_cfg | {"num_classes": num_classes, "input_size": [3, size, size]},
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    save_file({name: tensor.contiguous() for name, tensor in model.state_dict().items()}, folder / "model.safetensors")
    return folder


def timm_model(architecture: str, **model_args: Any) -> PreTrainedModel:
    """A random timm model with three labels, written to a folder and loaded from it by transformers."""
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        write_timm_folder(folder, architecture, **model_args)
        return AutoModelForImageClassification.from_pretrained(folder, ignore_mismatched_sizes=True, **LABELS)


# --- transformers ----------------------------------------------------------------------------------------------------

_TEXT = {
    "vocab_size": VOCABULARY_SIZE,
    "hidden_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}
_VIT = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "image_size": 32, "patch_size": 8}

_WAVEFORM: dict[str, Any] = {
    "hidden_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "conv_dim": (8, 8, 8),
    "conv_stride": (5, 4, 4),
    "conv_kernel": (10, 8, 4),
    "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 2,
    "classifier_proj_size": 8,
}

# The settings that make each architecture small; the class names are <kind>Config and <kind>For… of transformers.
_IMAGE_SETTINGS: dict[str, dict[str, Any]] = {
    "ViT": _VIT | {"intermediate_size": 32},
    "Dinov2": _VIT,
    "ConvNext": {"hidden_sizes": [8, 16, 16, 32], "depths": [1, 1, 2, 1], "image_size": 64},
    "Swin": {"embed_dim": 8, "depths": [1, 2, 1], "num_heads": [1, 2, 4], "window_size": 4, "image_size": 64},
    "ResNet": {"embedding_size": 8, "hidden_sizes": [16, 16, 32, 32], "depths": [1, 1, 2, 1]},
}
_AUDIO_SETTINGS: dict[str, dict[str, Any]] = {
    # As the task sets it: no masks, which are not for sounds as short as these, and no layers left out at random.
    "Wav2Vec2": _WAVEFORM | {"apply_spec_augment": False, "layerdrop": 0.0},
    "AST": {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 32}
    | {"max_length": 32, "num_mel_bins": 32},
}
_VIDEO: dict[str, Any] = {
    "hidden_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "patch_size": 8,
}
_VIDEO_SETTINGS: dict[str, dict[str, Any]] = {
    "VideoMAE": _VIDEO,
    "Timesformer": _VIDEO,
    "Vivit": {**_VIDEO, "tubelet_size": [2, 8, 8]},
}
_TEXT_SETTINGS: dict[str, dict[str, Any]] = {
    "Bert": _TEXT,
    "Roberta": _TEXT | {"pad_token_id": 1, "max_position_embeddings": 66},
    "DistilBert": {"vocab_size": VOCABULARY_SIZE, "dim": 16, "hidden_dim": 32, "n_layers": 3, "n_heads": 2},
    "DebertaV2": _TEXT
    | {"relative_attention": True, "pos_att_type": ["p2c", "c2p"], "position_buckets": 8, "norm_rel_ebd": "layer_norm"}
    | {"share_att_key": True, "position_biased_input": False, "max_relative_positions": -1, "type_vocab_size": 0},
    "ModernBert": _TEXT
    | {"cls_token_id": 2, "sep_token_id": 3, "bos_token_id": 2, "eos_token_id": 3, "attn_implementation": "sdpa"},
    "Electra": _TEXT | {"embedding_size": 8},
    "Albert": _TEXT | {"embedding_size": 8},
    "GPT2": {"vocab_size": VOCABULARY_SIZE, "n_embd": 16, "n_layer": 3, "n_head": 2, "n_positions": 64}
    | {"pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3},
    "Qwen2": _TEXT | {"num_key_value_heads": 1},
}


def transformers_model(kind: str) -> PreTrainedModel:
    """A random transformers classification model with three labels; `kind` as in its class names (`ViT`, `Bert`)."""
    torch.manual_seed(0)
    settings = {"Image": _IMAGE_SETTINGS, "Audio": _AUDIO_SETTINGS, "Sequence": _TEXT_SETTINGS}
    data = next(data for data, known in settings.items() if kind in known)
    auto_class = getattr(transformers, f"AutoModelFor{data}Classification")
    return auto_class.from_config(_config(kind, **LABELS)).eval()


def _config(kind: str, **settings: Any) -> transformers.PreTrainedConfig:
    own = (_IMAGE_SETTINGS | _AUDIO_SETTINGS | _VIDEO_SETTINGS | _TEXT_SETTINGS)[kind]
    return getattr(transformers, f"{kind}Config")(**own, **settings)


# --- the table -------------------------------------------------------------------------------------------------------

# zero_init_last=False: timm starts the last norm of each residual branch at zero, so no gradient reaches the branch in
# the first step, and a test that a step moves what it should would see nothing.
TINY: dict[str, Callable[[], PreTrainedModel]] = {
    "timm_resnet18": partial(timm_model, "resnet18", channels=[8, 16, 16, 32], stem_width=8, zero_init_last=False),
    "timm_resnet50": partial(
        timm_model, "resnet50", layers=[1, 1, 2, 1], channels=[8, 8, 16, 16], zero_init_last=False
    ),
    "timm_vgg11_bn": partial(timm_model, "vgg11_bn", mlp_ratio=0.01),
    "timm_inception_v3": partial(timm_model, "inception_v3"),
    "timm_densenet121": partial(timm_model, "densenet121", growth_rate=8, block_config=[2, 2, 3, 2]),
    "timm_efficientnet_lite0": partial(timm_model, "tf_efficientnet_lite0"),
    "timm_mobilenetv3_small_100": partial(timm_model, "mobilenetv3_small_100"),
    "timm_convnext_tiny": partial(timm_model, "convnext_tiny", depths=[1, 1, 2, 1], dims=[8, 16, 16, 32]),
    "timm_vit_tiny": partial(timm_model, "vit_tiny_patch16_224", depth=3, embed_dim=24, num_heads=2, img_size=64),
    "timm_deit_tiny_distilled": partial(
        timm_model, "deit_tiny_distilled_patch16_224", depth=3, embed_dim=24, num_heads=2, img_size=64
    ),
    "timm_swin_tiny": partial(
        timm_model,
        "swin_tiny_patch4_window7_224",
        embed_dim=8,
        depths=[1, 2, 1],
        num_heads=[1, 2, 4],
        window_size=4,
        img_size=64,
    ),
    "timm_beit": partial(timm_model, "beit_base_patch16_224", depth=3, embed_dim=24, num_heads=2, img_size=64),
    "vit": partial(transformers_model, "ViT"),
    "dinov2": partial(transformers_model, "Dinov2"),
    "convnext": partial(transformers_model, "ConvNext"),
    "swin": partial(transformers_model, "Swin"),
    "resnet": partial(transformers_model, "ResNet"),
    "bert": partial(transformers_model, "Bert"),
    "roberta": partial(transformers_model, "Roberta"),
    "distilbert": partial(transformers_model, "DistilBert"),
    "deberta_v2": partial(transformers_model, "DebertaV2"),
    "modernbert": partial(transformers_model, "ModernBert"),
    "electra": partial(transformers_model, "Electra"),
    "albert": partial(transformers_model, "Albert"),
    "gpt2": partial(transformers_model, "GPT2"),
    "qwen2": partial(transformers_model, "Qwen2"),
    "wav2vec2": partial(transformers_model, "Wav2Vec2"),
    "ast": partial(transformers_model, "AST"),
}


def tiny_inputs(model: PreTrainedModel, batch: int = 2) -> dict[str, torch.Tensor]:
    """A batch that `model` takes: pixel_values (batch, 3, size, size), or input_ids and attention_mask (batch, 8).

    Or input_values: waveforms (batch, 1600), or spectrograms (batch, 32, 32).

    The last row of text has two pad tokens at its end. Seeded, so that two calls give the same batch.
    """
    generator = torch.Generator().manual_seed(0)
    if model.main_input_name == "pixel_values":
        size = _image_size(model)
        return {"pixel_values": torch.rand(batch, 3, size, size, generator=generator)}
    if model.main_input_name == "input_values":
        shape = (32, 32) if model.config.model_type == "audio-spectrogram-transformer" else (1600,)
        return {"input_values": torch.randn(batch, *shape, generator=generator)}
    tokens = torch.randint(5, VOCABULARY_SIZE, (batch, 8), generator=generator)
    mask = torch.ones_like(tokens)
    tokens[-1, -2:], mask[-1, -2:] = model.config.pad_token_id, 0
    return {"input_ids": tokens, "attention_mask": mask}


def _image_size(model: PreTrainedModel) -> int:
    if model.config.model_type == "timm_wrapper":
        return model.config.pretrained_cfg["input_size"][-1]
    return getattr(model.config, "image_size", 64)  # ResNet's configuration has none, and it takes any


# --- pretrained checkpoints on disk ----------------------------------------------------------------------------------


def tiny_tokenizer(folder: str | Path, kind: str = "bert") -> PreTrainedTokenizerFast:
    """Write a small fast tokenizer to `folder`, in a form that AutoTokenizer loads, and return it.

    WordPiece over a made-up vocabulary with single letters, so any lower-case English text has tokens. The special
    tokens and the template for pairs are those of `kind`; GPT-2's has neither, and no pad token, as the real one.
    """
    pad, unknown, start, end, mask = _SPECIAL_TOKENS[kind]
    words = [*dict.fromkeys([*WORDS, *LETTERS])]
    pieces = [*dict.fromkeys([pad, unknown, start, end, mask]), *words, *(f"##{letter}" for letter in LETTERS)]
    tokenizer = Tokenizer(models.WordPiece({piece: row for row, piece in enumerate(pieces)}, unk_token=unknown))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    special = {"unk_token": unknown, "bos_token": start, "eos_token": end}
    if kind != "gpt2":
        special |= {"pad_token": pad, "cls_token": start, "sep_token": end, "mask_token": mask}
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{start} $A {end}",
            pair=f"{start} $A {end} $B:1 {end}:1",
            special_tokens=[(start, pieces.index(start)), (end, pieces.index(end))],
        )
    names = ["input_ids", "token_type_ids", "attention_mask"] if kind == "bert" else ["input_ids", "attention_mask"]
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=64, model_input_names=names, **special)
    fast.save_pretrained(folder)
    return fast


# pad, unknown, start, end, mask
_SPECIAL_TOKENS = {
    "bert": ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"),
    "distilbert": ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"),
    "roberta": ("<pad>", "<unk>", "<s>", "</s>", "<mask>"),
    "gpt2": ("<|endoftext|>",) * 5,
}
_KINDS = {
    "bert": "Bert",
    "distilbert": "DistilBert",
    "roberta": "Roberta",
    "gpt2": "GPT2",
    "vit": "ViT",
    "resnet": "ResNet",
}


def write_tiny_text_model(folder: str | Path, kind: str = "bert", **sizes: int) -> Path:
    """Write a random pretrained text model without a head and its tokenizer: bert, distilbert, roberta or gpt2.

    `sizes` are settings of its configuration in place of the tiny ones.
    """
    torch.manual_seed(0)
    tokenizer = tiny_tokenizer(folder, kind)
    own = _TEXT_SETTINGS[_KINDS[kind]]
    tokens = {"pad_token_id": tokenizer.pad_token_id}
    if kind == "gpt2":
        tokens |= {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    config = getattr(transformers, f"{_KINDS[kind]}Config")(**own | {"vocab_size": len(tokenizer)} | tokens | sizes)
    transformers.AutoModel.from_config(config).save_pretrained(folder)
    return Path(folder)


def write_tiny_waveform_model(folder: str | Path, **settings: Any) -> Path:
    """Write a random wav2vec 2.0 without a head, and its feature extractor, which pads without a mask."""
    torch.manual_seed(0)
    transformers.AutoModel.from_config(transformers.Wav2Vec2Config(**_WAVEFORM | settings)).save_pretrained(folder)
    transformers.Wav2Vec2FeatureExtractor(return_attention_mask=False).save_pretrained(folder)
    return Path(folder)


def write_tiny_image_model(folder: str | Path, kind: str = "vit") -> Path:
    """Write a random pretrained image model, without a head, and its image processor; kinds vit and resnet."""
    torch.manual_seed(0)
    transformers.AutoModel.from_config(_config(_KINDS[kind])).save_pretrained(folder)
    if kind == "vit":
        processor: Any = transformers.ViTImageProcessor(
            size={"height": _VIT["image_size"], "width": _VIT["image_size"]}
        )
    else:
        processor = transformers.ConvNextImageProcessor(size={"shortest_edge": 64}, crop_pct=0.875)
    processor.save_pretrained(folder)
    return Path(folder)


def write_tiny_dual_encoder(folder: str | Path, kind: str = "clip", words: Sequence[str] = (), **sizes: int) -> Path:
    """Write a random CLIP or SigLIP with its processor, whose tokenizer has `words` as wholes and any other by letters.

    `sizes` are settings of both parts in place of the tiny ones.
    """
    torch.manual_seed(0)
    size = {"height": _VIT["image_size"], "width": _VIT["image_size"]}
    known = [*dict.fromkeys([*WORDS, *words])]
    if kind == "clip":
        tokenizer: Any = _clip_tokenizer(known)
        pictures: Any = transformers.CLIPImageProcessor(size={"shortest_edge": size["height"]}, crop_size=size)
    else:
        tokenizer = _siglip_tokenizer(known)
        pictures = transformers.SiglipImageProcessor(size=size)
    name = {"clip": "CLIP", "siglip": "Siglip"}[kind]
    getattr(transformers, f"{name}Processor")(pictures, tokenizer).save_pretrained(folder)
    text = {**_TEXT, "vocab_size": len(tokenizer), "max_position_embeddings": 40}
    text |= {key: getattr(tokenizer, key) for key in ("pad_token_id", "bos_token_id", "eos_token_id")}
    vision = {**_VIT, "intermediate_size": 32}
    config = getattr(transformers, f"{name}Config")(
        text_config={**text, **sizes},
        vision_config={**vision, **sizes},
        **({"projection_dim": 12} if kind == "clip" else {}),
    )
    model = transformers.AutoModel.from_config(config)
    if kind == "siglip":
        model.logit_scale.data.fill_(2.5)  # random as it is
    model.save_pretrained(folder)
    return Path(folder)


def _clip_tokenizer(words: Sequence[str]) -> Any:
    letters = [*LETTERS, *map(str, range(10)), *".,-"]
    vocabulary, merges = [*letters, *(f"{letter}</w>" for letter in letters)], []
    for word in words:
        *others, last = word
        whole, *rest = [*others, f"{last}</w>"]
        for piece in rest:
            merges.append((whole, piece))
            whole += piece
            vocabulary.append(whole)
    vocabulary = [*dict.fromkeys(vocabulary), "<|startoftext|>", "<|endoftext|>"]
    ids = {piece: number for number, piece in enumerate(vocabulary)}
    return transformers.CLIPTokenizer(vocab=ids, merges=[*dict.fromkeys(merges)], model_max_length=77)


def _siglip_tokenizer(words: Sequence[str]) -> Any:
    """As SigLIP's: no mask, an end, padding behind it."""
    pieces = ["<pad>", "</s>", "<unk>", *words, ".", *LETTERS, *(f"##{letter}" for letter in LETTERS)]
    ids = {piece: number for number, piece in enumerate(dict.fromkeys(pieces))}
    tokenizer = Tokenizer(models.WordPiece(ids, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", ids["</s>"])])
    special = {"unk_token": "<unk>", "eos_token": "</s>", "pad_token": "<pad>"}
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, model_max_length=64, model_input_names=["input_ids"], **special
    )


def write_tiny_video_model(folder: str | Path, kind: str = "VideoMAE", frames: int = 4, side: int = 32) -> Path:
    """A checkpoint of a transformer for videos, with its image processor."""
    labels = {"id2label": {0: "a", 1: "b"}, "label2id": {"a": 0, "b": 1}}
    config = _config(kind, image_size=side, num_frames=frames, **labels)
    transformers.set_seed(0)
    transformers.AutoModelForVideoClassification.from_config(config).save_pretrained(folder)
    sizes = {"size": {"shortest_edge": side}, "crop_size": {"height": side, "width": side}}
    transformers.VideoMAEImageProcessor(**sizes).save_pretrained(folder)
    return Path(folder)
