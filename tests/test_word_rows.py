"""The gradient of a word embedding by rows: the training is that by the dense one."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import TINY
from tiny_training import tiny_arguments, tiny_trainer
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, TrainerCallback

from hftl import trainer as trainers
from hftl.methods import build_plan
from hftl.word_rows import WordRows, word_rows


def embedding(rows: list[int], values: list[list[float]]) -> Tensor:
    return torch.sparse_coo_tensor([rows], values, (5, 2), check_invariants=True)


def test_a_step_has_no_rows_of_the_step_before() -> None:
    weight, other = nn.Parameter(torch.ones(5, 2)), nn.Parameter(torch.ones(1))
    words = WordRows(weight, [other])
    steps = [
        (embedding([3, 1, 3], [[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]]), [[0, 0], [3, 4], [0, 0], [6, 8], [0, 0]]),
        (embedding([0, 1], [[9.0, 9.0], [1.0, 1.0]]), [[9, 9], [1, 1], [0, 0], [0, 0], [0, 0]]),
        (torch.sparse_coo_tensor(torch.empty(1, 0), torch.empty(0, 2), (5, 2), check_invariants=True), [[0, 0]] * 5),
    ]
    places = set()
    for gradient, expected in steps:
        words.weight.grad, other.grad = gradient, torch.tensor([2.0])
        norm = words.clip(lambda weights: nn.utils.clip_grad_norm_(weights, 1.0))
        whole = torch.cat([torch.tensor(expected, dtype=torch.float32).flatten(), torch.tensor([2.0])])
        torch.testing.assert_close(norm, whole.norm())
        assert not words.weight.grad.is_sparse
        places.add(words.weight.grad.data_ptr())
        found = torch.cat([words.weight.grad.flatten(), other.grad])
        torch.testing.assert_close(found, whole / max(1.0, float(whole.norm())))
    assert len(places) == 1


def test_a_dense_gradient_or_none_is_left() -> None:
    words = WordRows(nn.Parameter(torch.ones(5, 2)), [])
    given: list[Any] = []
    words.clip(given.extend)
    words.weight.grad = torch.ones(5, 2)
    words.clip(given.extend)
    assert all(weight is words.weight for weight in given)
    assert words.weight.grad.equal(torch.ones(5, 2))


@pytest.mark.parametrize("behind", [False, True], ids=["seen", "by data"])
def test_what_an_optimizer_writes_into_the_gradient_ends_with_the_step(behind: bool) -> None:
    words = WordRows(nn.Parameter(torch.ones(5, 2)), [])
    for row in (1, 3):
        words.weight.grad = embedding([row], [[1.0, 1.0]])
        words.clip(lambda weights: nn.utils.clip_grad_norm_(weights, 10.0), keep=not behind)
        assert words.weight.grad is not None
        assert words.weight.grad.nonzero()[:, 0].unique().tolist() == [row]
        written = words.weight.grad.data if behind else words.weight.grad
        torch._foreach_add_([written], [words.weight], alpha=0.1)  # as schedule-free optimizers


def test_parts_of_a_step_have_each_word_once() -> None:
    words = WordRows(nn.Parameter(torch.ones(5, 2)), [])
    for _ in range(3):
        part = embedding([3, 1, 3], [[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]])
        words.weight.grad = part if words.weight.grad is None else words.weight.grad + part
        words.merge()
        assert words.weight.grad is not None
        assert words.weight.grad._nnz() == 2
    assert words.weight.grad is not None
    assert words.weight.grad.to_dense().equal(3 * torch.tensor([[0, 0], [3.0, 4], [0, 0], [6, 8], [0, 0]]))


def test_whose_words_go_by_rows() -> None:
    def goes(model: Any) -> bool:
        with word_rows(model) as words:
            found = [part for part in model.modules() if getattr(part, "sparse", False)]
            assert len(found) == (words is not None)
        assert not any(getattr(part, "sparse", False) for part in model.modules())
        return words is not None

    assert goes(TINY["bert"]())
    assert not goes(TINY["vit"]())  # no words
    assert not goes(nn.Linear(2, 2))
    assert not goes(GPT2LMHeadModel(GPT2Config(n_embd=8, n_layer=1, n_head=1, vocab_size=20)))  # tied
    assert not goes(TINY["bert"]().double())
    frozen, by_number = TINY["bert"](), TINY["bert"]()
    frozen.get_input_embeddings().requires_grad_(False)
    by_number.get_input_embeddings().scale_grad_by_freq = True
    assert not goes(frozen)
    assert not goes(by_number)


@pytest.mark.parametrize(
    "flags",
    [
        [],
        ["--max_grad_norm=0"],
        ["--max_grad_norm=0.01", "--gradient_accumulation_steps=2"],
        ["--weight_decay=0.1", "--optim=sgd"],
        ["--gradient_checkpointing"],
    ],
    ids=" ".join,
)
def test_the_training_is_that_by_dense_gradients(
    flags: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained, used, places = {}, [], set()

    class Places(TrainerCallback):
        def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **others: Any) -> None:
            places.add(trainer.model.get_input_embeddings().weight.grad.data_ptr())

    @contextlib.contextmanager
    def watched(model: Any) -> Any:
        with word_rows(model) as words:
            used.append(words)
            yield words

    for kind in ("rows", "dense"):
        torch.manual_seed(0)
        model = TINY["bert"]()
        start = {name: weight.clone() for name, weight in model.state_dict().items()}
        with monkeypatch.context() as patch:
            patch.setattr(trainers, "word_rows", watched if kind == "rows" else lambda model: contextlib.nullcontext())
            (stage,) = build_plan(model, tiny_arguments(model, "--learning_rate=1e-3")).stages
            callbacks = [Places()] if kind == "rows" else []
            trainer = tiny_trainer(model, stage, tmp_path, "--max_steps=5", *flags, rows=12, callbacks=callbacks)
            trainer.train()
        norms = [line["grad_norm"] for line in trainer.state.log_history if "grad_norm" in line]
        trained[kind] = {name: weight - start[name] for name, weight in model.state_dict().items()}, norms
    assert [type(words) for words in used] == [WordRows]
    assert places == {used[0].dense.data_ptr()}
    (ours, our_norms), (theirs, their_norms) = trained["rows"], trained["dense"]
    assert our_norms == pytest.approx(their_norms, rel=1e-5)
    assert len(our_norms) == 5
    for name, change in theirs.items():
        torch.testing.assert_close(ours[name], change, rtol=1e-3, atol=1e-6, msg=name)
    assert theirs["bert.embeddings.word_embeddings.weight"].abs().sum() > 0


@pytest.mark.parametrize("flags", [["--max_steps=2"], ["--max_steps=2", "--penalty=l2_sp"]], ids=["ends", "penalty"])
def test_it_ends_with_the_training(flags: list[str], tmp_path: Path) -> None:
    seen = []

    class Watching(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **others: Any) -> None:
            seen.append((trainer.words is not None, embedding_of.sparse))
            if state.global_step == 2:
                raise KeyError

    model = TINY["bert"]()
    embedding_of: Any = model.get_input_embeddings()
    (stage,) = build_plan(model, tiny_arguments(model, *flags)).stages
    trainer = tiny_trainer(model, stage, tmp_path, *flags, rows=8, callbacks=[Watching()])
    with pytest.raises(KeyError):
        trainer.train()
    assert seen == [("--penalty=l2_sp" not in flags,) * 2] * 2
    assert trainer.words is None
    assert not embedding_of.sparse
