"""A tag for each word: read from every format, trained, saved, answered."""

from __future__ import annotations

import csv
import itertools
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import small_data
import tiny_models
import torch
from refusal import refused
from safetensors.torch import load_file
from seqeval.metrics import f1_score
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModel,
    AutoModelForTokenClassification,
    GPT2TokenizerFast,
    PreTrainedTokenizerFast,
    pipeline,
)

import hftl
from hftl import backbones, cli, data, words
from hftl.builtin import travel_notes
from hftl.errors import UsageError
from hftl.finished import find_run
from hftl.losses import CrossEntropyLoss, WordLoss
from hftl.metrics import tag_metrics
from hftl.modality import WORDS
from hftl.problems import WordTags
from hftl.problems.word_tags import NO_WORD, UNREAD, as_seqeval, entities_of
from hftl.report import render_report
from hftl.tasks.token_classification import WordDataset

QUICK = ["--report_to=none", "--precision=fp32", "--per_device_train_batch_size=8", "--num_train_epochs=2"]
SPLITS = {"train": 40, "valid": 12, "test": 14}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tags")
    small_data.write_tagged(folder / "conll", SPLITS)
    tiny_models.write_tiny_text_model(folder / "bert")
    tiny_models.write_tiny_text_model(folder / "gpt2", kind="gpt2")
    tiny_models.write_tiny_text_model(folder / "roberta", kind="roberta")
    return folder


def train(place: Path, output: Path, *flags: str, model: str = "bert", dataset: str = "conll") -> hftl.Run:
    words = [f"--model={place / model}", f"--dataset={place / dataset}", *QUICK, *flags, f"--output_dir={output}"]
    solved = any(flag.startswith("--method=frozen") for flag in flags) and "--head_solver=sgd" not in flags
    cli._run(["train", "token-classification", *(word for word in words if not solved or "epochs" not in word)])
    return hftl.load_run(output)


@pytest.fixture(scope="module")
def run(place: Path, tmp_path_factory: pytest.TempPathFactory) -> hftl.Run:
    return train(place, tmp_path_factory.mktemp("run") / "run", "--learning_rate=0.01", "--num_train_epochs=12")


def answers_of(run: hftl.Run) -> list[dict[str, str]]:
    with (run.folder / "predictions.csv").open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def split_of(place: Path, name: str) -> dict[str, list[list[str]]]:
    return words.read_conll(place / "conll" / f"{name}.txt")


# --- training --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "model"),
    [("full", "roberta"), ("frozen", "bert"), ("partial", "gpt2"), ("lora", "bert"), ("frozen", "gpt2")],
)  # fmt: skip
def test_every_method_moves_what_it_says_and_comes_back(place: Path, tmp_path: Path, method: str, model: str) -> None:
    flags = [f"--method={method}", *(["--unfreeze_blocks=1"] if method == "partial" else [])]
    run = train(place, tmp_path / "run", *flags, model=model)
    before, after = AutoModel.from_pretrained(place / model).state_dict(), run.model.base_model.state_dict()
    moved = {name for name, value in before.items() if name in after and not torch.equal(value, after[name])}
    blocks = backbones.parameter_blocks(run.model)
    prefix = run.model.base_model_prefix
    depth = {name: blocks[f"{prefix}.{name}"] for name in moved if f"{prefix}.{name}" in blocks}
    last = max(blocks.values()) - 1
    if method == "frozen":
        assert not moved
        assert "learning_rate" not in run.metrics["train"]["stages"][0]  # solved
    elif method == "partial":
        assert set(depth.values()) == {last}
    else:
        assert moved
    check(place, run)


