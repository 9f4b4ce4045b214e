"""Any image backbone and any text backbone side by side, their features joined by gates: one ordinary model."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from torch import nn
from transformers import CONFIG_MAPPING, AutoConfig, AutoModel, PreTrainedConfig, PreTrainedModel
from transformers.loss.loss_utils import ForSequenceClassificationLoss
from transformers.modeling_outputs import SequenceClassifierOutput

from hftl.errors import UsageError
from hftl.joined import mean_of_positions
from hftl.pretrained import settings_of

#: values of a category that are told apart, the most frequent
_MOST_VALUES = 100


class FusionConfig(PreTrainedConfig):
    """Settings of a `FusionModel`.

    Attributes:
        image: the configuration of the image backbone, as a dictionary.
        text: that of the text backbone.
        feature_sizes: features that the image backbone gives, the text backbone, and the table where there is one.
        table: what is read of other columns, see `hftl.fusion.Table`; None where nothing is.
        fusion_width: features that each is projected to.
        fusion_dropout: part of the joined features that are left out in training.
        modality_dropout: part of the training rows that lose their image, and as many their text, where they have both:
            the model then answers from either (Neverova et al. 2016).
    """

    model_type = "hftl_image_text"
    image: Mapping[str, Any] | None = None
    text: Mapping[str, Any] | None = None
    feature_sizes: tuple[int, ...] = ()
    table: Mapping[str, Any] | None = None
    fusion_width: int = 256
    fusion_dropout: float = 0.1
    modality_dropout: float = 0.1


class Table:
    """Numbers and categories of a row as one vector, by what training had of them.

    Numbers are standardised, and a missing one is the mean, with a 1 beside it that says so; a category is one 1 among
    those that training had, and none where it had not.
    """

    def __init__(self, settings: Mapping[str, Any]) -> None:
        """`settings` as `learn` gives them: `numbers` with mean and deviation, `categories` with their values."""
        self.numbers, self.categories = settings["numbers"], settings["categories"]
        self.places = [{value: place for place, value in enumerate(entry["values"])} for entry in self.categories]

    @staticmethod
    def learn(
        names: Mapping[str, list[str]], numbers: Sequence[Sequence[float]], categories: Sequence[Sequence[str]]
    ) -> dict[str, Any]:
        """The settings, from the rows of the training split.

        Args:
            names: of the columns, `numbers` and `categories`.
            numbers: one list a row.
            categories: one list a row.
        """
        columns: Any = np.array(numbers, dtype=float).T if names["numbers"] else []
        learned = []
        for name, column in zip(names["numbers"], columns, strict=True):
            known = column[np.isfinite(column)]
            mean, deviation = (float(known.mean()), float(known.std())) if len(known) else (0.0, 1.0)
            learned.append({"name": name, "mean": mean, "deviation": deviation or 1.0})
        values = []
        for place, name in enumerate(names["categories"]):
            counts = Counter(row[place] for row in categories if row[place])
            values.append({"name": name, "values": sorted(value for value, _ in counts.most_common(_MOST_VALUES))})
        return {"numbers": learned, "categories": values}

    @property
    def width(self) -> int:
        """Features of a row."""
        return 2 * len(self.numbers) + sum(len(entry["values"]) for entry in self.categories)

    def vector(self, numbers: Sequence[float], categories: Sequence[str]) -> list[float]:
        """Features of a row; NaN where nothing of it is known."""
        vector: list[float] = []
        known = False
        for entry, value in zip(self.numbers, numbers, strict=True):
            there = math.isfinite(value)
            known |= there
            vector += [(value - entry["mean"]) / entry["deviation"] if there else 0.0, 0.0 if there else 1.0]
        for places, category in zip(self.places, categories, strict=True):
            part = [0.0] * len(places)
            if category in places:
                part[places[category]], known = 1.0, True
            vector += part
        return vector if known else [math.nan] * len(vector)


class FusionHead(nn.Module):
    """Features of several backbones to logits, by gated units: each says how much of the others passes.

    The bimodal units of Arevalo et al. 2017 (GMU), a hidden layer behind them. What is missing is a learned vector.
    """

    def __init__(self, config: Any) -> None:
        """Layers of the sizes that a `FusionConfig` gives."""
        super().__init__()
        width, sizes = config.fusion_width, list(config.feature_sizes)
        self.sizes, self.modality_dropout = sizes, config.modality_dropout
        self.norms = nn.ModuleList(nn.LayerNorm(size) for size in sizes)
        self.projections = nn.ModuleList(nn.Linear(size, width) for size in sizes)
        self.missing = nn.Parameter(torch.zeros(len(sizes), width))
        self.gate = nn.Linear(len(sizes) * width, len(sizes) * width)
        self.hidden = nn.Linear(len(sizes) * width, width)
        self.dropout = nn.Dropout(config.fusion_dropout)
        self.output = nn.Linear(width, config.num_labels)

    def reset_parameters(self) -> None:
        """Nothing is known of what is missing."""
        nn.init.zeros_(self.missing)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """Logits of shape (rows, classes).

        Args:
            features: those of each backbone, one after the other, and a 1 for each that is there:
                shape (rows, sum of sizes + backbones).
        """
        *parts, there = features.split([*self.sizes, len(self.sizes)], dim=1)
        present = there > 0.5
        if self.training and self.modality_dropout:
            present = present & ~self._dropped(present)
        seen = [
            torch.where(present[:, [number]], torch.tanh(project(norm(part))), self.missing[number])
            for number, (part, norm, project) in enumerate(zip(parts, self.norms, self.projections, strict=True))
        ]
        joined = torch.cat(seen, dim=1)
        hidden = nn.functional.gelu(self.hidden(joined * torch.sigmoid(self.gate(joined))))
        return self.output(self.dropout(hidden))

    def _dropped(self, present: torch.Tensor) -> torch.Tensor:
        """What is left out of each row, at most one and never the only one; shape (rows, backbones)."""
        draws = torch.rand(len(present), 1, device=present.device)
        ends = self.modality_dropout * torch.arange(1, len(self.sizes) + 1, device=present.device)
        return (draws < ends) & (draws >= ends - self.modality_dropout) & present.all(dim=1, keepdim=True)


class FusionModel(PreTrainedModel):
    """An image backbone, a text backbone, and a `FusionHead` on what they see.

    Both are ordinary models of `AutoModel`, in `image` and `text`. Of the image the features are those that its authors
    pool, of the text the mean of the tokens.
    """

    config_class = FusionConfig
    main_input_name = "pixel_values"
    #: where `hftl.backbones` finds the pretrained parts
    towers: ClassVar[tuple[str, ...]] = ("image", "text")

    def __init__(self, config: Any) -> None:
        """The architecture, with weights that have learned nothing."""
        super().__init__(config)
        self.image, self.text = (_body(_as_config(settings)) for settings in (config.image, config.text))
        self.fusion_head = FusionHead(config)
        self.post_init()

    @classmethod
    def join(
        cls,
        image: PreTrainedModel,
        text: PreTrainedModel,
        label_names: list[str],
        pixels: torch.Tensor,
        table: dict[str, Any] | None = None,
        **settings: Any,
    ) -> FusionModel:
        """A model of two pretrained classifiers without their heads, and a fresh head for the labels.

        Args:
            image: of `AutoModelForImageClassification`.
            text: of `AutoModelForSequenceClassification`.
            label_names: name of each class id.
            pixels: a picture as the image backbone takes it, shape (1, 3, height, width).
            table: what is read of other columns, see `Table`.
            settings: as the attributes of `FusionConfig`.

        Raises:
            UsageError: one of them is more than a backbone with a head.
        """
        labels = dict(enumerate(label_names))
        bodies = [_body_of(image), _body_of(text)]
        with torch.no_grad():
            pictures = _tried(bodies[0], lambda body: _pooled(body(pixel_values=pixels)))
            ids = torch.ones(1, 4, dtype=torch.long)
            tokens = _tried(bodies[1], lambda body: body(input_ids=ids).last_hidden_state)
        config = FusionConfig(
            image=settings_of(_own_config(image)),
            text=settings_of(text.config),
            feature_sizes=(pictures.shape[-1], tokens.shape[-1], *([Table(table).width] if table else [])),
            table=table,
            id2label=labels,
            label2id={name: number for number, name in labels.items()},
            **settings,
        )
        model = cls(config)
        model.image, model.text = bodies
        return model

    def get_input_embeddings(self) -> nn.Module:
        """Those of the text."""
        return self.text.get_input_embeddings()

    def forward(
        self,
        pixel_values: torch.Tensor,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        image_present: torch.Tensor | None = None,
        text_present: torch.Tensor | None = None,
        table: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        **tokens: torch.Tensor,
    ) -> SequenceClassifierOutput:
        """Logits of shape (rows, classes).

        Args:
            pixel_values: shape (rows, 3, height, width), anything where there is no image.
            input_ids: shape (rows, tokens); attention_mask and what else the text backbone takes as well.
            attention_mask: 1 for tokens, 0 for padding.
            image_present: whether a row has an image, shape (rows,); all have one without it.
            text_present: the same of texts.
            table: numbers and categories as `Table.vector` makes them, shape (rows, width), NaN where all are missing.
            labels: class ids, shape (rows,), for the loss.
        """
        image = _pooled(self.image(pixel_values=pixel_values))
        states = self.text(input_ids=input_ids, attention_mask=attention_mask, **tokens).last_hidden_state
        text = mean_of_positions(states, attention_mask)
        everywhere = torch.ones(len(image), dtype=torch.bool, device=image.device)
        there = [everywhere if flag is None else flag for flag in (image_present, text_present)]
        parts = [image, text.to(image)]
        if self.config.table is not None:
            size = (len(image), self.config.feature_sizes[-1])
            table = image.new_full(size, torch.nan) if table is None else table.to(image)
            there.append(~table.isnan().any(dim=1))
            parts.append(table.nan_to_num())
        logits = self.fusion_head(torch.cat([*parts, torch.stack(there, dim=1).to(image)], dim=1))
        loss = None if labels is None else ForSequenceClassificationLoss(labels, logits, self.config)
        return SequenceClassifierOutput(loss=loss, logits=logits)


def _tried(body: Any, call: Callable[[Any], torch.Tensor]) -> torch.Tensor:
    """What a backbone gives.

    Raises:
        UsageError: it wants other inputs (T5's decoder, say).
    """
    try:
        return call(body.eval())
    except (RuntimeError, ValueError, TypeError, AttributeError) as error:
        raise UsageError(
            f"{type(body).__name__} cannot be a part of an image-text model: it does not run on an image or a text by "
            "itself. Choose another model."
        ) from error


def _as_config(settings: Any) -> Any:
    return CONFIG_MAPPING[settings["model_type"]].from_dict(dict(settings))


def _body(config: Any) -> Any:
    """The backbone of a configuration, without a pooler that has weights: it serves a head that is not there."""
    body: Any = AutoModel.from_config(config)
    pooler = getattr(body, "pooler", None)
    if pooler is not None and any(isinstance(part, nn.Linear) for part in pooler.modules()):
        body.pooler = None
    return body


def _own_config(model: Any) -> Any:
    """The configuration of a classifier's backbone; of CLIP's and SigLIP's that of their image part."""
    return model.config.vision_config if hasattr(model.config, "text_config") else model.config


def _body_of(model: Any) -> Any:
    """The backbone of a classifier, with its weights.

    Raises:
        UsageError: the classifier is more than a backbone with a head.
    """
    body = _body(_own_config(model))
    prefix = "timm_model." if hasattr(body, "timm_model") else ""
    part = model.base_model if _own_config(model) is model.config else model.vision_model
    inside = {f"{prefix}{name}": value for name, value in part.state_dict().items()}
    if missing := body.state_dict().keys() - inside.keys():
        raise UsageError(
            f"{type(model).__name__} cannot be a part of an image-text model: it has no {min(missing)}, unlike "
            f"{type(body).__name__}. Choose another model."
        )
    body.load_state_dict({name: inside[name] for name in body.state_dict()})
    return body


def _pooled(outputs: Any) -> torch.Tensor:
    """One vector an image, shape (rows, features): as the model pools, else the first token, or the mean of places."""
    pooled = getattr(outputs, "pooler_output", None)
    if pooled is not None:
        return pooled.flatten(1)
    states = outputs.last_hidden_state
    return states[:, 0] if states.ndim == 3 else states.mean(dim=(2, 3))


AutoConfig.register(FusionConfig.model_type, FusionConfig)
