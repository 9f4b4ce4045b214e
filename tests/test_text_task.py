"""Texts: length, pairs, padding, pooling, and the same answers from plain transformers."""

from __future__ import annotations

import csv
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import TINY, tiny_tokenizer, write_tiny_text_model
from tiny_training import tiny_arguments, tiny_trainer
from transformers import AutoModelForSequenceClassification, AutoTokenizer, pipeline

import hftl
from hftl.data import Splits
from hftl.errors import UsageError
from hftl.methods import build_plan
from hftl.pretrained import save_model
from hftl.run import Run
from hftl.tasks.text_classification import TextClassification, TextDataset
from hftl.trainer import TransferTrainer

NAMES = ["ant", "bee", "cat"]
SHORT, LONG = "a good film", "the plot was slow and the cast was not bright but the song was fine " * 9
TEXTS = [SHORT, "a dull and cold room", "it was a warm trip with a bright meal and not a bad show", "fast"]


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders of pretrained models with their tokenizers."""
    top = tmp_path_factory.mktemp("checkpoints")
    folders = {kind: write_tiny_text_model(top / kind, kind) for kind in ("bert", "distilbert", "roberta", "gpt2")}
    for name in ("modernbert", "qwen2", "electra", "albert", "deberta_v2"):
        folders[name] = top / name
        model = TINY[name]()
        tokenizer = tiny_tokenizer(top / name, "distilbert")
        model.resize_token_embeddings(len(tokenizer))
        model.save_pretrained(top / name)
    return folders


def splits(texts: list[str] | None = None) -> Splits:
    texts = texts or TEXTS
    rows = datasets.Dataset.from_dict({"text": texts, "label": [row % 3 for row in range(len(texts))]})
    return Splits(train=rows, validation=rows, test=None, label_names=NAMES, columns={})


def task_with(model: Any, *flags: str) -> tuple[TextClassification, Any]:
    """A task and its model, in eval mode."""
    task = TextClassification(hftl.parse(hftl.TextArguments, [f"--model={model}", "--output_dir=unused", *flags]))
    return task, task.build_model(splits()).eval()


def saved(task: TextClassification, model: Any, folder: Path) -> Path:
    save_model(model, folder)
    task.save_processor(folder)
    return folder


def logits(task: TextClassification, model: Any, inputs: Any) -> torch.Tensor:
    data = task.dataset(task.read_inputs(inputs), training=False)
    batch = task.collate([data[row] for row in range(len(data))])
    with torch.no_grad():
        return model(**batch).logits


def probabilities(result: list[dict[str, Any]]) -> list[float]:
    """What a pipeline gives, in the order of the classes."""
    return [next(entry["score"] for entry in result if entry["label"] == name) for name in NAMES]


KINDS = ["bert", "distilbert", "roberta", "gpt2", "modernbert", "qwen2", "electra", "albert", "deberta_v2"]


@pytest.mark.parametrize("kind", KINDS)
def test_the_saved_model_gives_the_same_answers(checkpoints: dict[str, Path], kind: str, tmp_path: Path) -> None:
    task, model = task_with(checkpoints[kind])
    folder = saved(task, model, tmp_path)
    expected = logits(task, model, TEXTS).softmax(-1).tolist()
    loaded = AutoModelForSequenceClassification.from_pretrained(folder)
    assert loaded.config.id2label == {0: "ant", 1: "bee", 2: "cat"}
    run = Run(folder, task)
    by_pipeline = pipeline("text-classification", str(folder), top_k=None)
    answers = by_pipeline(TEXTS)
    for found, answer, values in zip(run.predict(TEXTS), answers, expected, strict=True):
        assert list(found.probabilities.values()) == pytest.approx(values, abs=1e-5)
        assert probabilities(answer) == pytest.approx(values, abs=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_padding_does_not_change_the_answer(checkpoints: dict[str, Path], kind: str) -> None:
    task, model = task_with(checkpoints[kind])
    together = logits(task, model, TEXTS)
    alone = torch.cat([logits(task, model, text) for text in TEXTS])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-6)
    assert not torch.equal(together[0], together[2])


def test_padding_is_to_the_longest_of_the_batch_in_steps_of_8(checkpoints: dict[str, Path]) -> None:
    task, _ = task_with(checkpoints["bert"])
    data = task.dataset(splits().train, training=True)
    assert data.lengths == [len(entry) for entry in task.processor(TEXTS)["input_ids"]]
    assert task.collate([data[0], data[3]])["input_ids"].shape == (2, 8)
    batch = task.collate([data[0], data[2]])
    assert batch["input_ids"].shape[1] % 8 == 0
    assert batch["input_ids"].shape[1] - max(data.lengths) < 8
    assert batch["attention_mask"].sum(1).tolist() == [data.lengths[0], data.lengths[2]]
    assert batch["labels"].tolist() == [0, 2]


# --- decoders --------------------------------------------------------------------------------------------------------


def test_a_decoder_without_a_pad_token_gets_its_end_of_text(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    assert AutoTokenizer.from_pretrained(checkpoints["gpt2"]).pad_token is None
    task, model = task_with(checkpoints["gpt2"])
    assert model.config.pad_token_id == task.processor.pad_token_id == task.processor.eos_token_id
    folder = saved(task, model, tmp_path)
    assert AutoTokenizer.from_pretrained(folder).pad_token == task.processor.eos_token
    loaded = AutoModelForSequenceClassification.from_pretrained(folder)
    assert loaded.config.pad_token_id == task.processor.pad_token_id


@pytest.mark.parametrize("kind", ["gpt2", "qwen2"])
def test_a_decoder_pools_the_last_real_token(checkpoints: dict[str, Path], kind: str) -> None:
    task, model = task_with(checkpoints[kind])
    data = task.dataset(task.read_inputs(TEXTS), training=False)
    for row, text in enumerate(TEXTS):
        with torch.no_grad():
            states = model.base_model(torch.tensor([data[row]["input_ids"]])).last_hidden_state
            expected = model.score(states[:, -1])
        torch.testing.assert_close(logits(task, model, TEXTS)[row], expected[0], rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(logits(task, model, text), expected, rtol=1e-4, atol=1e-6)


def test_a_decoder_reads_texts_without_a_word(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    task, model = task_with(checkpoints["gpt2"])
    data = task.dataset(task.read_inputs(["", " "]), training=False)
    assert data.lengths == [1, 1]
    assert logits(task, model, ["", " "]).isfinite().all()
    torch.testing.assert_close(logits(task, model, ["", SHORT])[:1], logits(task, model, ""), rtol=1e-4, atol=1e-6)


# --- length ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "flags", "limit"),
    [
        ("bert", (), 64),  # the tokenizer's own, and the model's positions
        ("bert", ("--max_length=16",), 16),
        ("roberta", (), 64),
        ("distilbert", ("--max_length=999",), 64),
        ("gpt2", (), 64),
    ],
)
def test_texts_are_cut_and_counted(
    checkpoints: dict[str, Path], kind: str, flags: tuple[str, ...], limit: int, capsys: Any
) -> None:
    task, model = task_with(checkpoints[kind], *flags)
    data = task.dataset(splits([SHORT, LONG, LONG]).train, training=True)
    assert data.lengths[1:] == [limit, limit]
    assert data.lengths[0] < 16
    assert data.cut == 2
    assert (
        f"2 of 3 training texts are longer than {limit} tokens and were cut (--max_length)" in capsys.readouterr().out
    )
    assert logits(task, model, [SHORT, LONG]).isfinite().all()


def test_a_text_of_just_the_limit_is_not_counted(checkpoints: dict[str, Path]) -> None:
    task, _ = task_with(checkpoints["bert"], "--max_length=8")
    exact = "good bad fine dull slow fast"  # six words and two special tokens
    data = TextDataset([{"text": exact}, {"text": f"{exact} warm"}], task.processor)
    assert (data.lengths, data.cut) == ([8, 8], 1)


def test_the_limit_is_the_model_s_where_its_tokenizer_has_none(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    for path in checkpoints["roberta"].iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    tokenizer.model_max_length = int(1e30)
    tokenizer.save_pretrained(tmp_path)
    task, model = task_with(tmp_path)
    assert task.processor.model_max_length == 65  # 66 positions, the first of which is that of padding
    assert logits(task, model, LONG).isfinite().all()


def test_the_limit_is_saved(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    task, model = task_with(checkpoints["bert"], "--max_length=16")
    folder = saved(task, model, tmp_path)
    expected = logits(task, model, LONG).softmax(-1)[0].tolist()
    answer = pipeline("text-classification", str(folder), top_k=None)([LONG], truncation=True)
    assert probabilities(answer[0]) == pytest.approx(expected, abs=1e-5)
    assert AutoTokenizer.from_pretrained(folder).model_max_length == 16


@pytest.mark.parametrize(
    ("lacking", "count"),
    [
        ("layer.1.output.dense.bias", 1),
        ("layer.1.output.LayerNorm.", 2),  # 96 % are there
        ("layer.1.attention.output.", 4),  # 92 %
        ("layer.1.", 16),
    ],
)
def test_weights_that_fill_too_little_are_refused(
    checkpoints: dict[str, Path], lacking: str, count: int, tmp_path: Path
) -> None:
    folder = shutil.copytree(checkpoints["bert"], tmp_path / "lacking")
    weights = load_file(folder / "model.safetensors")
    kept = {name: value for name, value in weights.items() if lacking not in name}
    assert len(weights) - len(kept) == count
    save_file(kept, folder / "model.safetensors", {"format": "pt"})
    if count > 2:
        with pytest.raises(UsageError, match=rf"fill {53 - count} of the 53 tensors of the backbone .*{lacking}"):
            task_with(folder)
        return
    loaded = task_with(folder)[1].base_model.state_dict()
    torch.testing.assert_close({name: loaded[name] for name in kept}, kept, rtol=0, atol=0)


def test_a_tokenizer_of_another_model_is_refused(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    for path in checkpoints["bert"].iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    tokenizer.add_tokens([f"word{number}" for number in range(20)])
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(UsageError, match="its tokenizer has more tokens than the model"):
        task_with(tmp_path)


# --- order -----------------------------------------------------------------------------------------------------------


def test_a_trainer_puts_texts_of_like_length_together(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    task, model = task_with(checkpoints["bert"])
    texts = [" ".join(["film"] * (1 + row % 16)) for row in range(64)]
    (stage,) = build_plan(model, tiny_arguments(model)).stages
    trainer = tiny_trainer(
        model,
        stage,
        tmp_path,
        "--per_device_train_batch_size=4",
        train_dataset=task.dataset(splits(texts).train, training=True),
        data_collator=task.collate,
    )
    lengths = [batch["attention_mask"].sum(1).tolist() for batch in trainer.get_train_dataloader()]
    assert all(len(set(batch)) == 1 for batch in lengths)
    assert sorted(batch[0] for batch in lengths) == list(range(3, 19))  # with two special tokens


def test_texts_of_like_length_are_evaluated_together(
    checkpoints: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = [" ".join(["film", "good"][: 1 + row % 2] * (1 + row % 16)) for row in range(64)]
    for split in ("train", "test"):
        table = [f"{text},{'yes' if row % 3 else 'no'}" for row, text in enumerate(texts)]
        (tmp_path / f"{split}.csv").write_text("\n".join(["text,label", *table]))
    widths: list[int] = []
    step = TransferTrainer.prediction_step

    def watched(trainer: Any, model: Any, inputs: Any, *others: Any, **settings: Any) -> Any:
        widths.append(inputs["input_ids"].shape[1])
        return step(trainer, model, inputs, *others, **settings)

    monkeypatch.setattr(TransferTrainer, "prediction_step", watched)
    flags = {"per_device_eval_batch_size": 6, "max_steps": 2, "num_train_epochs": 1, "learning_rate": 1e-2}
    flags |= {"dataloader_drop_last": True}  # which is for training
    run = hftl.finetune(
        "text-classification", model=checkpoints["bert"], dataset=tmp_path, output_dir=tmp_path / "run", **flags
    )
    of_test = widths[-11:]
    assert of_test == sorted(of_test, reverse=True)
    assert of_test[0] > of_test[-1]
    answers = {row["id"]: row for row in csv.DictReader((run.folder / "predictions.csv").open())}
    assert len(answers) == 64
    for place, (row, expected) in enumerate(zip(answers.values(), run.predict(texts), strict=True)):
        assert row["label"] == ("yes" if place % 3 else "no")
        assert float(row["probability_yes"]) == pytest.approx(expected.probabilities["yes"], abs=1e-5)


# --- pairs -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["bert", "roberta"])
def test_pairs(checkpoints: dict[str, Path], kind: str, tmp_path: Path) -> None:
    task, model = task_with(checkpoints[kind])
    rows = datasets.Dataset.from_dict({"text": TEXTS, "text_pair": TEXTS[::-1], "label": [0, 1, 2, 0]})
    data = task.dataset(rows, training=True)
    expected = task.processor(TEXTS[0], TEXTS[3])
    assert data[0]["input_ids"] == expected["input_ids"] != task.processor(TEXTS[0] + " " + TEXTS[3])["input_ids"]
    if kind == "bert":
        assert data[0]["token_type_ids"] == expected["token_type_ids"]
        assert set(data[0]["token_type_ids"]) == {0, 1}
    folder = saved(task, model, tmp_path)
    task.arguments.text_pair_column = "text_pair"
    pairs = list(zip(TEXTS, TEXTS[::-1], strict=True))
    wanted = logits(task, model, pairs).softmax(-1).tolist()
    by_pipeline = pipeline("text-classification", str(folder), top_k=None)
    run = Run(folder, task)
    for pair, found, values in zip(pairs, run.predict(pairs), wanted, strict=True):
        assert list(found.probabilities.values()) == pytest.approx(values, abs=1e-5)
        answer = by_pipeline({"text": pair[0], "text_pair": pair[1]})
        assert probabilities(answer) == pytest.approx(values, abs=1e-5)


def test_a_long_pair_keeps_some_of_both(checkpoints: dict[str, Path]) -> None:
    task, _ = task_with(checkpoints["bert"], "--max_length=16")
    data = TextDataset([{"text": LONG, "text_pair": LONG}], task.processor)
    assert (data.lengths, data.cut) == ([16], 1)
    assert 6 <= sum(data[0]["token_type_ids"]) <= 8


# --- pooling ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["gpt2", "bert"])
def test_a_template_is_what_the_model_reads(checkpoints: dict[str, Path], kind: str, tmp_path: Path) -> None:
    template = "the film: {text}\\nit was"
    task, model = task_with(checkpoints[kind], f"--template={template}")
    filled = [f"the film: {text}\nit was" for text in TEXTS]
    data = task.dataset(task.read_inputs(TEXTS), training=False)
    assert [data[row]["input_ids"] for row in range(4)] == task.processor(filled).input_ids
    plain = pipeline("text-classification", str(saved(task, model, tmp_path / "saved")), top_k=None)
    expected = logits(task, model, TEXTS[0]).softmax(-1)[0].tolist()
    assert probabilities(plain(filled[:1])[0]) == pytest.approx(expected, abs=1e-5)
    assert repr("the film: A text.\nit was") in task.usage("saved")

    long = task.dataset(task.read_inputs([LONG]), training=False)
    ids = long[0]["input_ids"]
    assert long.cut == 1
    assert task.processor.model_max_length - 4 <= len(ids) <= task.processor.model_max_length
    text = task.processor.decode(ids, skip_special_tokens=True)
    assert text.strip().endswith("it was")  # the text was cut, not what stands behind it
    assert text.strip().startswith("the film")


def test_a_template_has_a_place_for_each_text(checkpoints: dict[str, Path]) -> None:
    pair = ["--text_pair_column=q"]
    task, _ = task_with(checkpoints["bert"], "--template={text_pair}, {text}", *pair)
    data = task.dataset(task.read_inputs([("fast", "slow")]), training=False)
    assert data[0]["input_ids"] == task.processor("slow, fast").input_ids
    both = ["--template={text} and {text_pair}", "--max_length=12", *pair]
    assert all(len(row["input_ids"]) <= 12 for row in examples_of(checkpoints, [(LONG, LONG)], both))
    for flags, words in {
        ("--template={text} {text_pair}",): "the data have one text a row",
        ("--template={text}", *pair): "the data have pairs, and it has no {text_pair}",
        ("--template=Review:",): "there is no {text} in it",
        ("--template={text} {label}",): "{label} is no part of a row",
        ("--template={text} {",): "A brace that stands for itself is doubled",
        ("--template=" + "a film " * 20 + "{text}", "--max_length=16"): "leaves none for a text",
    }.items():
        with pytest.raises(UsageError, match=re.escape(words)):
            examples_of(checkpoints, [("fast", "slow")] if "--text_pair_column=q" in flags else TEXTS, flags)


def examples_of(checkpoints: dict[str, Path], rows: Any, flags: Sequence[str]) -> Any:
    task, _ = task_with(checkpoints["bert"], *flags)
    data = task.dataset(task.read_inputs(rows), training=False)
    return [data[index] for index in range(len(data))]


@pytest.mark.parametrize("kind", ["modernbert", "bert", "roberta", "electra"])
def test_mean_pooling_is_saved(checkpoints: dict[str, Path], kind: str, tmp_path: Path) -> None:
    task, model = task_with(checkpoints[kind], "--pooling=mean")
    _, plain = task_with(checkpoints[kind], "--pooling=architecture")
    found = logits(task, model, TEXTS)
    assert not torch.allclose(found, logits(task, plain, TEXTS))
    folder = saved(task, model, tmp_path)
    loaded = AutoModelForSequenceClassification.from_pretrained(folder)
    torch.testing.assert_close(logits(task, loaded.eval(), TEXTS), found, rtol=0, atol=0)
    alone = torch.cat([logits(task, model, text) for text in TEXTS])
    torch.testing.assert_close(found, alone, rtol=1e-4, atol=1e-5)


def test_the_mean_is_that_of_the_real_tokens(checkpoints: dict[str, Path]) -> None:
    task, model = task_with(checkpoints["bert"], "--pooling=mean")
    _, plain = task_with(checkpoints["bert"], "--pooling=architecture")
    data = task.dataset(task.read_inputs(TEXTS), training=False)
    batch = task.collate([data[row] for row in range(len(data))])
    with torch.no_grad():
        states = plain.base_model(**batch).last_hidden_state
        real = batch["attention_mask"].unsqueeze(-1)
        mean = (states * real).sum(1) / real.sum(1)
        found = model.base_model(**batch).last_hidden_state[:, 0]
    expected = torch.nn.functional.layer_norm(mean, mean.shape[-1:])
    torch.testing.assert_close(found, expected, rtol=0, atol=0.02)  # a thousandth of it is the first token itself


@pytest.mark.parametrize("kind", ["distilbert", "albert", "deberta_v2", "gpt2"])
def test_mean_pooling_that_needs_code_is_left_out(checkpoints: dict[str, Path], kind: str, capsys: Any) -> None:
    task, model = task_with(checkpoints[kind], "--pooling=mean")
    said = capsys.readouterr().out
    assert f"{type(model).__name__} has no mean pooling without custom code" in said
    assert "own pooling is kept" in said
    _, plain = task_with(checkpoints[kind])
    assert torch.equal(logits(task, model, TEXTS), logits(task, plain, TEXTS))


# --- heads -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "head"), [("bert", "classifier"), ("gpt2", "score")])
def test_a_trained_head_is_drawn_anew_unless_it_is_kept(
    checkpoints: dict[str, Path], kind: str, head: str, tmp_path: Path
) -> None:
    task, model = task_with(checkpoints[kind])
    for parameter in model.get_submodule(head).parameters():
        torch.nn.init.normal_(parameter)  # biases start at zero, in a trained head they are not
    folder = saved(task, model, tmp_path)
    first = AutoModelForSequenceClassification.from_pretrained(folder)
    _, kept = task_with(folder, "--keep_head=true")
    torch.testing.assert_close(kept.state_dict(), first.state_dict(), rtol=0, atol=0)
    _, fresh = task_with(folder)
    changed = {key for key, value in fresh.state_dict().items() if not torch.equal(value, first.state_dict()[key])}
    assert changed == {key for key in first.state_dict() if key.startswith(f"{head}.")}
    assert fresh.config.id2label == {0: "ant", 1: "bee", 2: "cat"}


# --- untrained models ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "architecture",
    ["bert", "roberta", "distilbert", "deberta-v2", "modernbert", "electra", "albert", "gpt2", "llama"],
)
def test_an_untrained_architecture(architecture: str, tmp_path: Path) -> None:
    task, model = task_with(f"random:{architecture}")
    assert sum(parameter.numel() for parameter in model.parameters()) < 10e6
    assert len(task.processor) <= model.get_input_embeddings().num_embeddings
    expected = logits(task, model, [*TEXTS, LONG])
    alone = torch.cat([logits(task, model, text) for text in [*TEXTS, LONG]])
    torch.testing.assert_close(expected, alone, rtol=1e-4, atol=1e-5)
    folder = saved(task, model, tmp_path)
    answers = pipeline("text-classification", str(folder), top_k=None)([*TEXTS, LONG], truncation=True)
    for answer, values in zip(answers, expected.softmax(-1).tolist(), strict=True):
        assert probabilities(answer) == pytest.approx(values, abs=1e-5)


def test_the_tokenizer_of_an_untrained_model_knows_the_words(checkpoints: dict[str, Path]) -> None:
    task, _ = task_with("random:bert")
    ids = task.processor("a good film")["input_ids"]
    assert task.processor.convert_ids_to_tokens(ids)[0] == "[CLS]"
    assert task.processor.unk_token_id not in ids
    pair = task.processor.convert_ids_to_tokens(task.processor("a film", "a room")["input_ids"])
    assert (pair[-1], pair.count("[SEP]")) == ("[SEP]", 2)


def test_the_tokenizer_of_an_untrained_model_knows_both_texts_of_a_pair(tmp_path: Path) -> None:
    table = tmp_path / "pairs.csv"
    rows = [f"a film {row},a room {row},{'yes' if row % 2 else 'no'}" for row in range(8)]
    table.write_text("\n".join(["sentence1,sentence2,label", *rows]))
    flags = ["--model=random:bert", f"--dataset={table}", "--output_dir=unused"]
    task = TextClassification(hftl.parse(hftl.TextArguments, flags))
    task.build_model(task.load_splits())
    assert task.processor.unk_token_id not in task.processor("a film", "a room")["input_ids"]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("brt", r"no such architecture.*bert"),
        ("vit", "not a model for texts"),
        ("resnet18", "is a model of images"),
        ("qwen2", "a tokenizer of its own"),
    ],
)
def test_an_architecture_that_is_none(name: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        task_with(f"random:{name}")
