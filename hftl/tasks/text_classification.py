"""Text classification, of single texts or pairs, with any model of `AutoModelForSequenceClassification`."""

from __future__ import annotations

import hashlib
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from hftl import data, pooling, pretrained
from hftl.arguments import TextArguments, has_checkpoint
from hftl.data import Splits
from hftl.errors import UsageError
from hftl.examples import Shown
from hftl.explain import token_attributions
from hftl.folder import say
from hftl.modality import TEXT
from hftl.tasks.classification import ClassificationTask
from hftl.tokens import KeptTokens, Tokens

#: texts tokenised in one call; the tokenizers library works on them in parallel
_CHUNK = 1_000
#: part of the texts that may be cut without a word
_CUT = 0.05
#: characters of a text in a report
_SHOWN = 400


class TextClassification(ClassificationTask):
    """One label a text, or a pair of texts."""

    name = "text-classification"
    modality = TEXT
    explains = True
    auto_class = AutoModelForSequenceClassification
    batch_size = 16  # the BERT paper's 16 to 32; the smaller one gives a small data set more steps
    arguments_class = TextArguments
    arguments: TextArguments

    def load_model(self, splits: Splits) -> PreTrainedModel:
        """The model and its tokenizer; a decoder without a padding token gets its end-of-text token as one."""
        name = str(self.arguments.model_name_or_path)
        if not has_checkpoint(self.arguments):
            return self._random_model(name.partition(":")[2], splits)
        source = pretrained.find_model(self.arguments.model_name_or_path)
        model = pretrained.load_model(self.auto_class, source, self.label_names, self.arguments)
        self.load_processor(source)
        if len(self.processor) > model.get_input_embeddings().num_embeddings:
            raise UsageError(
                f"--model {name!r}: its tokenizer has more tokens than the model: they do not belong together."
            )
        if self.processor.pad_token is None:
            self.processor.pad_token = self.processor.eos_token
        model.config.get_text_config().pad_token_id = self.processor.pad_token_id
        model.config.pad_token_id = self.processor.pad_token_id
        self._limit_length(model)
        wants_mean = self.arguments.pooling == "mean"
        if wants_mean or (
            self.arguments.pooling == "auto" and pooling.declares_mean(source, self.arguments.model_revision)
        ):
            return self._pooled_by_mean(model)
        return model

    def _limit_length(self, model: PreTrainedModel) -> None:
        """The tokenizer cuts where it is asked to, and no later than the model's positions and its own limit end."""
        positions = getattr(model.config, "max_position_embeddings", None) or self.arguments.max_length
        for name, module in model.named_modules():
            # RoBERTa's position ids start behind the padding id.
            if name.endswith("position_embeddings") and getattr(module, "padding_idx", None) is not None:
                positions -= module.padding_idx + 1
        limit = min(self.arguments.max_length, positions, self.processor.model_max_length)
        special = self.processor.num_special_tokens_to_add(pair=self.arguments.text_pair_column is not None)
        if limit <= special:
            raise UsageError(f"--max_length {limit} leaves no room for a text beside {special} special tokens.")
        self.processor.model_max_length = limit

    def _pooled_by_mean(self, model: PreTrainedModel) -> PreTrainedModel:
        pooled = pooling.pool_by_mean(model)
        if pooled is not None:
            say("pooling: the mean of the tokens")
            return pooled
        say(
            f"pooling: {type(model).__name__} has no mean pooling without custom code, so that plain transformers "
            "could not load it; the architecture's own pooling is kept"
        )
        return model

    def _random_model(self, architecture: str, splits: Splits) -> PreTrainedModel:
        self.processor = train_tokenizer(self._texts_of(splits), self.arguments.max_length)
        sizes = {"vocab_size": len(self.processor), "pad_token_id": self.processor.pad_token_id}
        config = pretrained.random_config(architecture, self.auto_class, self.label_names, **sizes)
        self._check_tokenizer_comes_back(architecture, config, splits.train[:100]["text"])
        model = self.auto_class.from_config(config)
        self._limit_length(model)
        try:
            model(**self._trial(splits.train[:2]["text"]))
        except (RuntimeError, ValueError, TypeError, AttributeError) as error:
            raise UsageError(
                f"--model random:{architecture} does not run as a small classifier of texts: choose another, such as "
                "random:bert."
            ) from error
        return self._pooled_by_mean(model) if self.arguments.pooling == "mean" else model

    def _texts_of(self, splits: Splits) -> Iterator[str]:
        """What the model will read, of the training rows."""
        yield self.arguments.template or ""
        for name in ("text", "text_pair"):
            if name in splits.train.column_names:
                yield from splits.train[name][:]

    def _trial(self, texts: list[str]) -> dict[str, torch.Tensor]:
        """A small batch, to see whether the model runs."""
        return dict(self.processor(texts, return_tensors="pt", padding=True, truncation=True))

    def _check_tokenizer_comes_back(self, architecture: str, config: Any, texts: list[str]) -> None:
        """AutoTokenizer reads the files of some architectures (Qwen2) as those of their own tokenizer only.

        Raises:
            UsageError: it would split texts otherwise than the tokenizer learned here.
        """
        with tempfile.TemporaryDirectory() as folder:
            config.save_pretrained(folder)
            self.processor.save_pretrained(folder)
            loaded = AutoTokenizer.from_pretrained(folder)
        if loaded(texts)["input_ids"] != self.processor(texts)["input_ids"]:
            raise UsageError(
                f"--model random:{architecture} works with a tokenizer of its own only, which a model without "
                "pretrained weights does not have: choose another, such as random:bert."
            )

    def load_processor(self, source: str | Path) -> None:
        """Set the tokenizer of a checkpoint."""
        with pretrained.explained_load(str(source), self.auto_class):
            self.processor = AutoTokenizer.from_pretrained(source, **pretrained.hub_options(self.arguments, source))
        if len(self.processor) <= len(self.processor.all_special_ids):  # what AutoTokenizer makes of a configuration
            raise UsageError(
                f"{str(source)!r} has no vocabulary: the files of its tokenizer (tokenizer.json, vocab.txt, …) are "
                "missing."
            )

    def dataset(self, rows: Any, training: bool) -> Dataset[dict[str, Any]]:
        """Texts, tokenised at once; how many were cut is said."""
        template = None if self.arguments.template is None else Template(self.arguments.template, self.processor)
        encoded = TextDataset(rows, self.processor, template, keep=self.keeps_tokens)
        if training and self.arguments.word_dropout:
            encoded.drop_words(self.arguments.word_dropout, masking_token(self.processor), self.arguments.seed)
        return self._told(encoded, training)

    @property
    def keeps_tokens(self) -> bool:
        """Whether tokens stay on the disk: those of a run's texts, not of texts to predict."""
        return self.is_training and self.arguments.feature_cache != "off"

    def _told(self, encoded: TextDataset, training: bool, behind: str = "") -> TextDataset:
        """Texts, of which it is said how many were cut."""
        if encoded.cut and self.says_cut:
            kind = "training" if training else "evaluation"
            say(
                f"{encoded.cut:,} of {len(encoded):,} {kind} texts are longer than {self.processor.model_max_length} "
                f"tokens and were cut (--max_length){behind}"
            )
        return encoded

    def shown(self, row: Mapping[str, Any], model: Any = None, label: int = 0) -> Shown:
        """The beginning of the texts, in tokens with what each adds to the class (integrated gradients)."""
        texts = [row[name] for name in ("text", "text_pair") if name in row]
        if self.arguments.template is not None:
            texts, _ = Template(self.arguments.template, self.processor).filled([texts])
        if model is None or not self.processor.is_fast:
            return Shown(texts=[[(_shortened(text), 0.0)] for text in texts])
        encoded = self.processor(*texts, truncation=True, return_offsets_mapping=True)
        inputs = {name: torch.tensor([encoded[name]]).to(model.device) for name in encoded if name != "offset_mapping"}
        values = token_attributions(model, inputs, label) if encoded["input_ids"] else None
        if values is None:
            return self.shown(row)
        places = list(zip(encoded.sequence_ids(0), encoded["offset_mapping"], values, strict=True))
        pieces = [
            _pieces(_shortened(text), [(*span, float(value)) for owner, span, value in places if owner == number])
            for number, text in enumerate(texts)
        ]
        largest = max((abs(value) for text in pieces for _, value in text), default=0.0) or 1.0
        return Shown(texts=[[(piece, value / largest) for piece, value in text] for text in pieces])

    def usage(self, title: str) -> str:
        """The lines of every task; with a template, what it makes of a text."""
        lines = super().usage(title)
        if self.arguments.template is None:
            return lines
        texts = ["A text."] * (1 + (self.arguments.text_pair_column is not None))
        (filled,), _ = Template(self.arguments.template, self.processor).filled([texts])
        return lines.replace('"A text."', repr(filled))

    def inputs_in_words(self, splits: Splits, rows: Any) -> tuple[str, str]:
        """How long the texts are, and whether many are cut."""
        middle, long = np.percentile(rows.lengths, [50, 95])
        limit = self.processor.model_max_length
        words = f"texts of {middle:.0f} tokens (median), 95 % up to {long:.0f}; read up to {limit}"
        cut = rows.cut / len(rows)
        return words, f"{cut:.0%} of the texts are cut at {limit} tokens: --max_length" if cut > _CUT else ""

    def collate(self, examples: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        """`input_ids`, `attention_mask`, … of shape (rows, tokens), `labels` of shape (rows,).

        Padded to the longest text of the batch, and to a multiple of 8, which matrix units want.
        """
        return dict(DataCollatorWithPadding(self.processor, pad_to_multiple_of=8)(list(examples)))

    def read_inputs(self, inputs: Any, columns: Mapping[str, str] | None = None) -> Any:
        """A text, a list of texts or of pairs, or the path of a file of them (as `pathlib.Path`).

        A pair is (text, text), or as transformers' pipeline takes it `{"text": …, "text_pair": …}`.
        """
        if isinstance(inputs, Path):
            known = {"text": self.arguments.text_column, "text_pair": self.arguments.text_pair_column}
            return data.load_inputs(str(inputs), self.modality, columns or {}, known, self.arguments.follow_links)
        if isinstance(inputs, str | Mapping):
            inputs = [inputs]
        known_pair = self.arguments.text_pair_column is not None
        pairs = [_as_pair(value) for value in inputs]
        if any(len(pair) != 1 + known_pair or not all(isinstance(text, str) for text in pair) for pair in pairs):
            kind = "pairs of texts: give (text, text)" if known_pair else "single texts: give strings"
            raise UsageError(f"The model was trained on {kind}.")
        names = ("text", "text_pair")
        return [{"id": str(index), **dict(zip(names, pair, strict=False))} for index, pair in enumerate(pairs)]


def _shortened(text: str) -> str:
    return text if len(text) <= _SHOWN else f"{text[: _SHOWN - 1]}…"


def _pieces(text: str, tokens: Sequence[tuple[int, int, float]]) -> list[tuple[str, float]]:
    """All of a text, cut where tokens (start, end, value) begin and end.

    Several tokens may be bytes of one character: their values are added.
    """
    pieces: list[tuple[str, float]] = []
    position = 0
    for start, end, value in tokens:
        if end <= position and pieces:
            pieces[-1] = (pieces[-1][0], pieces[-1][1] + value)
            continue
        pieces += [(text[position:start], 0.0), (text[max(start, position) : end], value)]
        position = end
    return [piece for piece in [*pieces, (text[position:], 0.0)] if piece[0]]


def _as_pair(value: Any) -> tuple[Any, ...]:
    """The texts of one input."""
    if isinstance(value, Mapping):
        return tuple(value.get(name) for name in ("text", "text_pair") if name in value)
    return tuple(value) if isinstance(value, tuple | list) else (value,)


class TextDataset(Dataset[dict[str, Any]]):
    """Rows with a text, perhaps a second one, and perhaps a label, as token ids without padding.

    Attributes:
        lengths: tokens of each row.
        cut: rows that were longer than the tokenizer's `model_max_length`.
        word_dropout: part of the tokens that are masked.
    """

    def __init__(self, rows: Any, tokenizer: Any, template: Template | None = None, keep: bool = False) -> None:
        """Tokenise all rows, put into a template where there is one; perhaps they are kept on the disk."""
        self.examples: list[dict[str, Any]] = []
        self.tokenizer, self.template, self.kept = tokenizer, template, KeptTokens(tokenizer, keep)
        self.cut, self.word_dropout = 0, 0.0
        self.epoch = torch.zeros((), dtype=torch.int64).share_memory_()  # workers that live on see it change
        self.special = np.array(tokenizer.all_special_ids)
        self.columns = [name for name in ("text", "text_pair") if len(rows) and name in rows[0]]
        if template is not None:
            template.check(self.columns)
        empty = {"input_ids": tokenizer.eos_token_id or tokenizer.pad_token_id or 0, "attention_mask": 1}
        for start in range(0, len(rows), _CHUNK):
            chunk = rows[start : start + _CHUNK]
            if isinstance(chunk, dict):  # columns, of a data set: that is much faster than row by row
                chunk = [dict(zip(chunk, row, strict=True)) for row in zip(*chunk.values(), strict=True)]
            for example, row in zip(self._encoded(chunk), chunk, strict=True):
                if not example["input_ids"]:  # without a word, of a tokenizer that adds none of its own
                    example = {name: [empty.get(name, 0)] for name in example}
                if "label" in row:
                    example["labels"] = self._labels(row["label"], len(self.examples), len(example["input_ids"]))
                self.examples.append(example)
        self.lengths = [len(example["input_ids"]) for example in self.examples]

    def _encoded(self, chunk: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """What the tokenizer makes of some rows; those that it cuts are counted."""
        texts = [[row[name] for row in chunk] for name in self.columns]
        template = self.template
        if template is None:
            return self._counted(self.kept.get(texts, "texts", lambda: self._tokenised(*texts)))
        return self._counted(self.kept.get(texts, template.text, lambda: self._filled(template, texts)))

    def _filled(self, template: Template, texts: list[list[str]]) -> Tokens:
        """The tokens of texts in a template, which cuts them itself."""
        filled, is_cut = template.filled(list(zip(*texts, strict=True)))
        tokens = self._tokenised(filled)
        return tokens._replace(cut=[one or other for one, other in zip(is_cut, tokens.cut, strict=True)])

    def _tokenised(self, *texts: Any, words: bool = False) -> Tokens:
        """What the tokenizer makes of texts, or of lists of words."""
        encoded = self.tokenizer(*texts, truncation=True, **({"is_split_into_words": True} if words else {}))
        if encoded.encodings:
            cut = [bool(entry.overflowing) for entry in encoded.encodings]
        else:
            cut = [len(ids) == self.tokenizer.model_max_length for ids in encoded["input_ids"]]
        owners = [encoded.word_ids(row) for row in range(len(cut))] if words else []
        return Tokens(dict(encoded), cut, [[-1 if word is None else word for word in row] for row in owners])

    def _counted(self, tokens: Tokens) -> list[dict[str, Any]]:
        """Rows of tokens; those that were cut are counted."""
        self.cut += sum(tokens.cut)
        return [dict(zip(tokens.columns, row, strict=True)) for row in zip(*tokens.columns.values(), strict=True)]

    def _labels(self, label: Any, row: int, tokens: int) -> Any:
        """What is learned of a row with this label."""
        return label

    def drop_words(self, part: float, mask: int, seed: int) -> None:
        """From now on give `part` of the tokens, never special ones, as `mask`: others in each epoch.

        Word dropout (Iyyer et al. 2015) leaves words out; here a mask stands for each. Which ones is a function of
        (seed, epoch, row), for any number of processes and after an interruption.
        """
        self.word_dropout, self.mask, self.seed = part, mask, seed

    def set_epoch(self, epoch: int) -> None:
        """Choose the tokens that are masked in the next pass."""
        self.epoch.fill_(epoch)

    def __len__(self) -> int:
        """Number of texts."""
        return len(self.examples)

    @property
    def labels(self) -> list[Any] | None:
        """As `hftl.data.labels_of`, where the rows have them."""
        return (
            [example["labels"] for example in self.examples] if self.examples and "labels" in self.examples[0] else None
        )

    def key(self, index: int, full: bool = False) -> int:
        """64 bits for what the tokenizer made of a text."""
        example = {name: value for name, value in self.examples[index].items() if name != "labels"}
        return int.from_bytes(hashlib.blake2b(repr(example).encode(), digest_size=8).digest(), "little")

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Token ids and what else the tokenizer gives, and `labels` where the row has one."""
        example = self.examples[index]
        if not self.word_dropout:
            return example
        tokens = np.array(example["input_ids"])
        draws = np.random.default_rng((self.seed, int(self.epoch), index)).random(len(tokens))
        dropped = (draws < self.word_dropout) & ~np.isin(tokens, self.special)
        return {**example, "input_ids": np.where(dropped, self.mask, tokens).tolist()}


class Template:
    """Texts put into what the model reads of them, such as `Review: {text}\\nSentiment:`, `\\n` being a new line.

    A decoder answers at the last token: where everything together is too long the texts are cut, in equal parts.
    """

    def __init__(self, text: str, tokenizer: Any) -> None:
        """Keep the template, and how many tokens it leaves for the texts."""
        self.text, self.tokenizer = text.replace("\\n", "\n"), tokenizer
        alone = len(tokenizer(self.text.format(text="", text_pair="")).input_ids)
        self.room = tokenizer.model_max_length - alone
        if self.room < 1:
            raise UsageError(f"--template takes {alone} tokens itself, and --max_length leaves none for a text.")

    def check(self, columns: Sequence[str]) -> None:
        """Refuse a template that has a place for a second text where there is none, or none where there is one.

        Raises:
            UsageError: as said.
        """
        has_place = "{text_pair}" in self.text
        if columns and has_place != ("text_pair" in columns):
            found = "the data have one text a row" if has_place else "the data have pairs, and it has no {text_pair}"
            raise UsageError(f"--template {self.text!r}: {found}.")

    def filled(self, rows: Sequence[Sequence[str]]) -> tuple[list[str], list[bool]]:
        """The template with the texts of each row in it, one or two, and whether they were cut."""
        whole = [self._fill(texts) for texts in rows]
        is_cut = (
            [len(ids) > self.tokenizer.model_max_length for ids in self.tokenizer(whole).input_ids] if whole else []
        )
        for position, too_long in enumerate(is_cut):
            if too_long:
                room = max(1, self.room // len(rows[position]) - 1)  # where texts meet there may be a token more
                whole[position] = self._fill([self._cut(text, room) for text in rows[position]])
        return whole, is_cut

    def _fill(self, texts: Sequence[str]) -> str:
        return self.text.format(**dict(zip(("text", "text_pair"), texts, strict=False)))

    def _cut(self, text: str, room: int) -> str:
        ids = self.tokenizer(text, add_special_tokens=False).input_ids
        return text if len(ids) <= room else self.tokenizer.decode(ids[:room])


def masking_token(tokenizer: Any) -> int:
    """The id that stands for a word left out: the mask token, else the unknown one.

    Raises:
        UsageError: the tokenizer has neither, or only one that also ends or pads texts.
    """
    taken = {tokenizer.pad_token_id, tokenizer.eos_token_id}
    for token in (tokenizer.mask_token_id, tokenizer.unk_token_id):
        if token is not None and token not in taken:
            return token
    raise UsageError("--word_dropout: the model's tokenizer has no mask or unknown token of its own. Leave it out.")


def train_tokenizer(texts: Iterable[str], max_length: int, vocabulary: int = 8_000) -> PreTrainedTokenizerFast:
    """A WordPiece tokenizer of the training texts' most frequent words, for a model that is not pretrained either.

    Other words fall into the longest known beginnings and single characters. The vocabulary is counted here: the
    trainer of the tokenizers library gives another one each time, and with it every process of a run another model.
    """
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

    names = {"pad": "[PAD]", "unk": "[UNK]", "cls": "[CLS]", "sep": "[SEP]", "mask": "[MASK]"}
    normalizer, splitter = normalizers.BertNormalizer(lowercase=True), pre_tokenizers.BertPreTokenizer()
    words: Counter[str] = Counter()
    for text in texts:
        words.update(word for word, _ in splitter.pre_tokenize_str(normalizer.normalize_str(text)))
    characters = sorted({character for word in words for character in word})[: vocabulary // 4]
    frequent = [word for word, _ in sorted(words.items(), key=lambda item: (-item[1], item[0]))]
    tokens = [*names.values(), *characters, *(f"##{character}" for character in characters), *frequent]
    numbers = {token: number for number, token in enumerate(list(dict.fromkeys(tokens))[:vocabulary])}
    backend = Tokenizer(models.WordPiece(numbers, unk_token=names["unk"]))
    backend.normalizer, backend.pre_tokenizer = normalizer, splitter
    backend.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[(names[name], numbers[names[name]]) for name in ("cls", "sep")],
    )
    special = {f"{name}_token": token for name, token in names.items()}
    return PreTrainedTokenizerFast(tokenizer_object=backend, model_max_length=max_length, **special)
