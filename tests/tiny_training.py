"""Short trainings of the models in `tiny_models`: arguments, data and a trainer."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny_models import tiny_inputs
from torch.utils.data import Dataset
from transformers import AutoModelForAudioClassification, PreTrainedModel, default_data_collator

import hftl
from hftl.arguments import AudioArguments, ImageArguments, TextArguments, TransferArguments, stage_arguments
from hftl.losses import CrossEntropyLoss
from hftl.methods import Stage
from hftl.tasks.audio_classification import AudioClassification
from hftl.tasks.image_classification import ImageClassification
from hftl.tasks.text_classification import TextClassification
from hftl.trainer import TransferTrainer

# One stage, no warm-up and no schedule: a step is as large as the rate says. Nothing evaluated, nothing written.
PLAIN = [
    "--method=full",
    "--model=some/model",
    "--output_dir=unused",
    "--per_device_train_batch_size=2",
    "--dataloader_num_workers=0",
    "--eval_strategy=no",
    "--save_strategy=no",
    "--load_best_model_at_end=false",
    "--report_to=none",
    "--disable_tqdm=true",
    "--warmup_steps=0",
    "--lr_scheduler_type=constant",
    "--logging_steps=1",
]


def tiny_arguments(model: PreTrainedModel, *flags: str) -> TransferArguments:
    """Parsed arguments for a short training of `model`; later flags win."""
    classes = {"pixel_values": ImageArguments, "input_values": AudioArguments, "input_ids": TextArguments}
    return stage_arguments(_parsed(classes[model.main_input_name], flags))


@cache
def _parsed(arguments_class: type[TransferArguments], flags: tuple[str, ...]) -> TransferArguments:
    return hftl.parse(arguments_class, [*PLAIN, *flags])


class TinyData(Dataset[dict[str, Any]]):
    """`tiny_inputs` as rows, with labels 0, 1, 2, 0, 1, …"""

    def __init__(self, model: PreTrainedModel, rows: int) -> None:
        self.inputs = tiny_inputs(model, batch=rows)
        self.labels = [row % 3 for row in range(rows)]

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, row: int) -> dict[str, Any]:
        return {name: values[row] for name, values in self.inputs.items()} | {"labels": self.labels[row]}


def tiny_trainer(
    model: Any, stage: Stage, folder: Path, *flags: str, rows: int = 4, loss: Any = None, **others: Any
) -> TransferTrainer:
    """A trainer of `stage` over `rows` rows of synthetic data; `model` may be a PEFT model."""
    plain = model.get_base_model() if hasattr(model, "peft_config") else model
    arguments = tiny_arguments(plain, *flags)
    settings = stage_arguments(
        arguments, output_dir=str(folder), num_train_epochs=stage.epochs, learning_rate=stage.learning_rate
    )
    others = {"train_dataset": TinyData(plain, rows), "data_collator": default_data_collator} | others
    return TransferTrainer(stage=stage, loss=loss or CrossEntropyLoss(), model=model, args=settings, **others)


def every_tensor(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Copies of all parameters and buffers by name."""
    tensors = [*model.named_parameters(), *model.named_buffers()]
    return {name: tensor.detach().clone() for name, tensor in tensors}


def task_of(model: PreTrainedModel) -> Any:
    """The model's task, with nothing but the model to save."""
    tasks: dict[str, Any] = {"pixel_values": ImageClassification, "input_ids": TextClassification}
    task = tasks.get(model.main_input_name, AudioClassification)(tiny_arguments(model))
    if model.main_input_name == "input_values":
        task.auto_class = AutoModelForAudioClassification  # as it sets it for a model of waveforms
    task.processor = SimpleNamespace(save_pretrained=lambda folder: None)
    return task


def logits_of(model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(**batch).logits


@contextmanager
def failing_trainings(module: Any, fails: Callable[[Any], bool]) -> Iterator[list[bool]]:
    """Trainings that `module` begins fail for want of memory where `fails` says so of their arguments.

    Yields whether the models of those that failed still live, each time that a training begins. Nothing is collected
    unless the code asks for it.
    """
    train_plan, failed, alive = module.train_plan, [], []

    def fail(task: Any, plan: Any, splits: Any, arguments: Any, callbacks: Any) -> Any:
        alive.extend(reference() is not None for reference in failed)
        if fails(arguments):
            plan.model.itself = [plan.model]  # a circle, as a trainer makes
            failed.append(weakref.ref(plan.model))
            raise torch.OutOfMemoryError("full")
        return train_plan(task, plan, splits, arguments, callbacks)

    gc.disable()
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(module, "train_plan", fail)
            yield alive
    finally:
        gc.enable()
