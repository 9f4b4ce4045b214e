"""Multiple choice: which of several texts goes with a text, with any model of `AutoModelForMultipleChoice`."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset
from transformers import AutoModelForMultipleChoice, DataCollatorWithPadding

from hftl import data
from hftl.arguments import ChoiceArguments
from hftl.data import Splits
from hftl.errors import UsageError
from hftl.examples import Shown
from hftl.modality import CHOICES
from hftl.tasks.text_classification import TextClassification, TextDataset

_USAGE = """import torch
from transformers import AutoModelForMultipleChoice, AutoTokenizer
tokenizer = AutoTokenizer.from_pretrained({title})
model = AutoModelForMultipleChoice.from_pretrained({title})
question, choices = "A question?", ["One answer.", "Another one."]
inputs = tokenizer([question] * len(choices), choices, truncation=True, padding=True, return_tensors="pt")
with torch.no_grad():
    print(model(**{{name: values[None] for name, values in inputs.items()}}).logits.softmax(-1))"""


class MultipleChoice(TextClassification):
    """Which of a row's choices is the right one: an answer to a question, an ending of a story.

    The model reads the text with each choice and gives each a score; the softmax is over the choices of a row, as in
    the BERT paper (Devlin et al. 2019, 4.4).
    """

    name = "multiple-choice"
    modality = CHOICES
    explains = False
    auto_class = AutoModelForMultipleChoice
    batch_size = 8  # rows, each read as often as it has choices
    arguments_class = ChoiceArguments
    arguments: ChoiceArguments

    def _texts_of(self, splits: Splits) -> Iterator[str]:
        """Also the choices."""
        yield from super()._texts_of(splits)
        for choices in splits.train["choices"][:]:
            yield from choices

    def dataset(self, rows: Any, training: bool) -> Dataset[dict[str, Any]]:
        """Texts with each of their choices, tokenised at once; how many rows were cut is said.

        Raises:
            UsageError: `--word_dropout`.
        """
        if self.arguments.word_dropout:
            raise UsageError("--word_dropout would leave out other words of each choice. Leave it out.")
        return self._told(ChoiceDataset(rows, self.processor, keep=self.keeps_tokens), training)

    def collate(self, examples: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        """`input_ids`, `attention_mask`, … of shape (rows, choices, tokens), `labels` of shape (rows,)."""
        names = [name for name in examples[0] if name != "labels"]
        count = len(examples[0]["input_ids"])
        each = [{name: example[name][place] for name in names} for example in examples for place in range(count)]
        padded = DataCollatorWithPadding(self.processor, pad_to_multiple_of=8)(each)
        batch = {name: values.view(len(examples), count, -1) for name, values in padded.items()}
        if "labels" in examples[0]:
            batch["labels"] = torch.tensor([example["labels"] for example in examples])
        return batch

    def shown(self, row: Mapping[str, Any], model: Any = None, label: int = 0) -> Shown:
        """The text and its choices."""
        return Shown(texts=[[(text, 0.0)] for text in (row["text"], *row["choices"])])

    def usage(self, title: str) -> str:
        """The lines of Python that load the saved model; transformers has no pipeline for it."""
        return _USAGE.format(title=json.dumps(title))

    def read_inputs(self, inputs: Any, columns: Mapping[str, str] | None = None) -> Any:
        """`{"text": …, "choices": […]}`, a list of such, or the path of a table (as `pathlib.Path`)."""
        count, columns = len(self.label_names), columns or {}
        if isinstance(inputs, Path):
            known = {"text": self.arguments.text_column, "choices": self.arguments.choices_column}
            others = None if "choices" in columns else self.arguments
            rows = data.load_inputs(str(inputs), self.modality, columns, known, others=others)
            if len(rows[0]["choices"]) != count:
                found = len(rows[0]["choices"])
                raise UsageError(f"{inputs}: its rows have {found} choices, and the model chooses one of {count}.")
            return rows
        values = [inputs] if isinstance(inputs, Mapping) else inputs
        if not isinstance(values, list | tuple) or not all(_fits(value, count) for value in values):
            raise UsageError(f'The model chooses one of {count}: give {{"text": …, "choices": [{count} texts]}}.')
        return [
            {"id": str(number), "text": value["text"], "choices": list(value["choices"])}
            for number, value in enumerate(values)
        ]

    def _trial(self, texts: list[str]) -> dict[str, torch.Tensor]:
        """With one choice."""
        return {name: values[:, None] for name, values in super()._trial(texts).items()}


def _fits(value: Any, count: int) -> bool:
    """Whether a value is a text with so many choices."""
    if not isinstance(value, Mapping) or not isinstance(value.get("choices"), list | tuple):
        return False
    texts = [value.get("text"), *value["choices"]]
    return len(texts) == count + 1 and all(isinstance(text, str) for text in texts)


class ChoiceDataset(TextDataset):
    """Rows with a text and several choices, each choice as token ids behind those of the text."""

    def __init__(self, rows: Any, tokenizer: Any, keep: bool = False) -> None:
        """Tokenise all rows; perhaps they are kept on the disk."""
        super().__init__(rows, tokenizer, keep=keep)
        self.lengths = [sum(map(len, example["input_ids"])) for example in self.examples]

    def _encoded(self, chunk: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """What the tokenizer makes of some rows with each of their choices."""
        pairs = [(row["text"], choice) for row in chunk for choice in row["choices"]]
        texts, choices = (list(part) for part in zip(*pairs, strict=True))
        tokens = self.kept.get([texts, choices], "texts", lambda: self._tokenised(texts, choices))
        ends = np.cumsum([len(row["choices"]) for row in chunk]).tolist()
        parts = [slice(start, end) for start, end in zip([0, *ends], ends, strict=False)]
        self.cut += sum(any(tokens.cut[part]) for part in parts)
        return [{name: values[part] for name, values in tokens.columns.items()} for part in parts]