def check(place: Path, run: hftl.Run) -> None:
    """The scores are what seqeval says of predictions.csv; `hftl evaluate` and plain transformers say the same."""
    rows, scores = answers_of(run), run.metrics["test"]
    expected = split_of(place, "test")
    assert [row["label"].split() for row in rows] == expected["tags"]
    assert [json.loads(row["words"]) for row in rows] == expected["tokens"]
    said = [row["prediction"].split() for row in rows]
    right = [one == other for row in zip(said, expected["tags"], strict=True) for one, other in zip(*row, strict=True)]
    assert scores["accuracy"] == pytest.approx(np.mean(right))
    assert scores["f1"] == pytest.approx(f1_score(expected["tags"], said))
    evaluated = run.evaluate(str(place / "conll"))
    for name, value in evaluated.items():
        assert scores[name] == pytest.approx(value, abs=1e-6), name
    predictions = run.predict(expected["tokens"])
    assert [entry.tags for entry in predictions] == said
    least = [float(row["least_probability"]) for row in rows]
    assert [min(entry.probabilities) for entry in predictions] == pytest.approx(least, abs=2e-3)
    assert [len(json.loads(row["entities"])) for row in rows] == [len(entities_of(tags)) for tags in said]
    plain = AutoModelForTokenClassification.from_pretrained(run.folder).eval()
    assert list(plain.config.id2label.values()) == run.label_names
    batch = run.task.collate([run.task.dataset([{"id": "0", "text": "film\nday"}], training=False)[0]])
    with torch.no_grad():
        assert plain(**batch).logits.equal(run.model(**batch).logits)


def test_it_learns(run: hftl.Run) -> None:
    assert run.metrics["test"]["f1"] > 0.6  # a name is told by the word before it


def test_the_pipeline_finds_the_same(place: Path, run: hftl.Run) -> None:
    find = pipeline("token-classification", str(run.folder), aggregation_strategy="first", device="cpu")
    texts = [" ".join(tokens) for tokens in split_of(place, "test")["tokens"]]
    for text, prediction in zip(texts, run.predict(texts), strict=True):
        theirs = [(one["entity_group"], text[one["start"] : one["end"]]) for one in find(text)]
        ours = [(entity.kind, entity.text) for entity in prediction.entities]
        # Its groups join neighbours of one kind by rules of their own, where the tags are I- without B-.
        if all(tag[0] != "I" or before[1:] == tag[1:] for before, tag in itertools.pairwise(["O", *prediction.tags])):
            assert theirs == ours


@pytest.mark.parametrize("method", ["frozen", "partial"])
def test_kept_activations_train_as_the_inputs_do(place: Path, tmp_path: Path, method: str) -> None:
    flags = [f"--method={method}", "--head_solver=sgd"] if method == "frozen" else ["--method=partial"]
    flags += ["--logging_steps=1", *(["--unfreeze_blocks=1"] if method == "partial" else [])]
    losses = []
    for cache in ("on", "off"):
        train(place, tmp_path / cache, *flags, f"--feature_cache={cache}")
        lines = [json.loads(line) for line in (tmp_path / cache / "logs" / "log.jsonl").read_text().splitlines()]
        losses.append([line["loss"] for line in lines if "loss" in line])
    assert len(losses[0]) == 10
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)


def test_a_solved_head_has_the_least_loss(place: Path, tmp_path: Path) -> None:
    """On the words alone: with the strongest penalty that validation chose, no step down the gradient is left."""
    run = train(place, tmp_path / "run", "--method=frozen")
    (stage,) = run.metrics["train"]["stages"]
    rows = split_of(place, "train")
    dataset = run.task.dataset([{"id": "0", "text": words.joined(own)} for own in rows["tokens"]], training=False)
    features, labels = [], []
    for row, tags in enumerate(rows["tags"]):
        batch = run.task.collate([dataset[row]])
        with torch.no_grad():
            tokens = run.model.base_model(**batch).last_hidden_state[0]
        features.append(tokens[dataset.first_tokens[row]])
        labels += [run.label_names.index(tag) for tag in tags]
    values, targets = torch.cat(features).double(), torch.tensor(labels)
    deviation = values.std(dim=0, unbiased=False)
    weight = (run.model.classifier.weight.detach().double() * deviation).requires_grad_()
    bias = run.model.classifier.bias.detach().double() + run.model.classifier.weight.detach().double() @ values.mean(0)
    logits = (values - values.mean(dim=0)) / deviation @ weight.T + bias
    loss = torch.nn.functional.cross_entropy(logits, targets) + stage["penalty"] / 2 * weight.square().sum()
    (gradient,) = torch.autograd.grad(loss, weight)
    assert gradient.abs().max() < 1e-3


