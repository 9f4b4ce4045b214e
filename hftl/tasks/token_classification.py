"""Token classification: a tag for every word, with any model of `AutoModelForTokenClassification`."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset
from transformers import AutoModelForTokenClassification, AutoTokenizer, DataCollatorForTokenClassification

from hftl import pretrained
from hftl.arguments import TokenArguments
from hftl.data import Splits, labels_of
from hftl.errors import UsageError
from hftl.examples import Shown
from hftl.modality import WORDS
from hftl.problems.base import Result
from hftl.problems.word_tags import NO_WORD, is_entities
from hftl.tasks.text_classification import TextClassification, TextDataset, masking_token
from hftl.words import as_words, joined, lines, split_words

_USAGE = """from transformers import pipeline
find = pipeline("token-classification", {title}{how})
print(find({example}))"""


class TokenClassification(TextClassification):
    """A tag for every word of a text: names of people and places, parts of speech.

    The model reads tokens, of which a word may have several: the first one has its tag, as in the BERT paper (Devlin et
    al. 2019, 5.3), and the others count neither in the loss nor in the scores.
    """

    name = "token-classification"
    modality = WORDS
    explains = False
    auto_class = AutoModelForTokenClassification
    arguments_class = TokenArguments  # which has what texts of one label have, as constants

    def load_processor(self, source: str | Path) -> None:
        """Set the tokenizer of a checkpoint, one that splits words as it splits them in a text.

        Raises:
            UsageError: it cannot say to which word a token belongs.
        """
        super().load_processor(source)
        if not self.processor.is_fast:
            raise UsageError(
                f"--model {str(source)!r}: its tokenizer ({type(self.processor).__name__}) does not say to which word "
                "a token belongs, as those of the tokenizers library do: choose another model."
            )
        if not _keeps_spaces(self.processor):  # GPT-2 and RoBERTa would read "a b" as "ab"
            options = pretrained.hub_options(self.arguments, source)
            self.processor = AutoTokenizer.from_pretrained(source, add_prefix_space=True, **options)
            if not _keeps_spaces(self.processor):
                raise UsageError(
                    f"--model {str(source)!r}: its tokenizer ({type(self.processor).__name__}) makes other tokens of "
                    "words that are given one by one than of the same words in a text: choose another model."
                )
        self.processor.padding_side = "right"  # logits are found by the places of tokens from the left

    def dataset(self, rows: Any, training: bool) -> Dataset[dict[str, Any]]:
        """Words as tokens; how many rows were cut is said."""
        encoded = WordDataset(rows, self.processor, keep=self.keeps_tokens)
        if training and self.arguments.word_dropout:
            encoded.drop_words(self.arguments.word_dropout, masking_token(self.processor), self.arguments.seed)
        behind = "are not learned from" if training else "count as wrong"
        return self._told(encoded, training, f"; the words behind {behind}")

    def collate(self, examples: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        """`input_ids`, `attention_mask`, … and `labels` if there are any, each of shape (rows, tokens)."""
        return dict(DataCollatorForTokenClassification(self.processor, pad_to_multiple_of=8)(list(examples)))

    def by_row(self, logits: np.ndarray[Any, Any], dataset: Any, rows: Sequence[int]) -> np.ndarray[Any, Any]:
        """Logits of the words, shape (rows, words of the longest row of all, tags); no numbers where one is not read.

        Args:
            logits: of the tokens, shape (rows, tokens, tags).
            dataset: what `dataset` made.
            rows: their numbers in it.
        """
        found = np.full((len(rows), dataset.most_words, logits.shape[2]), np.nan, dtype=np.float32)
        for position, row in enumerate(rows):
            tokens = np.array(dataset.first_tokens[row], dtype=int)
            found[position, : len(tokens)] = np.where(tokens[:, None] < 0, np.nan, logits[position, tokens])
        return found

    def of_rows(self, results: dict[str, Result], splits: Splits, data: Mapping[str, Any]) -> dict[str, Result]:
        """The results by word: those that the model does not read count too, unlike in the course of training."""
        by_word = {}
        for split, (logits, _, scores) in results.items():
            labels = labels_of(getattr(splits, split))
            logits = self.by_row(logits, data[split], range(len(labels)))
            by_word[split] = (logits, labels, {"loss": scores["loss"], **self.score(logits, labels)})
        return by_word

    def shown(self, row: Mapping[str, Any], model: Any = None, label: int = 0) -> Shown:
        """The words."""
        return Shown(texts=[[(" ".join(lines(row["text"])), 0.0)]])

    def usage(self, title: str) -> str:
        """The lines of Python that load the saved model; words of one entity come together."""
        how = ', aggregation_strategy="first"' if is_entities(self.label_names) else ""
        return _USAGE.format(title=json.dumps(title), how=how, example=self.modality.example)

    def read_inputs(self, inputs: Any, columns: Mapping[str, str] | None = None) -> Any:
        """A text, a list of texts or of lists of words, or the path of a file of them (as `pathlib.Path`)."""
        if isinstance(inputs, Path):
            return super().read_inputs(inputs, columns)
        values = [inputs] if isinstance(inputs, str) else inputs
        if not isinstance(values, list | tuple) or not all(isinstance(one, str) or _is_words(one) for one in values):
            raise UsageError("The model tags words: give a text, a list of texts, or a list of lists of words.")
        return [
            {"id": str(number), "text": joined(split_words(value) if isinstance(value, str) else as_words(value))}
            for number, value in enumerate(values)
        ]


class WordDataset(TextDataset):
    """Rows with words, and perhaps a tag for each, as token ids without padding.

    Attributes:
        first_tokens: of each row the place of the first token of every word; -1 where it has none, or is cut off.
        most_words: of the row that has most.
    """

    def __init__(self, rows: Any, tokenizer: Any, keep: bool = False) -> None:
        """Tokenise all rows; perhaps they are kept on the disk."""
        self.first_tokens: list[list[int]] = []
        super().__init__(rows, tokenizer, keep=keep)
        self.most_words = max(map(len, self.first_tokens), default=0)

    def _encoded(self, chunk: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """What the tokenizer makes of the words of some rows."""
        words = [lines(row["text"]) for row in chunk]
        tokens = self.kept.get([words], "words", lambda: self._tokenised(words, words=True))
        for own, owners in zip(words, tokens.words, strict=True):
            first = [-1] * len(own)
            for place, word in reversed(list(enumerate(owners))):
                if word >= 0:
                    first[word] = place
            self.first_tokens.append(first)
        return self._counted(tokens)

    def _labels(self, label: Any, row: int, tokens: int) -> list[int]:
        """The tag of every word at its first token."""
        labels = [NO_WORD] * tokens
        for tag, place in zip(label, self.first_tokens[row], strict=False):  # behind the tags there is padding
            if place >= 0:
                labels[place] = int(tag)
        return labels


def _is_words(value: Any) -> bool:
    return isinstance(value, list | tuple) and all(isinstance(word, str) for word in value)


def _keeps_spaces(tokenizer: Any) -> bool:
    """Whether words that are given one by one become the tokens that they are in a text."""
    given = tokenizer([["a", "b"]], is_split_into_words=True, add_special_tokens=False).input_ids[0]
    return given == tokenizer("a b", add_special_tokens=False).input_ids
