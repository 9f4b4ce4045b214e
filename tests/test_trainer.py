"""Order, rates and randomness of a training: functions of seed, epoch, step and row, and of nothing else."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from tiny_models import TINY
from tiny_training import every_tensor, tiny_arguments, tiny_trainer
from torch import nn
from torch.utils.data import BatchSampler, DataLoader
from torchvision.transforms import v2
from transformers import TrainerCallback

from hftl import backbones
from hftl.callbacks import ReadableProgress
from hftl.errors import UsageError
from hftl.images import open_image
from hftl.methods import Stage, build_plan
from hftl.methods.plan import frozen_modules
from hftl.optim import parameter_groups
from hftl.tasks.image_classification import ImageDataset
from hftl.trainer import EpochSampler, EvenShares

LENGTHS = np.random.default_rng(0).integers(1, 200, size=1_003).tolist()


# --- order of rows ---------------------------------------------------------------------------------------------------


def order(seed: int = 0, epoch: int = 0, lengths: list[int] | None = None, batch_size: int = 8) -> list[int]:
    sampler = EpochSampler(len(LENGTHS), seed, lengths, batch_size)
    sampler.set_epoch(epoch)
    assert len(sampler) == len(LENGTHS)
    return list(sampler)


@pytest.mark.parametrize("lengths", [None, LENGTHS])
def test_each_row_comes_once_in_an_order_of_seed_and_epoch(lengths: list[int] | None) -> None:
    first = order(lengths=lengths)
    assert sorted(first) == list(range(len(LENGTHS)))
    torch.manual_seed(1)
    np.random.seed(1)
    assert order(lengths=lengths) == first
    assert order(epoch=1, lengths=lengths) != first
    assert order(seed=1, lengths=lengths) != first
    assert sorted(order(epoch=1, lengths=lengths)) == sorted(first)


@pytest.mark.parametrize("rows", [1, 3, 8, 16, 17, 400, 401])
def test_any_number_of_rows_is_cut_into_batches(rows: int) -> None:
    sampler = EpochSampler(rows, 0, LENGTHS[:rows], batch_size=8)
    assert sorted(sampler) == list(range(rows))


def padding(rows: list[int], batch_size: int = 8) -> float:
    """Pad tokens for one of text."""
    batches = [rows[start : start + batch_size] for start in range(0, len(rows), batch_size)]
    padded = sum(len(batch) * max(LENGTHS[row] for row in batch) for batch in batches)
    return padded / sum(LENGTHS) - 1


def test_rows_of_like_length_come_together() -> None:
    assert padding(order()) > 0.6
    assert padding(order(lengths=LENGTHS)) < 0.05


def test_lengths_do_not_fall_within_a_piece() -> None:
    rows = order(lengths=LENGTHS)[: 50 * 8]
    longest = [max(LENGTHS[row] for row in rows[start : start + 8]) for start in range(0, len(rows), 8)]
    assert abs(np.corrcoef(longest, range(len(longest)))[0, 1]) < 0.4


@pytest.mark.parametrize("accumulated", [1, 4])
def test_two_processes_share_the_batches_of_one(accumulated: int) -> None:
    # Each of two processes gets every second batch of the single process's size.
    rows = 8 * accumulated
    sampler = EpochSampler(960, 0, LENGTHS[:960], batch_size=rows)
    whole = list(sampler)
    shards = [list(EvenShares(BatchSampler(sampler, 4, False), 2, process)) for process in (0, 1)]
    for step, start in enumerate(range(0, len(whole), rows)):
        here = slice(step * accumulated, (step + 1) * accumulated)
        assert sorted(row for shard in shards for batch in shard[here] for row in batch) == sorted(
            whole[start : start + rows]
        )


# --- rates -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", list(TINY))
def test_every_trained_parameter_has_one_rate_and_the_right_decay(name: str) -> None:
    model = TINY[name]()
    blocks, no_decay = backbones.parameter_blocks(model), backbones.no_decay_parameters(model)
    head = max(blocks.values())
    stage = Stage("all", frozenset(blocks), 1e-4, 1e-2, 1.0, layer_decay=0.5)
    groups = parameter_groups(model, stage, weight_decay=0.01)
    found = {id(parameter): group for group in groups for parameter in group["params"]}
    assert sum(len(group["params"]) for group in groups) == len(found) == len(blocks)
    for key, parameter in model.named_parameters():
        group = found[id(parameter)]
        expected = 1e-2 if blocks[key] == head else 1e-4 * 0.5 ** (head - 1 - blocks[key])
        assert group["lr"] == pytest.approx(expected), key
        assert group["weight_decay"] == (0.0 if key in no_decay else 0.01), key
    assert {group["weight_decay"] for group in groups} == {0.0, 0.01}


def test_rates_and_decay_by_name() -> None:
    model = TINY["bert"]()
    stage = Stage("all", frozenset(key for key, _ in model.named_parameters()), 1e-4, 1e-2, 1.0, layer_decay=0.5)
    names = {id(parameter): key for key, parameter in model.named_parameters()}
    groups = parameter_groups(model, stage, 0.01)
    settings = {names[id(entry)]: (group["lr"], group["weight_decay"]) for group in groups for entry in group["params"]}
    expected = {
        "classifier.weight": (1e-2, 0.01),
        "classifier.bias": (1e-2, 0.0),
        "bert.pooler.dense.weight": (1e-2, 0.01),
        "bert.encoder.layer.2.output.dense.weight": (1e-4, 0.01),
        "bert.encoder.layer.1.output.dense.weight": (5e-5, 0.01),
        "bert.encoder.layer.0.output.LayerNorm.weight": (2.5e-5, 0.0),
        "bert.embeddings.word_embeddings.weight": (1.25e-5, 0.01),
        "bert.embeddings.position_embeddings.weight": (1.25e-5, 0.0),
    }
    assert {key: settings[key] for key in expected} == expected


def test_what_does_not_train_is_in_no_group() -> None:
    model = TINY["vit"]()
    stage = Stage("some", frozenset({"classifier.weight", "vit.layers.2.attention.q_proj.bias"}), 1e-4, 1e-2, 1.0)
    assert sum(len(group["params"]) for group in parameter_groups(model, stage, 0.01)) == 2
    with pytest.raises(RuntimeError, match="trains 1 parameters, but 0 were found"):
        parameter_groups(model, Stage("none", frozenset({"no.such"}), 1e-4, 1e-2, 1.0), 0.01)


def test_the_optimizer_has_the_groups(tmp_path: Path) -> None:
    model = TINY["bert"]()
    (stage,) = build_plan(model, tiny_arguments(model, "--layer_decay=0.5")).stages
    trainer = tiny_trainer(model, stage, tmp_path, "--weight_decay=0.05", "--optim=adamw_torch")
    groups = trainer.create_optimizer().param_groups
    assert {group["weight_decay"] for group in groups} == {0.0, 0.05}
    assert len({group["lr"] for group in groups}) == 5  # the head and four blocks


# --- randomness of a step --------------------------------------------------------------------------------------------


class Disturbance(TrainerCallback):
    """Uses the generator between steps, as another callback might."""

    def on_step_end(self, *_: Any, **__: Any) -> None:
        torch.rand(7)


def weights_after(folder: Path, *flags: str, callbacks: Any = None) -> dict[str, torch.Tensor]:
    model = TINY["bert"]()  # with dropout
    (stage,) = build_plan(model, tiny_arguments(model, "--learning_rate=1e-3")).stages
    trainer = tiny_trainer(model, stage, folder, "--max_steps=4", *flags, rows=8, callbacks=callbacks)
    trainer.train()
    return every_tensor(model)


def test_dropout_is_a_function_of_seed_and_step(tmp_path: Path) -> None:
    first = weights_after(tmp_path)
    torch.testing.assert_close(weights_after(tmp_path, callbacks=[Disturbance()]), first, rtol=0, atol=0)
    other = weights_after(tmp_path, "--seed=1")
    assert not torch.equal(other["classifier.weight"], first["classifier.weight"])


def test_a_resumed_training_ends_where_an_uninterrupted_one_does(tmp_path: Path) -> None:
    model = TINY["bert"]()
    (stage,) = build_plan(model, tiny_arguments(model, "--learning_rate=1e-3")).stages
    flags = [
        "--max_steps=6",
        "--save_strategy=steps",
        "--save_steps=2",
        "--save_total_limit=9",
        "--gradient_accumulation_steps=2",
    ]
    trainer = tiny_trainer(model, stage, tmp_path, *flags, rows=10)
    trainer.train()
    whole = every_tensor(model)
    again = TINY["bert"]()
    torch.rand(11)
    trainer = tiny_trainer(again, stage, tmp_path, *flags, rows=10)
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    torch.testing.assert_close(every_tensor(again), whole, rtol=0, atol=0)


def test_a_loss_that_is_not_finite_stops_with_the_step(tmp_path: Path) -> None:
    model = TINY["bert"]()
    (stage,) = build_plan(model, tiny_arguments(model)).stages

    def loss(outputs: Any, labels: torch.Tensor, num_items_in_batch: Any = None) -> torch.Tensor:
        return outputs["logits"].sum() * float("nan")

    with pytest.raises(UsageError, match=r"The loss is nan at step 1 of stage 'all': try a lower --learning_rate"):
        tiny_trainer(model, stage, tmp_path, "--max_steps=2", loss=loss).train()


# --- progress --------------------------------------------------------------------------------------------------------


class Clock(TrainerCallback):
    """A step takes ten seconds."""

    now = 0.0

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self.now += 10


@pytest.mark.parametrize("terminal", [False, True])
def test_progress_is_a_bar_in_a_terminal_and_lines_elsewhere(
    terminal: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = Clock()
    monkeypatch.setattr("hftl.callbacks.time", SimpleNamespace(monotonic=lambda: clock.now))
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal)
    model = TINY["bert"]()
    (stage,) = build_plan(model, tiny_arguments(model)).stages
    progress = [clock, ReadableProgress("all")]
    tiny_trainer(model, stage, tmp_path, "--max_steps=10", rows=20, callbacks=progress).train()
    printed = capsys.readouterr()
    lines = [re.sub(r"\d\.\d{3}", "…", line) for line in re.findall("all: step .*", printed.out)]
    # More than half a minute after the last one.
    expected = [f"all: step {step} of 10, loss …, about {left} s left" for step, left in ((4, 60), (8, 20))]
    assert lines == ([] if terminal else expected)
    assert ("10/10" in printed.err) == terminal


# --- augmentation ----------------------------------------------------------------------------------------------------


def images(epoch: int = 0, seed: int = 0, workers: int = 0) -> list[torch.Tensor]:
    pixels = np.random.default_rng(0).integers(0, 255, (6, 24, 24, 3), dtype=np.uint8)
    rows = [{"image": entry, "label": row % 2} for row, entry in enumerate(pixels)]
    transform = v2.Compose([v2.RandomResizedCrop(16), v2.RandomHorizontalFlip(), v2.RandAugment(), v2.PILToTensor()])
    data = ImageDataset(rows, open_image, transform, seed=seed)
    data.set_epoch(epoch)
    loader = DataLoader(data, batch_size=2, num_workers=workers, collate_fn=list)
    return [example["pixel_values"] for batch in loader for example in batch]


def same(first: list[torch.Tensor], second: list[torch.Tensor]) -> list[bool]:
    return [torch.equal(one, other) for one, other in zip(first, second, strict=True)]


def test_augmentation_is_a_function_of_seed_epoch_and_row() -> None:
    first = images()
    torch.manual_seed(5)
    assert all(same(images(), first))
    assert all(same(images(workers=2), first))
    assert not any(same(images(epoch=1), first))
    assert not any(same(images(seed=1), first))


def test_workers_that_live_on_see_the_next_epoch() -> None:
    rows = [{"image": np.random.default_rng(row).integers(0, 255, (24, 24, 3), dtype=np.uint8)} for row in range(4)]
    data = ImageDataset(rows, open_image, v2.Compose([v2.RandomResizedCrop(16), v2.PILToTensor()]), seed=0)
    loader = DataLoader(data, num_workers=1, persistent_workers=True, collate_fn=list)
    passes = []
    for epoch in range(2):
        data.set_epoch(epoch)
        passes.append([example["pixel_values"] for batch in loader for example in batch])
        before = torch.random.get_rng_state()
        assert all(same(passes[epoch], [data[row]["pixel_values"] for row in range(4)]))
        assert torch.equal(torch.random.get_rng_state(), before)
    assert not any(same(*passes))


class Epochs(TrainerCallback):
    """Notes the epoch that the data is in at each step."""

    def __init__(self, data: Any) -> None:
        self.data, self.seen = data, []

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self.seen.append(self.data.epoch)


def test_the_data_is_told_its_epoch_also_after_an_interruption(tmp_path: Path) -> None:
    model = TINY["vit"]()
    (stage,) = build_plan(model, tiny_arguments(model, "--num_train_epochs=3")).stages
    flags = ["--save_strategy=steps", "--save_steps=3", "--save_total_limit=9", "--num_train_epochs=3"]

    def epochs(checkpoint: str | None) -> list[int]:
        trainer = tiny_trainer(model, stage, tmp_path, *flags, rows=4)
        trainer.train_dataset.set_epoch = lambda epoch: setattr(trainer.train_dataset, "epoch", epoch)
        watch = Epochs(trainer.train_dataset)
        trainer.add_callback(watch)
        trainer.train(resume_from_checkpoint=checkpoint)
        return watch.seen

    assert epochs(None) == [0, 0, 1, 1, 2, 2]
    assert epochs(str(tmp_path / "checkpoint-3")) == [1, 2, 2]


# --- frozen modules --------------------------------------------------------------------------------------------------


def awake(name: str, *flags: str, kinds: Any = nn.Dropout) -> set[str]:
    """Names of the dropout layers that are on."""
    model = TINY[name]()
    (stage,) = build_plan(model, tiny_arguments(model, *flags)).stages
    frozen = {id(module) for module in frozen_modules(model, stage)}
    return {key for key, module in model.named_modules() if isinstance(module, kinds) and id(module) not in frozen}


def test_dropout_before_a_trained_head_is_on_and_in_frozen_blocks_off() -> None:
    assert awake("bert", "--method=frozen") == {"dropout"}
    assert awake("distilbert", "--method=frozen") == {"dropout"}
    assert awake("gpt2", "--method=frozen") == set()
    assert awake("timm_vit_tiny", "--method=frozen") == {"timm_model.head_drop"}


def test_dropout_in_the_last_trained_block_is_on() -> None:
    found = awake("bert", "--method=partial", "--unfreeze_blocks=1")
    assert found - {"dropout"} == {key for key in awake("bert") if re.search(r"layer\.2\.", key)}
    assert len(found) > 3


def test_all_dropout_is_on_where_everything_trains() -> None:
    model = TINY["bert"]()
    assert awake("bert") == {key for key, module in model.named_modules() if isinstance(module, nn.Dropout)}


def test_batch_norm_is_frozen_by_default_and_trains_on_request() -> None:
    kinds = nn.modules.batchnorm._BatchNorm
    assert awake("resnet", kinds=kinds) == set()
    all_of_them = {key for key, module in TINY["resnet"]().named_modules() if isinstance(module, kinds)}
    assert awake("resnet", "--batch_norm=train", kinds=kinds) == all_of_them
    last = awake("resnet", "--batch_norm=train", "--method=partial", "--unfreeze_blocks=1", kinds=kinds)
    assert last == {key for key in all_of_them if "stages.3" in key}


@pytest.mark.parametrize("processes", [1, 2, 3])
@pytest.mark.parametrize("rows", [1, 2, 3, 7, 8, 9, 16, 17, 24, 25])
def test_processes_share_out_every_row_once(rows: int, processes: int) -> None:
    def shares(least: int, drop_last: bool = False) -> list[list[list[int]]]:
        batches = BatchSampler(range(rows), 4, drop_last)
        return [list(EvenShares(batches, processes, process, least)) for process in range(processes)]

    each = shares(least=1)
    assert len({len(steps) for steps in each}) == 1  # or one would wait for the others for ever
    assert len(each[0]) == len(EvenShares(BatchSampler(range(rows), 4, False), processes, 0))
    for number, step in enumerate(zip(*each, strict=True)):
        wanted = range(rows)[number * 4 * processes : (number + 1) * 4 * processes]
        assert sorted({row for share in step for row in share}) == list(wanted)  # those of one process
        sizes = [len(share) for share in step]
        assert max(sizes) - min(sizes) <= 1
        assert sum(sizes) == max(len(wanted), processes)  # a row comes again only where there is none for a process
    assert all(len(share) >= 2 for steps in shares(least=2) for share in steps)  # BatchNorm wants two
    assert all(len(share) == 4 for steps in shares(least=1, drop_last=True) for share in steps)