def test_the_loss_is_the_mean_over_words_however_a_batch_is_cut() -> None:
    torch.manual_seed(0)
    logits, labels = torch.randn(4, 6, 3), torch.randint(0, 3, (4, 6))
    labels[0, 2:], labels[2] = NO_WORD, NO_WORD
    loss, problem = WordLoss(CrossEntropyLoss()), WordTags()
    assert problem.items(labels) == 14
    whole = loss({"logits": logits}, labels)
    assert whole == torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=NO_WORD)
    parts = [loss({"logits": logits[row : row + 2]}, labels[row : row + 2], 14) for row in (0, 2)]
    assert sum(parts) == pytest.approx(float(whole))


def test_a_step_is_the_mean_over_its_words(place: Path, tmp_path: Path) -> None:
    norms = []
    for size, portions in ((8, 1), (2, 4)):
        flags = [f"--per_device_train_batch_size={size}", f"--gradient_accumulation_steps={portions}"]
        train(place, tmp_path / str(size), "--max_steps=2", "--logging_steps=1", "--method=norm", *flags)
        lines = (tmp_path / str(size) / "logs" / "log.jsonl").read_text().splitlines()
        norms.append([json.loads(line)["grad_norm"] for line in lines if "grad_norm" in line])
        first = next(json.loads(line)["loss"] for line in lines if '"loss"' in line)
        assert first == pytest.approx(np.log(5), rel=0.1)  # before anything is learned; over rows it would be ten times
    # Dropout draws anew for each portion: a factor would be four.
    assert norms[0] == pytest.approx(norms[1], rel=0.3)


