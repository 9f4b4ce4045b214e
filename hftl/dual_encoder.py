"""Dual encoders (CLIP, SigLIP) as image classifiers: the image part, and a linear head made of the classes' texts.

transformers' own `CLIPForImageClassification` and its kin take the mean of the patches, which no text was ever compared
with. Here the vector is the one that the checkpoint compares, so that a class is what the text part makes of its name.
"""

from __future__ import annotations

import re
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import nn
from transformers import (
    CONFIG_MAPPING,
    MODEL_MAPPING,
    AutoConfig,
    AutoModel,
    AutoModelForImageClassification,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.loss.loss_utils import ForSequenceClassificationLoss
from transformers.modeling_outputs import ImageClassifierOutput

from hftl import pretrained
from hftl.arguments import TransferArguments
from hftl.errors import UsageError
from hftl.folder import say

#: of the eighty whose mean Radford et al. 2021 take for ImageNet (3.1.4), some that are true of any photo; the first is
#: the one that they found good by itself
PROMPTS = (
    "a photo of a {label}.",
    "a photo of the {label}.",
    "a good photo of a {label}.",
    "a bad photo of a {label}.",
    "a close-up photo of a {label}.",
    "a cropped photo of a {label}.",
    "a photo of many {label}.",
)
#: texts that go through the text part at once
_TEXTS = 256
#: how far logits may be from those of the checkpoint's own model, of which the largest are about 30
_TOLERANCE = 1e-3


class DualEncoderConfig(PreTrainedConfig):
    """Settings of a `DualEncoderForImageClassification`.

    Attributes:
        dual_encoder: the configuration of the whole dual encoder, as a dictionary.
        hidden_size: width of the image part.
        prompts: whose texts the head started from; None where it started from nothing.
    """

    model_type = "hftl_dual_encoder"
    dual_encoder: Mapping[str, Any] | None = None
    hidden_size: int = 768
    prompts: Sequence[str] | None = None


class ImageEncoder(nn.Module):
    """The image part of a dual encoder, to the vector that is compared with texts."""

    def __init__(self, vision_model: nn.Module, visual_projection: nn.Module) -> None:
        """Both as transformers has them; the projection of a model without one is the identity."""
        super().__init__()
        self.vision_model, self.visual_projection = vision_model, visual_projection

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Vectors of length 1 in float32, shape (rows, features)."""
        pooled = self.vision_model(pixel_values=pixel_values).pooler_output
        return nn.functional.normalize(self.visual_projection(pooled).float(), dim=-1)


class DualEncoderForImageClassification(PreTrainedModel):
    """The image part of a dual encoder with a linear head on its vectors of length 1 (Radford et al. 2021, 3.1).

    The head's weights are the vectors of the classes' texts, times the scale that the checkpoint learned: logits are
    scaled cosines, those of the dual encoder itself. Its bias is 0: SigLIP's (Zhai et al. 2023) is the same for every
    class.
    """

    config_class = DualEncoderConfig
    base_model_prefix = "image"
    main_input_name = "pixel_values"
    input_modalities = ("image",)
    supports_gradient_checkpointing = True
    #: where `hftl.backbones` finds the pretrained part, of which the projection is the end
    towers: ClassVar[tuple[str, ...]] = ("image",)

    def __init__(self, config: Any) -> None:
        """The architecture, with weights that have learned nothing."""
        super().__init__(config)
        settings = CONFIG_MAPPING[config.dual_encoder["model_type"]].from_dict(dict(config.dual_encoder))
        with torch.device("meta"):  # of its text part nothing but the shapes is needed
            whole: Any = AutoModel.from_config(settings)
        vision_model = type(whole.vision_model)._from_config(settings.vision_config)
        projection: nn.Module = nn.Identity()
        width = whole.vision_model.config.hidden_size
        if found := getattr(whole, "visual_projection", None):
            width = found.out_features
            projection = nn.Linear(found.in_features, width, bias=found.bias is not None)
        self.image = ImageEncoder(vision_model, projection)
        self.head = nn.Linear(width, config.num_labels)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        """Those of the patches."""
        vision_model: Any = self.image.vision_model
        return vision_model.get_input_embeddings()

    def forward(self, pixel_values: torch.Tensor, labels: torch.Tensor | None = None) -> ImageClassifierOutput:
        """Logits of shape (rows, classes).

        Args:
            pixel_values: shape (rows, 3, height, width).
            labels: class ids, shape (rows,), for the loss.
        """
        features = self.image(pixel_values)
        # Cosines of 0.2 to 0.3 times 100: in half precision a logit would be right to an eighth.
        with torch.autocast(features.device.type, enabled=False):
            logits = self.head(features.to(next(self.head.parameters()).dtype))
        loss = None if labels is None else ForSequenceClassificationLoss(labels, logits, self.config)
        return ImageClassifierOutput(loss=loss, logits=logits)


def has_two_parts(kind: str) -> bool:
    """Whether models of a `model_type` have an image and a text part, as dual encoders do."""
    parts = getattr(CONFIG_MAPPING[kind], "sub_configs", {}) if kind in CONFIG_MAPPING else {}
    return {"vision_config", "text_config"} <= parts.keys()


def is_dual_encoder(config: Any) -> bool:
    """Whether a checkpoint of this configuration compares images with texts, and is nothing more than that.

    It is derived: from an image and a text part in the configuration, the two functions that give their vectors, and
    the class that the checkpoint says it is of, which for CLIPSeg or a CLIP with a head of its own is another.
    """
    if type(config) not in MODEL_MAPPING or not all(hasattr(config, f"{part}_config") for part in ("vision", "text")):
        return False
    model_class: Any = MODEL_MAPPING[type(config)]
    gives_both = all(hasattr(model_class, f"get_{part}_features") for part in ("image", "text"))
    return gives_both and (config.architectures or [model_class.__name__]) == [model_class.__name__]


def load_dual_encoder(
    source: str,
    label_names: Sequence[str],
    pixels: torch.Tensor,
    prompts: Sequence[str] | None,
    arguments: TransferArguments,
) -> DualEncoderForImageClassification:
    """The image part of a checkpoint with a head made of the texts of the classes, in float32.

    Its logits are compared with those of the checkpoint's own model for a picture and the texts of one prompt.

    Args:
        source: what `pretrained.find_model` gave.
        label_names: name of each class id; underscores become spaces.
        pixels: any picture as the model takes it, shape (1, 3, height, width).
        prompts: texts with `{label}` in them; None leaves the head fresh.
        arguments: for the device, the revision and what may be read.

    Raises:
        UsageError: the checkpoint cannot be loaded, or is of a kind that another head would be wrong for.
    """
    name = str(arguments.model_name_or_path)
    if flag := pretrained.few_bits_flag(arguments):
        raise UsageError(f"{flag}: a dual encoder with a head of texts is not quantised yet: add --prompts none.")
    with pretrained.explained_load(name, AutoModelForImageClassification):
        options = pretrained.hub_options(arguments, source)
        whole, report = AutoModel.from_pretrained(
            source,
            output_loading_info=True,
            dtype=torch.float32,
            **pretrained.weight_options(arguments),
            **options,
        )
        tokenizer = AutoTokenizer.from_pretrained(source, **options)
    if missing := sorted({*report["missing_keys"], *(entry[0] for entry in report["mismatched_keys"])}):
        raise UsageError(
            f"--model {name!r}: its weights fill not all of {type(whole).__name__} (first missing: {missing[0]}), and "
            "texts need all of it. --prompts none starts from a fresh head."
        )
    words, texts = ["cat", "dog"], list(prompts or PROMPTS)
    if prompts is not None:
        words = [label.replace("_", " ") for label in label_names]
        if without := [word for word in words if not re.search(r"[^\W\d]", word)]:
            say(
                f"prompts: {without[0]!r} is the name of a class and no word: texts can only tell what their words mean"
            )
    whole = whole.to(arguments.device).eval()
    try:
        model = _image_part(whole, label_names, prompts)
        if prompts is not None:
            with torch.no_grad():
                model.head.weight.copy_(_of_texts(whole, tokenizer, words, texts))
                model.head.bias.zero_()
        difference = _difference(whole, model, tokenizer, words, texts[0], pixels)
        if not difference <= _TOLERANCE:
            raise ValueError(f"its own logits are others, by {difference:.2g} of the largest")
    except (RuntimeError, ValueError, TypeError, AttributeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UsageError(
            f"--model {name!r} ({type(whole).__name__}) cannot get a head of texts, since it is not built as CLIP and "
            f"SigLIP are ({reason}). --prompts none leaves them out, where transformers has a classifier of it."
        ) from error
    if prompts is not None:
        if same := _same(model.head.weight):
            first, second = (label_names[row] for row in same)
            say(f"prompts: of {first!r} and {second!r} the texts say the same: none tells them apart")
        say(f"head: the texts of the classes, {len(texts)} of each ({texts[0].format(label=words[0])!r}, …)")
    return model.to("cpu")


def _same(weight: torch.Tensor) -> tuple[int, int] | None:
    """Two rows that are the same, if any are."""
    rows = nn.functional.normalize(weight.detach(), dim=1)
    found = ((rows @ rows.T).triu(1) > 1 - 1e-5).nonzero().tolist()
    return (found[0][0], found[0][1]) if found else None


def _image_part(
    whole: Any, label_names: Sequence[str], prompts: Sequence[str] | None
) -> DualEncoderForImageClassification:
    """The image part, with its weights, and a head to be filled, on the device of the whole."""
    labels = dict(enumerate(label_names))
    config = DualEncoderConfig(
        dual_encoder=pretrained.settings_of(whole.config),
        hidden_size=whole.vision_model.config.hidden_size,
        prompts=None if prompts is None else list(prompts),
        id2label=labels,
        label2id={name: number for number, name in labels.items()},
    )
    with torch.device("meta"):
        model = DualEncoderForImageClassification(config)
    device = next(whole.parameters()).device
    model.image = ImageEncoder(whole.vision_model, getattr(whole, "visual_projection", None) or nn.Identity())
    model.head = nn.Linear(model.head.in_features, model.head.out_features, device=device)
    return model.eval()


@torch.no_grad()
def _of_texts(whole: Any, tokenizer: Any, words: Sequence[str], prompts: Sequence[str]) -> torch.Tensor:
    """The weights of the head, shape (classes, features): of each class the mean vector of its texts, scaled.

    Prompt ensembling as Radford et al. 2021 do it (3.1.4): vectors of length 1 are averaged, and their mean is brought
    to length 1 again.
    """
    texts = [prompt.format(label=word) for word in words for prompt in prompts]
    vectors = []
    for start in range(0, len(texts), _TEXTS):
        found = whole.get_text_features(**_tokens(whole, tokenizer, texts[start : start + _TEXTS])).pooler_output
        vectors.append(nn.functional.normalize(found.float(), dim=-1))
    means = torch.cat(vectors).view(len(words), len(prompts), -1).mean(dim=1)
    return whole.logit_scale.exp() * nn.functional.normalize(means, dim=-1)


def _tokens(whole: Any, tokenizer: Any, texts: list[str]) -> Any:
    """Texts as the text part reads them.

    SigLIP was trained on texts padded to all of its positions, and reads the last of them, padding or not. To others
    it makes no difference: CLIP reads the end of the text, and nothing before that sees what comes behind; the rest
    mask the padding. Which it is, a short text tells: all positions can cost twenty times as much (BERT's 512).

    Raises:
        UsageError: a text is longer than that.
    """
    limit = min(whole.config.text_config.max_position_embeddings, tokenizer.model_max_length)
    padding = "max_length" if _minds_padding(whole, tokenizer, texts[0], limit) else "longest"
    inputs = tokenizer(texts, padding=padding, max_length=limit)
    for text, tokens in zip(texts, inputs["input_ids"], strict=True):
        if len(tokens) > limit:
            raise UsageError(
                f"{textwrap.shorten(text, 60)!r}, a prompt with the name of a class, is longer than the {limit} tokens "
                "that the model reads: shorten the name, or the --prompts."
            )
    return inputs.convert_to_tensors("pt").to(whole.device)


@torch.no_grad()
def _minds_padding(whole: Any, tokenizer: Any, text: str, limit: int) -> bool:
    """Whether the vector of a text depends on the padding behind it."""
    settings = {"max_length": limit, "truncation": True, "return_tensors": "pt"}
    padded, plain = (
        whole.get_text_features(**tokenizer([text], padding=padding, **settings).to(whole.device)).pooler_output
        for padding in ("max_length", False)
    )
    return not torch.allclose(padded, plain, rtol=_TOLERANCE, atol=_TOLERANCE * float(padded.abs().max()))


@torch.no_grad()
def _difference(
    whole: Any, model: Any, tokenizer: Any, words: Sequence[str], prompt: str, pixels: torch.Tensor
) -> float:
    """How far logits from texts of one prompt are from those of the checkpoint's own model, relative to the largest.

    What is the same for every class does not count.
    """
    few = list(words[:_TEXTS])
    inputs = _tokens(whole, tokenizer, [prompt.format(label=word) for word in few])
    pixels = pixels.to(whole.device)
    own = whole(**inputs, pixel_values=pixels).logits_per_image[0].float()
    ours = model.image(pixels)[0] @ _of_texts(whole, tokenizer, few, [prompt]).T
    return float(((ours - ours.mean()) - (own - own.mean())).abs().max() / own.abs().max().clamp(min=1.0))


AutoConfig.register(DualEncoderConfig.model_type, DualEncoderConfig)
AutoModelForImageClassification.register(DualEncoderConfig, DualEncoderForImageClassification)
