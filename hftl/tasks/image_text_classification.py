"""Classification of images with texts: any image backbone and any text backbone, joined by gates (late fusion)."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import math
import re
import shutil
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch.utils.data import Dataset
from transformers import AutoConfig, PreTrainedModel

from hftl import backbones, data, merging, pretrained
from hftl.arguments import NO_PROMPTS, ImageTextArguments, has_checkpoint, stage_arguments
from hftl.data import Splits
from hftl.errors import UsageError
from hftl.examples import Shown
from hftl.folder import read_json
from hftl.fusion import FusionConfig, FusionModel, Table
from hftl.modality import IMAGE_TEXT, is_missing
from hftl.tasks.classification import ClassificationTask
from hftl.tasks.image_classification import ImageClassification
from hftl.tasks.text_classification import TextClassification, TextDataset

_USAGE = """import hftl
from huggingface_hub import snapshot_download
folder = snapshot_download({title})
print(hftl.load_run(folder).predict({example}))"""
_PRESENCE = ("image_present", "text_present")
_NOT_TOKENS = {"pixel_values", "table", *_PRESENCE}
#: flags of images or texts that are not for both, and why
_REFUSED = {
    "text_pair_column": "it reads one text a row",
    "pooling": "it takes the mean of the tokens",
    "weights": "it has two backbones",
    "prompts": "its head reads images and texts",
    "load_in_4bit": "it is not quantised",
    "load_in_8bit": "it is not quantised",
    "mixup": "pictures would be mixed, and their texts not",
    "cutmix": "pictures would be mixed, and their texts not",
}
#: parts that are left out in training, and the most of each
_OF_THE_HEAD = {"modality_dropout": 0.3, "fusion_dropout": 0.9}
#: what stands for a picture that is missing, which the head does not look at: it has the shape of the others
_NO_PICTURE = Image.new("RGB", (256, 256), (128, 128, 128))


class ImageTextClassification(ClassificationTask):
    """One label for an image and a text, either of which may be missing."""

    name = "image-text-classification"
    modality = IMAGE_TEXT
    explains = True
    auto_class = FusionModel
    batch_size = 32
    arguments_class = ImageTextArguments
    arguments: ImageTextArguments

    def __init__(self, arguments: ImageTextArguments) -> None:
        """As every task; the two parts are prepared by the tasks of one modality."""
        super().__init__(arguments)
        for name, reason in _REFUSED.items():
            if self._is_set(name):
                raise UsageError(f"--{name} is not for {self.name}: {reason}. Leave it out.")
        #: what is read of other columns, see `Table`; None where nothing is
        self.table: dict[str, Any] | None = None
        self.image = ImageClassification(stage_arguments(arguments, prompts=NO_PROMPTS))
        # The mean of the tokens is taken: what a classifier has behind them would be lost.
        changes = {"model_name_or_path": arguments.text_model, "model_revision": "main", "pooling": "architecture"}
        text: Any = stage_arguments(arguments, **changes)
        self.text = TextClassification(text)

    def _is_set(self, name: str) -> bool:
        """Whether an argument differs from its default: a recipe gives all of them."""
        return getattr(self.arguments, name) != type(self.arguments).__dataclass_fields__[name].default

    def load_model(self, splits: Splits) -> PreTrainedModel:
        """Two backbones and a fresh head, or a model of an earlier run with one."""
        arguments = self.arguments
        if self._is_joined():
            source = pretrained.find_model(arguments.model_name_or_path)
            model = pretrained.load_model(FusionModel, source, self.label_names, arguments)
            self.load_processor(source)
            self._check_table()
            return model
        self.image.label_names = self.text.label_names = self.label_names
        image = self.image.load_model(splits)
        with _as_text_model():
            text = self.text.load_model(splits)
        self.table = self._learned_table(splits)
        pixels = self.image.plain_transform(_NO_PICTURE)[None]
        settings = {name: getattr(arguments, name) for name in _OF_THE_HEAD}
        return FusionModel.join(image, text, self.label_names, pixels, self.table, **settings)

    def load_splits(self) -> Splits:
        """As every task; what is wrong with the two models is said before any data is read."""
        arguments = self.arguments
        for name, most in _OF_THE_HEAD.items():
            value: float = getattr(arguments, name)
            if not 0 <= value <= most:
                raise UsageError(f"--{name} {value:g} is a part: it must lie between 0 and {most:g}.")
        pretrained.check_model_name(arguments.model_name_or_path, arguments.trust_remote_code)
        if self._is_joined():
            for name in (*_OF_THE_HEAD, "image_size", "max_length"):
                if self._is_set(name):
                    raise UsageError(f"--{name}: --model is an image-text model, which has its own. Leave it out.")
        elif arguments.text_model is None:
            raise UsageError(
                "--text_model is missing: --model names the image backbone, and --text_model the text backbone."
            )
        else:
            if arguments.keep_head:
                raise UsageError("--keep_head: two backbones have no head in common yet. Leave it out.")
            with _as_text_model():
                pretrained.check_model_name(arguments.text_model)
        return super().load_splits()

    def _learned_table(self, splits: Splits) -> dict[str, Any] | None:
        names = {"numbers": self.arguments.number_columns or [], "categories": self.arguments.category_columns or []}
        if not any(names.values()):
            return None
        return Table.learn(names, *(list(data.column_of(splits.train, kind)) for kind in names))

    def _check_table(self) -> None:
        """A run that is gone on with reads the columns that it read.

        Raises:
            UsageError: others were named.
        """
        for kind, names in (
            ("numbers", self.arguments.number_columns),
            ("categories", self.arguments.category_columns),
        ):
            known = [entry["name"] for entry in (self.table or {}).get(kind, [])]
            flag = {"numbers": "number_columns", "categories": "category_columns"}[kind]
            if known != (names or []):
                raise UsageError(f"--{flag}: --model reads {', '.join(known) or 'none'}: name the same.")

    def _others(self, value: Mapping[str, Any]) -> dict[str, Any]:
        """Numbers and categories of an input by the names of their columns, None where they are missing."""
        if self.table is None:
            return {}
        try:
            numbers = [data.as_number(value.get(entry["name"])) for entry in self.table["numbers"]]
        except ValueError as error:
            raise UsageError(f"An input holds {error}, which is no number.") from error
        categories = [data.as_category(value.get(entry["name"])) for entry in self.table["categories"]]
        return {"numbers": numbers, "categories": categories}

    def _is_joined(self) -> bool:
        """Whether `--model` is a model of this task already."""
        arguments = self.arguments
        if not has_checkpoint(arguments):
            return False
        source = pretrained.find_model(arguments.model_name_or_path)
        with pretrained.explained_load(str(arguments.model_name_or_path), self.image.auto_class):
            config = AutoConfig.from_pretrained(source, **pretrained.hub_options(arguments, source))
        if isinstance(config, FusionConfig) and arguments.text_model is not None:
            raise UsageError("--text_model: --model has a text backbone already. Leave it out.")
        return isinstance(config, FusionConfig)

    def load_processor(self, source: str | Path) -> None:
        """Set the processors of a finished run."""
        if not Path(source).is_dir():
            from huggingface_hub import snapshot_download

            source = snapshot_download(str(source), revision=self.arguments.model_revision)
        self.table = read_json(Path(source, "config.json")).get("table")
        self.image.load_processor(Path(source, "image"))
        self.text.load_processor(Path(source, "text"))

    def save_processor(self, target: Path) -> None:
        """Save the two backbones by themselves, with their processors: each loads with `AutoModel`."""
        if target.name == merging.BASE:  # those of the run above it
            for name in ("image", "text"):
                shutil.copytree(target.parent / name, target / name)
            return
        base = target / merging.BASE
        model: Any = FusionModel.from_pretrained(base if base.is_dir() else target, dtype=torch.float32)
        for name, task in (("image", self.image), ("text", self.text)):
            pretrained.save_model(model.get_submodule(name), target / name)
            task.save_processor(target / name)

    def dataset(self, rows: Any, training: bool) -> Dataset[dict[str, Any]]:
        """Images decoded when they are asked for, texts tokenised at once."""
        return ImageTextDataset(self.image.dataset(rows, training), self._texts(rows, training), self.table)

    def _texts(self, rows: Any, training: bool) -> Any:
        self.text.says_cut, self.text.is_training = self.says_cut, self.is_training
        texts = [{"text": text or ""} for text in data.column_of(rows, "text")]
        if len(rows) and "label" in rows[0]:
            texts = [{**row, "label": label} for row, label in zip(texts, data.column_of(rows, "label"), strict=True)]
        return self.text.dataset(texts, training)

    def kept_for_epochs(self, data: dict[str, Any]) -> dict[str, Any]:
        """As for images, where none are missing."""
        if not all(all(dataset.has_image) for dataset in data.values()):
            return data
        for name in ("num_train_epochs", "head_epochs"):  # which are known by now
            setattr(self.image.arguments, name, getattr(self.arguments, name))
        pictures = self.image.kept_for_epochs({name: dataset.pictures for name, dataset in data.items()})
        return {name: ImageTextDataset(pictures[name], rows.texts, self.table) for name, rows in data.items()}

    def views(self, rows: Any, count: int, training: Any) -> list[Any]:
        """As for images."""
        return [ImageTextDataset(view, training.texts, self.table) for view in self.image.views(rows, count, None)]

    def test_views(self, inputs: dict[str, torch.Tensor]) -> list[dict[str, torch.Tensor]]:
        """As for images."""
        return self.image.test_views(inputs)

    def preprocessing(self) -> Any:
        """As for images; the tokens and the table are part of a row's key."""
        return self.image.preprocessing()

    def inputs_in_words(self, splits: Splits, rows: Any) -> tuple[str, str]:
        """Of the images and the texts."""
        (pictures, one), (texts, other) = (
            self.image.inputs_in_words(splits, rows),
            self.text.inputs_in_words(splits, rows.texts),
        )
        return f"{pictures}; {texts}", one or other

    def usage(self, title: str) -> str:
        """Lines of hftl: the model is its own."""
        return _USAGE.format(title=json.dumps(title), example=self.modality.example)

    def shown(self, row: Mapping[str, Any], model: Any = None, label: int = 0) -> Shown:
        """The picture and the text; with a model, what in each speaks for the class, the other being as it is."""
        pictures, texts = model, model
        if model is not None:
            batch = self.collate([self.dataset([row], training=False)[0]])
            inputs = backbones.inputs_of(batch, model.device)
            pictures = _Beside(model, {name: value for name, value in inputs.items() if name != "pixel_values"})
            texts = _Beside(model, {name: inputs[name] for name in inputs if name in _NOT_TOKENS})
        return Shown(
            [] if is_missing(row.get("image")) else self.image.shown(row, pictures, label).pictures,
            [
                *(self.text.shown({"text": row["text"]}, texts, label).texts if row.get("text") else []),
                *self._cells(row),
            ],
        )

    def _cells(self, row: Mapping[str, Any]) -> list[list[tuple[str, float]]]:
        """Numbers and categories of a row, as a person reads them."""
        table = self.table or {"numbers": [], "categories": []}
        cells = [
            f"{entry['name']}: {value:g}" if isinstance(value, float) else f"{entry['name']}: {value}"
            for kind in ("numbers", "categories")
            for entry, value in zip(table[kind], row.get(kind) or [], strict=False)
        ]
        return [[(", ".join(cells), 0.0)]] if cells else []

    def collate(self, examples: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        """`pixel_values`, `input_ids`, `attention_mask`, …, and what is there: `image_present`, `text_present`."""
        tokens = [{name: value for name, value in example.items() if name not in _NOT_TOKENS} for example in examples]
        batch = self.text.collate(tokens)
        labels = {"labels": batch.pop("labels")} if "labels" in batch else {}
        if "pixel_values" in examples[0]:  # kept features stand for them else
            batch = {**self.image.collate([{"pixel_values": row["pixel_values"]} for row in examples]), **batch}
        if "table" in examples[0]:
            batch["table"] = torch.stack([example["table"] for example in examples])
        for name in _PRESENCE:
            batch[name] = torch.tensor([example[name] for example in examples])
        return batch | labels

    def read_inputs(self, inputs: Any, columns: Mapping[str, str] | None = None) -> Any:
        """A table or folder, or one or a list of `{"image": …, "text": …}`, either of which may be missing.

        Numbers and categories stand beside them by the names of their columns.
        """
        if isinstance(inputs, str | Path):
            known = {"image": self.arguments.image_column, "text": self.arguments.text_column}
            links = self.arguments.follow_links
            return data.load_inputs(str(inputs), self.modality, columns or {}, known, links, self.arguments)
        rows = []
        for number, value in enumerate(inputs if isinstance(inputs, list | tuple) else [inputs]):
            if not isinstance(value, Mapping) or not {"image", "text"} & value.keys():
                raise UsageError("The model reads images with texts: give {'image': …, 'text': …}, or one of them.")
            image, text = (value.get(name) for name in ("image", "text"))
            image, text = ("" if _is_nothing(part) else part for part in (image, text))
            if not isinstance(text, str):
                raise UsageError(f"The text of input {number} is none: {text!r}.")
            rows.append({"id": str(number), "image": image, "text": text, **self._others(value)})
        return rows


def _is_nothing(value: Any) -> bool:
    """None, or what pandas has for it."""
    return value is None or (isinstance(value, float) and math.isnan(value))


@contextlib.contextmanager
def _as_text_model() -> Iterator[None]:
    """Errors about `--model` are about `--text_model`."""
    try:
        yield
    except UsageError as error:
        raise UsageError(re.sub(r"--model\b", "--text_model", str(error))) from error


class _Beside:
    """A model whose other inputs, of one row, are held."""

    def __init__(self, model: Any, inputs: Mapping[str, torch.Tensor]) -> None:
        self.model, self.inputs = backbones.without_adapters(model), inputs

    def __getattr__(self, name: str) -> Any:
        return getattr(self.model, name)

    def __call__(self, **inputs: torch.Tensor) -> Any:
        rows = len(next(iter(inputs.values())))
        return self.model(**inputs, **{name: held.expand(rows, *held.shape[1:]) for name, held in self.inputs.items()})


class ImageTextDataset(Dataset[dict[str, Any]]):
    """Rows with an image and a text, one of which may be missing.

    Attributes:
        pictures: the images.
        texts: the texts.
        cut: texts that were longer than the model reads.
    """

    def __init__(self, pictures: Any, texts: TextDataset, table: Mapping[str, Any] | None = None) -> None:
        """Both of the same rows, and what is read of their other columns."""
        self.pictures, self.texts, self.cut = pictures, texts, texts.cut
        self.has_image = [not is_missing(value) for value in data.column_of(self.rows, "image")]
        self.has_text = [bool((text or "").strip()) for text in data.column_of(self.rows, "text")]
        self.table: torch.Tensor | None = None
        if table is not None:
            blank = {"numbers": [math.nan] * len(table["numbers"]), "categories": [""] * len(table["categories"])}
            cells = [[value or none for value in data.column_of(self.rows, name)] for name, none in blank.items()]
            vector = Table(table).vector
            self.table = torch.tensor([vector(*row) for row in zip(*cells, strict=True)])

    def set_epoch(self, epoch: int) -> None:
        """Choose what is random in the next pass."""
        self.pictures.set_epoch(epoch)
        self.texts.set_epoch(epoch)

    def __len__(self) -> int:
        """Number of rows."""
        return len(self.texts)

    @property
    def rows(self) -> Any:
        """The rows as they were given."""
        return self.pictures.rows

    @property
    def view(self) -> int | None:
        """The number of a fixed augmented view."""
        return self.pictures.view

    @property
    def labels(self) -> list[Any] | None:
        """As `hftl.data.labels_of`, where the rows have them."""
        return self.texts.labels

    def key(self, index: int, full: bool = False) -> int:
        """64 bits for the content of a row."""
        image = self.pictures.key(index, full) if self.has_image[index] else 0
        cells = "" if self.table is None else self.table[index].tolist()
        both = f"{image} {self.texts.key(index)} {self.has_text[index]} {cells}"
        return int.from_bytes(hashlib.blake2b(both.encode(), digest_size=8).digest(), "little")

    def missing(self, rows: Sequence[int]) -> Counter[str]:
        """How many of some rows have no image, no text, and nothing in the other columns."""
        has_table = [True] * len(self) if self.table is None else (~self.table.isnan().any(dim=1)).tolist()
        there = {"image": self.has_image, "text": self.has_text, "other columns": has_table}
        return Counter({what: sum(not has[row] for row in rows) for what, has in there.items()})

    def without_files(self, index: int) -> dict[str, Any]:
        """A row but its picture, which need not be read."""
        table = {} if self.table is None else {"table": self.table[index]}
        there = {"image_present": self.has_image[index], "text_present": self.has_text[index]}
        return {**self.texts[index], **there, **table}

    def __getitem__(self, index: int) -> dict[str, Any]:
        """`pixel_values`, tokens, what is there, and `labels` where the row has one.

        Raises:
            UsageError: there is neither an image nor a text, or the image cannot be read.
        """
        if not (self.has_image[index] or self.has_text[index]):
            raise UsageError(f"row {self.rows[index]['id']} has neither an image nor a text")
        picture = self.pictures[index] if self.has_image[index] else self._no_picture
        return {**picture, **self.without_files(index)}

    @functools.cached_property
    def _no_picture(self) -> dict[str, Any]:
        with torch.random.fork_rng(devices=[]):
            return {"pixel_values": self.pictures.transform(_NO_PICTURE)}