def test_words_behind_the_limit_count_as_missed(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = train(place, tmp_path / "run", "--max_length=12", "--method=frozen")
    assert "texts are longer than 12 tokens and were cut (--max_length); the words behind" in capsys.readouterr().out
    tags = split_of(place, "test")["tags"]
    said = [row["prediction"].split() for row in answers_of(run)]
    assert any(UNREAD in row for row in said)
    assert [len(row) for row in said] == [len(row) for row in tags]
    as_outside = [["O" if tag == UNREAD else tag for tag in row] for row in said]
    assert run.metrics["test"]["f1"] == pytest.approx(f1_score(tags, as_outside))
    assert run.evaluate(str(place / "conll"))["f1"] == pytest.approx(run.metrics["test"]["f1"])
    assert run.metrics["test"]["recall"] < 1
    right = [one == other for row in zip(said, tags, strict=True) for one, other in zip(*row, strict=True)]
    assert run.metrics["test"]["accuracy"] == pytest.approx(np.mean(right))  # of what is not read nothing is right


def test_words_of_a_byte_level_tokenizer_keep_their_spaces(place: Path, tmp_path: Path) -> None:
    alphabet = {character: number for number, character in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    backend = Tokenizer(models.BPE({**alphabet, "<end>": len(alphabet)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    GPT2TokenizerFast(
        tokenizer_object=backend, eos_token="<end>", unk_token="<end>", bos_token="<end>"
    ).save_pretrained(tmp_path / "m")
    config = AutoModel.from_pretrained(place / "gpt2").config
    config.update({"vocab_size": len(alphabet) + 1, "eos_token_id": len(alphabet), "bos_token_id": len(alphabet)})
    AutoModel.from_config(config).save_pretrained(tmp_path / "m")
    run = train(place, tmp_path / "run", "--max_steps=1", model=str(tmp_path / "m"))
    tokenizer = hftl.load_run(run.folder).task.processor
    given = tokenizer([["the", "film"]], is_split_into_words=True).input_ids[0]
    assert given == tokenizer("the film").input_ids
    assert len(given) == len(" the film")


def test_a_tokenizer_that_pads_on_the_left_changes_nothing(place: Path, run: hftl.Run, tmp_path: Path) -> None:
    shutil.copytree(run.folder, tmp_path / "left")
    path = tmp_path / "left" / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "padding_side": "left"}))
    left, rows = hftl.load_run(tmp_path / "left"), split_of(place, "test")["tokens"]
    assert [one.tags for one in left.predict(rows)] == [one.tags for one in run.predict(rows)]


def test_a_tokenizer_that_glues_words_is_refused(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    alphabet = {character: number for number, character in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    backend = Tokenizer(models.BPE({**alphabet, "<end>": len(alphabet)}, []))
    whole = pre_tokenizers.Split(Regex(r"\s?\w+"), "isolated")
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([whole, level])
    PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<end>").save_pretrained(tmp_path / "m")
    AutoModel.from_pretrained(place / "bert").save_pretrained(tmp_path / "m")
    command = ["train", "token-classification", f"--model={tmp_path / 'm'}", f"--dataset={place / 'conll'}"]
    assert "makes other tokens of words that are given one by one" in refused(command, capsys)


def test_rows_without_words_may_make_a_step(place: Path, tmp_path: Path) -> None:
    rows = [{"tokens": ["the", "oslo"], "tags": ["O", "B-LOC"]}, {"tokens": [], "tags": []}] * 5
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    flags = ["--per_device_train_batch_size=1", "--validation_fraction=0.3", "--num_train_epochs=1"]
    run = train(place, tmp_path / "run", *flags, dataset=str(tmp_path / "a.jsonl"))
    assert np.isfinite(run.metrics["validation"]["loss"])
    with pytest.raises(UsageError, match="None of the rows has a word"):
        tag_metrics([[]], [[]], as_seqeval)


def test_trials_are_scored_on_test_by_word(place: Path, tmp_path: Path) -> None:
    """As `hftl tune` does it; the longest rows are cut, or left out."""
    command = [f"--model={place / 'bert'}", f"--dataset={place / 'conll'}", *QUICK, "--max_length=12"]
    command += ["--max_eval_samples=5", "--search", "learning_rate=log(1e-3,1e-2)", "--trials=1"]
    cli.main(["tune", "token-classification", *command, f"--output_dir={tmp_path / 'run'}"])
    run = hftl.load_run(tmp_path / "run")
    assert 0 < run.metrics["test"]["loss"] < 10


def test_parts_of_speech_are_scored_by_word(place: Path, tmp_path: Path) -> None:
    run = train(place, tmp_path / "run", "--label_column=column_2", "--method=frozen")
    scores = run.metrics["test"]
    assert {"accuracy", "f1_macro", "f1/NOUN"} <= set(scores)
    assert "f1" not in scores
    assert "metric_for_best_model: accuracy" in (run.folder / "recipe.yaml").read_text()
    assert run.predict([["the", "film"]])[0].entities == []
    assert "aggregation_strategy" not in (run.folder / "README.md").read_text()
    assert "NOUN" in render_report(find_run(run.folder), None)


# --- scores ----------------------------------------------------------------------------------------------------------


def test_tags_of_every_scheme_name_the_same_entities() -> None:
    problem, names = WordTags(), {
        "IOB2": ["B-A", "I-A", "O", "B-B"],
        "IOB1": ["I-A", "I-A", "O", "I-B"],
        "IOBES": ["B-A", "E-A", "O", "S-B"],
        "BILOU": ["B-A", "L-A", "O", "U-B"],
        "BMES": ["B-A", "E-A", "O", "S-B"],
    }  # fmt: skip
    for tags in names.values():
        assert entities_of(tags) == [("A", 0, 1), ("B", 3, 3)]
        labels = np.array([[sorted(set(tags)).index(tag) for tag in tags]])
        assert problem.classes(labels, sorted(set(tags))) == {"A": 1, "B": 1}


def test_entities_are_counted_as_seqeval_finds_them() -> None:
    names = ["O", *(f"{place}-{kind}" for kind in ("A", "B-C") for place in "BIES")]
    random = np.random.default_rng(0)
    labels = random.integers(0, len(names), (300, 12))
    for row, length in zip(labels, random.integers(0, 13, 300), strict=True):
        row[length:] = NO_WORD
    found = [kind for row in labels for kind, _, _ in entities_of([names[tag] for tag in row if tag >= 0])]
    assert WordTags().classes(labels, names) == {"A": found.count("A"), "B-C": found.count("B-C")}


def test_scores_are_those_of_the_definition() -> None:
    labels = [["B-A", "I-A", "O"], ["B-B", "O", "B-A"]]
    said = [["B-A", "O", "O"], ["B-B", "O", "B-A"]]
    scores = tag_metrics(labels, said, as_seqeval)
    # Three entities; one is found with the wrong end, which is both missed and added.
    assert scores["precision"] == scores["recall"] == pytest.approx(2 / 3)
    assert scores["accuracy"] == pytest.approx(5 / 6)
    assert (scores["f1/A"], scores["f1/B"]) == (pytest.approx(0.5), 1.0)
    assert tag_metrics([["O"]], [["O"]], as_seqeval) == {"accuracy": 1.0}
    assert tag_metrics([["O", "B-A"]], [["", ""]], as_seqeval) == {
        **dict.fromkeys(("accuracy", "precision", "recall", "f1", "f1_macro"), 0.0),
        **dict.fromkeys(("precision/A", "recall/A", "f1/A"), 0.0),
    }


# --- data ------------------------------------------------------------------------------------------------------------


def splits_of(folder: Path, **settings: Any) -> data.Splits:
    return data.load_splits({"dataset_name": str(folder), **settings}, WORDS, WordTags())


def decoded(splits: data.Splits, split: datasets.Dataset) -> list[tuple[list[str], list[str]]]:
    rows = zip(split["text"][:], data.labels_of(split), strict=True)
    return [(words.lines(text), [splits.label_names[tag] for tag in tags if tag >= 0]) for text, tags in rows]


def test_every_format_gives_the_same_rows(place: Path, tmp_path: Path) -> None:
    rows = split_of(place, "train")
    pairs = list(zip(rows["tokens"], rows["tags"], strict=True))
    names = sorted({tag for tags in rows["tags"] for tag in tags})
    (tmp_path / "lists.jsonl").write_text(
        "\n".join(json.dumps({"tokens": own, "ner_tags": tags}) for own, tags in pairs)
    )
    (tmp_path / "plain.csv").write_text(
        "sentence,labels\n" + "\n".join(f"{' '.join(own)},{' '.join(tags)}" for own, tags in pairs)
    )
    with (tmp_path / "quoted.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["words", "tags"], *([json.dumps(own), json.dumps(tags)] for own, tags in pairs)])
    lines = [f"{own[place]}\t{tags[place]}" for own, tags in pairs for place in range(len(own))]
    ends = np.cumsum([len(own) for own, _ in pairs]) - 1
    (tmp_path / "tabs.conll").write_text(
        "\n".join(f"{line}\n" if number in ends else line for number, line in enumerate(lines))
    )
    features = datasets.Features(
        {
            "tokens": datasets.Sequence(datasets.Value("string")),
            "ner_tags": datasets.Sequence(datasets.ClassLabel(names=names)),
        }
    )
    numbers = {"tokens": rows["tokens"], "ner_tags": [[names.index(tag) for tag in tags] for tags in rows["tags"]]}
    datasets.Dataset.from_dict(numbers, features=features).to_parquet(tmp_path / "typed.parquet")
    expected = sorted(pairs)
    for name in ("lists.jsonl", "plain.csv", "quoted.csv", "tabs.conll", "typed.parquet"):
        splits = splits_of(tmp_path / name)
        assert sorted(decoded(splits, splits.train) + decoded(splits, splits.validation)) == expected, name
        assert set(splits.label_names) >= set(names)
    assert splits_of(tmp_path / "tabs.conll").label_names[:3] == ["O", "B-LOC", "I-LOC"]


def test_conll_files_may_have_comments_and_other_columns(tmp_path: Path) -> None:
    path = tmp_path / "a.conll"
    path.write_text(
        "-DOCSTART- -X- -X- O\n\n# id 7\tdomain=x\nEU NNP B-NP B-ORG\nrejects VBZ B-VP O\n\n\n# # O O\n# CD O O\n"
    )
    assert words.read_conll(path) == {
        "tokens": [["EU", "rejects"], ["#", "#"]],
        "column_2": [["NNP", "VBZ"], ["#", "CD"]],
        "column_3": [["B-NP", "B-VP"], ["O", "O"]],
        "tags": [["B-ORG", "O"], ["O", "O"]],
    }
    universal = tmp_path / "a.conllu"
    fields = ["_"] * 6
    lines = [["1-2", "zum", "_", "_", *fields], ["1", "zu", "zu", "ADP", *fields], ["2", "dem", "der", "DET", *fields]]
    universal.write_text("# sent_id = 1\n# text = zum\n" + "\n".join("\t".join(line) for line in lines) + "\n")
    found = words.read_conll(universal)
    assert (found["tokens"], found["upos"]) == ([["zu", "dem"]], [["ADP", "DET"]])


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ({"tokens": ["a", "b"], "tags": ["O"]}, "2 words and 1 tags (row counting from 0: 2): give as many"),
        ({"tokens": ["a", "b"], "tags": ["O", None]}, "the tag of word 2 is missing (row counting from 0: 2)"),
        ({"tokens": ["a", "b"], "tags": ["O", -100]}, "the tag of word 2 is missing (row counting from 0: 2)"),
        ({"tokens": ["a"], "tags": ["B LOC"]}, "the tag 'B LOC' has a space in it"),
        ({"tokens": ["a"], "tags": 3}, "'3' in the column 'tags' is no list of tags (row counting from 0: 2)"),
        ({"tokens": ["a"], "tags": None}, "1 of 3 rows have no label"),
        ({"tokens": ["a", None], "tags": ["O", "O"]}, "holds a list with an empty place (null), not lists of words"),
        ({"tokens": {"a": 1}, "tags": ["O"]}, "the column 'tokens' holds dict values, not lists of words"),
    ],
)
def test_tags_that_do_not_fit_are_refused(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], line: dict[str, Any], said: str
) -> None:
    good = {"tokens": ["the", "film"], "tags": ["O", "B-LOC"]}
    (tmp_path / "t.jsonl").write_text("\n".join(map(json.dumps, [good, good, line])))
    command = ["train", "token-classification", f"--model={place / 'bert'}", f"--dataset={tmp_path / 't.jsonl'}"]
    assert said in refused([*command, f"--output_dir={tmp_path / 'run'}"], capsys)
    assert not (tmp_path / "run").exists()


def test_a_tag_that_training_does_not_have_is_refused(tmp_path: Path) -> None:
    for split, tag in (("train", "B-PER"), ("test", "B-PRE")):
        row = json.dumps({"tokens": ["a", "b"], "tags": ["O", tag]})
        (tmp_path / f"{split}.jsonl").write_text("\n".join([row] * 4))
    with pytest.raises(UsageError, match=r"the label 'B-PRE' does not occur in train.*Did you mean 'B-PER'"):
        splits_of(tmp_path)


def test_a_line_without_a_tag_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.conll").write_text("EU B-ORG\nrejects\n")
    with pytest.raises(UsageError, match="line 2 has 1 field, and the first line has 2"):
        words.read_conll(tmp_path / "a.conll")


def test_a_hash_may_be_a_word_and_odd_spaces_are_none(tmp_path: Path) -> None:
    path = tmp_path / "a.conll"
    path.write_bytes(
        "\ufeff#Brexit n\r\nis v\r\n\r\n10\u00a0000 n\r\n# n \r\n\r\n# about what follows\r\nx\u2028y v\r\n".encode()
    )
    assert words.read_conll(path) == {
        "tokens": [["#Brexit", "is"], ["10\u00a0000", "#"], ["x\u2028y"]],
        "tags": [["n", "v"], ["n", "n"], ["v"]],
    }
    path.write_text("New York\tB-LOC\nis\tO\n")
    assert words.read_conll(path)["tokens"] == [["New York", "is"]]


def test_every_kind_has_the_tags_of_all(tmp_path: Path) -> None:
    for split, tags in (("train", ["B-PER", "B-LOC", "I-LOC"]), ("test", ["O", "B-PER", "I-PER"])):
        row = json.dumps({"tokens": ["a", "b", "c"], "tags": tags})
        (tmp_path / f"{split}.jsonl").write_text("\n".join([row] * 4))
    assert splits_of(tmp_path).label_names == ["O", "B-LOC", "I-LOC", "B-PER", "I-PER"]


def test_odd_beginnings_are_counted(tmp_path: Path) -> None:
    rows = [{"tokens": ["a", "b", "c"], "tags": tags} for tags in (["B-A", "I-A", "O"], ["O", "I-A", "I-B"])]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows * 5)))
    splits = splits_of(tmp_path / "a.jsonl", validation_fraction=0.2)
    odd = sum(tags == ["O", "I-A", "I-B"] for _, tags in decoded(splits, splits.train)) * 2
    assert f"tags: {odd} entities begin with another tag than B-; they count all the same" in splits.report


def test_a_part_has_the_rare_tags(tmp_path: Path) -> None:
    rows = [{"tokens": ["a"], "tags": ["B-A" if number < 4 else "O"]} for number in range(100)]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    splits = splits_of(tmp_path / "a.jsonl", validation_fraction=0.25)
    assert splits.problem.classes(data.labels_of(splits.validation), splits.label_names) == {"A": 1}


def test_built_in_notes_share_no_name() -> None:
    parts = travel_notes()
    names = parts["train"].features["ner_tags"].feature.names

    def found(split: str) -> set[tuple[str, str]]:  # kind and name
        rows = zip(parts[split]["tokens"][:], parts[split]["ner_tags"][:], strict=True)
        return {
            (kind, " ".join(tokens[start : end + 1]))
            for tokens, tags in rows
            for kind, start, end in entities_of([names[tag] for tag in tags])
        }

    assert {name: len(part) for name, part in parts.items()} == {"train": 600, "validation": 150, "test": 250}
    assert not found("train") & found("test")
    assert not found("train") & found("validation")
    assert not found("validation") & found("test")
    both = {text for kind, text in found("test") if kind == "PER"} & {
        text for kind, text in found("test") if kind == "LOC"
    }
    assert both  # the word alone does not tell


# --- a finished run --------------------------------------------------------------------------------------------------


def test_texts_are_split_as_people_read_them(run: hftl.Run) -> None:
    assert run.predict([["a\nb", ""]])[0].words == ["a b", " "]
    (prediction,) = run.predict("Don't go to New-York, U.S. (yet)!")
    assert prediction.words == ["Don't", "go", "to", "New-York", ",", "U.S", ".", "(", "yet", ")", "!"]
    first, second = run.predict(["the film", ["the film", "was"]])
    assert (first.words, second.words) == (["the", "film"], ["the film", "was"])
    assert run.predict("")[0].tags == []
    for wrong in (3, [3], None):
        with pytest.raises(UsageError, match="give a text, a list of texts, or a list of lists of words"):
            run.predict(wrong)


def test_predict_writes_tags_and_entities(
    place: Path, run: hftl.Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "lines.txt").write_text("the film, in oslo\n=a day\n")
    for source in (tmp_path / "lines.txt", place / "conll" / "test.txt"):
        cli.main(["predict", str(run.folder), str(source), f"--output={tmp_path / 'out.csv'}"])
        with (tmp_path / "out.csv").open(newline="") as file:
            rows = list(csv.DictReader(file))
        assert list(rows[0]) == ["id", "prediction", "least_probability", "words", "entities"]
        if source.stem == "lines":
            found = [json.loads(row["words"]) for row in rows]
            assert found == [["the", "film", ",", "in", "oslo"], ["=", "a", "day"]]
        else:
            assert [json.loads(row["words"]) for row in rows] == split_of(place, "test")["tokens"]
        assert all(len(row["prediction"].split()) == len(json.loads(row["words"])) for row in rows)
    (tmp_path / "bare.conll").write_text("the\nfilm\n\nday\n")
    cli.main(["predict", str(run.folder), str(tmp_path / "bare.conll"), f"--output={tmp_path / 'out.csv'}"])
    assert '""film""' in (tmp_path / "out.csv").read_text()
    assert "no such file or folder: 'none.conll'" in refused(["predict", str(run.folder), "none.conll"], capsys)
    cli.main(["predict", str(run.folder), "the film in oslo"])
    assert '""film"", ""in"", ""oslo""' in capsys.readouterr().out


def test_the_report_shows_entities_and_shares_no_row(run: hftl.Run) -> None:
    found = find_run(run.folder)
    page, shared = render_report(found, None), render_report(found, None, shared=True)
    assert "(LOC)" in page or run.metrics["test"]["f1"] == 1
    assert "accuracy of words" in shared
    assert "(LOC)" not in shared
    assert all(" ".join(json.loads(row["words"])) not in shared for row in answers_of(run))


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--method=auto"], "--method auto is for rows of one class each, not for tags of words"),
        (["--shots=2"], "--shots is for rows of one class each"),
        (["--head=knn", "--method=frozen"], "--head knn is for rows of one class each"),
        (["--pooling=mean"], "--pooling"),
        (["--problem_type=regression"], "token_classification"),
        (["--metric_for_best_model=f1_micro"], "'f1_micro' is not known. Did you mean 'f1_macro'?"),
        (["--loss=mse"], "Unknown loss 'mse' for tags of words"),
        (["--metrics=accuracy"], "take one class a row, not tags of words"),
    ],
)
def test_what_does_not_go_with_tags_is_refused(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: list[str], said: str
) -> None:
    command = ["train", "token-classification", f"--model={place / 'bert'}", f"--dataset={place / 'conll'}"]
    assert said in refused([*command, *flags, f"--output_dir={tmp_path / 'run'}"], capsys)


def test_commands_for_one_class_are_refused(run: hftl.Run, place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    models = [f"--model={place / 'bert'}", f"--dataset={place / 'conll'}"]
    for command in (["compare", str(run.folder), str(run.folder)], ["demo", str(run.folder)],
                    ["advise", "token-classification", *models]):  # fmt: skip
        assert "tags of words" in refused(command, capsys), command


def test_the_package_that_scores_is_asked_for(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "seqeval", None)
    command = ["train", "token-classification", f"--model={place / 'bert'}", f"--dataset={place / 'conll'}"]
    assert "pip install 'hftl[tags]'" in refused([*command, f"--output_dir={tmp_path / 'run'}"], capsys)


def test_a_recipe_repeats_the_run(place: Path, tmp_path: Path) -> None:
    whole = train(place, tmp_path / "whole", "--word_dropout=0.1", "--label_smoothing_factor=0.1")
    again = train(place, tmp_path / "again", "--config", str(whole.folder / "recipe.yaml"))
    weights, same = (load_file(run.folder / "model.safetensors") for run in (whole, again))
    assert all(same[name].equal(value) for name, value in weights.items())
    card = (whole.folder / "README.md").read_text()
    assert 'pipeline("token-classification"' in card
    assert "pipeline_tag: token-classification" in card


def test_only_first_tokens_have_labels(place: Path) -> None:
    tokenizer = hftl.TokenClassification(hftl.parse(hftl.TokenArguments, ["--model=m", "--output_dir=o"]))
    tokenizer.load_processor(place / "bert")
    rows = [{"id": "0", "text": "film\nxyz\n\u200b\nthe", "label": [1, 2, 1, 0, NO_WORD]}]
    dataset = WordDataset(rows, tokenizer.processor)
    tokens = tokenizer.processor.convert_ids_to_tokens(dataset[0]["input_ids"])
    assert tokens == ["[CLS]", "film", "x", "##y", "##z", "the", "[SEP]"]
    assert dataset.first_tokens == [[1, 2, -1, 5]]
    assert dataset[0]["labels"] == [NO_WORD, 1, 2, NO_WORD, NO_WORD, 0, NO_WORD]
    assert dataset.most_words == 4
