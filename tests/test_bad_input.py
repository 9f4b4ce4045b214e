"""Bad input ends with exit code 2, one clear error line, no traceback, and nothing left behind: one table."""

from __future__ import annotations

import contextlib
import errno
import importlib.util
import io
import os
import shlex
import shutil
import subprocess
import sys
from collections import namedtuple
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from forked import ROOT, run_command
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny_models import write_timm_folder, write_tiny_image_model, write_tiny_text_model

from hftl import cli


@dataclass(frozen=True)
class Bad:
    """A command that must fail.

    `command` is split as a shell does; `{bert}` and the like are files of the `world` fixture. `files` are written
    into the working folder first. `patch` changes what the machine seems to be.
    """

    name: str
    command: str
    words: tuple[str, ...]
    files: Mapping[str, str | bytes] = field(default_factory=dict)
    patch: Callable[[pytest.MonkeyPatch], None] | None = None


FOLDER = b"folder"  # in place of a file's content
BROKEN_LINK = b"broken link"


def png(number: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), (number * 40 % 256, number, 0)).save(buffer, format="PNG")
    return buffer.getvalue()


def table(*rows: str, header: str = "text,label") -> str:
    """Ten good rows, and then these."""
    good = [f"a plain film {row},{'good' if row % 2 else 'bad'}" for row in range(10)]
    return "\n".join([header, *good, *rows]) + "\n"


def classes(folder: str, **counts: int) -> dict[str, bytes]:
    return {f"{folder}/{name}/{row}.png": png(row) for name, count in counts.items() for row in range(count)}


# ---- what the machine seems to be -----------------------------------------------------------------------------------


def no_gpu(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(torch.accelerator, "is_available", lambda: False)


def old_gpu(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(torch.accelerator, "is_available", lambda: True)
    patch.setattr(torch.cuda, "is_available", lambda: True)
    patch.setattr(torch.cuda, "is_bf16_supported", lambda **_: False)


def full_disk(patch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")
    patch.setattr(shutil, "disk_usage", lambda path: usage(10**9, 10**9 - 5000, 5000))


def offline(patch: pytest.MonkeyPatch) -> None:
    import datasets
    import huggingface_hub

    patch.setenv("HF_HUB_OFFLINE", "1")
    patch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    patch.setattr(datasets.config, "HF_HUB_OFFLINE", True)


def no_bitsandbytes(patch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    patch.setattr(importlib.util, "find_spec", lambda name, *others: None if name == "bitsandbytes" else find(name))


def started_apart(patch: pytest.MonkeyPatch) -> None:
    patch.setenv("WORLD_SIZE", "2")


def unseen_by_accelerate(patch: pytest.MonkeyPatch) -> None:
    """A GPU, and all that a launcher sets; but Accelerate takes this LOCAL_RANK for none, and the process for one."""
    patch.setattr(torch.accelerator, "is_available", lambda: True)
    settings = {"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "-1", "MASTER_ADDR": "localhost"}
    for name, value in settings.items():
        patch.setenv(name, value)


def half_precision_launched(patch: pytest.MonkeyPatch) -> None:
    no_gpu(patch)
    patch.setenv("ACCELERATE_MIXED_PRECISION", "fp16")


# ---- the table ------------------------------------------------------------------------------------------------------

TEXT = "train text-classification --model {bert} --dataset {table} --output_dir out"
IMAGE = "train image-classification --model {vit} --dataset {images} --output_dir out"


def on_text(dataset: str) -> str:
    return f"train text-classification --model {{bert}} --dataset {dataset} --output_dir out"


def on_images(dataset: str) -> str:
    return f"train image-classification --model {{vit}} --dataset {dataset} --output_dir out"


def with_model(model: str, task: str = "text", data: str = "table") -> str:
    return f"train {task}-classification --model {model} --dataset {{{data}}} --output_dir out"


METRIC = """
import datasets
import evaluate


class Mine(evaluate.Metric):
    def _info(self):
        features = datasets.Features({"predictions": datasets.Value("int32"), "references": datasets.Value("int32")})
        return evaluate.MetricInfo(description="", citation="", features=features)

    def _compute(self, predictions, references):
        raise RuntimeError("no idea")
"""
METHOD = "import hftl\n\n\ndef my_method(model, arguments):\n    return 7\n"

FLAGS = [
    Bad("unknown command", "trian", ("Unknown command 'trian'", "Did you mean 'train'", "hftl --help")),
    Bad("unknown task", "train image-clasification", ("'image-clasification'", "Did you mean 'image-classification'")),
    Bad("no task", "train --dataset {table}", ("Name the task", "image-classification", "text-classification")),
    Bad("unknown flag", f"{TEXT} --learning_rat 1e-4", ("Unknown flag --learning_rat", "'learning_rate'")),
    Bad(
        "flag of another task",
        f"{TEXT} --image_size 64",
        ("Unknown flag --image_size. It is for image-classification, ", "leave it out"),
    ),
    Bad("no room for a text", f"{TEXT} --max_length 2", ("--max_length 2 leaves no room", "2 special tokens")),
    Bad("answers one by one", f"{TEXT} --eval_do_concat_batches false", ("--eval_do_concat_batches", "Leave it out")),
    Bad("only the loss", f"{TEXT} --prediction_loss_only true", ("--prediction_loss_only", "Leave it out")),
    Bad(
        "weights rounded by an evaluation",
        f"{TEXT} --bf16_full_eval true",
        ("--bf16_full_eval rounds the trained weights", "--precision bf16"),
    ),
    Bad(
        "weights rounded to fp16 by an evaluation",
        f"{TEXT} --fp16_full_eval true",
        ("--fp16_full_eval rounds the trained weights", "--precision fp16"),
    ),
    Bad("negative decay", f"{TEXT} --weight_decay -1", ("--weight_decay", "from 0 on, not -1")),
    Bad("clipping at no number", f"{TEXT} --max_grad_norm nan", ("--max_grad_norm", "not nan")),
    Bad(
        "no whole batch",
        f"{TEXT} --dataloader_drop_last true --per_device_train_batch_size 99",
        ("--dataloader_drop_last",),
    ),
    Bad("prefetch without workers", f"{TEXT} --dataloader_prefetch_factor 2", ("--dataloader_prefetch_factor",)),
    Bad("one row of train", f"{TEXT} --max_train_samples 1", ("with --max_train_samples has one class only",)),
    Bad("no steps", f"{TEXT} --max_steps 0", ("--max_steps", "above 0")),
    Bad("a GPU that is not there", f"{TEXT} --use_cpu false", ("--use_cpu false", "GPU"), patch=no_gpu),
    Bad("flag without its value", f"{TEXT} --seed", ("--seed", "expected one argument")),
    Bad("value without a flag", f"{TEXT} rubbish", ("Unexpected argument 'rubbish'",)),
    Bad("unknown choice", f"{IMAGE} --augmentation mild", ("--augmentation", "'mild'", "light", "strong")),
    Bad("unknown choice of transformers", f"{TEXT} --lr_scheduler_type cosin", ("cosin", "--lr_scheduler_type")),
    Bad(
        "settings of a schedule that has none",
        f"{TEXT} --lr_scheduler_type one_cycle --lr_scheduler_kwargs '{{{{\"a\": 1}}}}'",
        ("--lr_scheduler_kwargs", "one_cycle"),
    ),
    Bad("unknown choice of when", f"{TEXT} --eval_strategy sometimes", ("sometimes", "--eval_strategy", "epoch")),
    Bad("mixup of texts", f"{TEXT} --mixup 0.2", ("--mixup mixes the pixels", "embeddings", "not supported")),
    Bad(
        "fitted head behind pairs, other words each epoch",
        f"{TEXT} --method setfit --head tip --word_dropout 0.2",
        ("--head tip cannot be: --word_dropout changes the texts every epoch",),
    ),
    Bad(
        "solved head behind pairs, other words each epoch",
        f"{TEXT} --method setfit --head_solver lbfgs --word_dropout 0.2",
        ("--head_solver lbfgs cannot be: --word_dropout changes the texts every epoch",),
    ),
    Bad(
        "fitted head behind pairs, other images each epoch",
        f"{IMAGE} --method setfit --head knn --augmentation strong",
        ("--head knn cannot be: --augmentation strong changes the images every epoch",),
    ),
    Bad(
        "kept features behind the head, other images each epoch",
        f"{IMAGE} --method gradual --feature_cache on --augmentation strong",
        ("--feature_cache on cannot be: --augmentation strong changes the images every epoch",),
    ),
    Bad(
        "kept features behind the head, rows mixed",
        f"{IMAGE} --method gradual --feature_cache on --mixup 0.2",
        ("--feature_cache on cannot be: the rows of a batch are mixed",),
    ),
    Bad("cutmix of texts", f"{TEXT} --cutmix 1", ("--cutmix mixes the pixels", "embeddings", "not supported")),
    Bad("cutmix of sounds", "train audio-classification --model m --dataset d --cutmix 1", ("--cutmix", "--mixup")),
    Bad("mixup of nothing", f"{IMAGE} --mixup 0", ("--mixup must be above 0",)),
    Bad("decay without its average", f"{TEXT} --ema_decay 0.9", ("--ema_decay is for --average ema",)),
    Bad("average that is not saved", f"{TEXT} --average ema --save_only_model", ("--save_only_model", "--average ema")),
    Bad("decay of two", f"{TEXT} --average ema --ema_decay 2", ("--ema_decay", "between 0 and 1")),
    Bad(
        "soup of no evaluation",
        f"{TEXT} --average soup --num_train_epochs 2 --eval_delay 3",
        ("--eval_delay 3", "--average soup", "2 epochs"),
    ),
    Bad(
        "evaluations of the ladder delayed",
        f"{TEXT} --method auto --time_budget 60s --eval_delay 1",
        ("--eval_delay: --method auto places its evaluations itself", "Leave it out"),
    ),
    Bad("mean of one epoch", f"{TEXT} --average swa --num_train_epochs 1", ("--average swa", "--num_train_epochs 2")),
    Bad(
        "mean of an unknown length",
        f"{TEXT} --average swa --early_stopping_patience 2",
        ("--average swa", "leave out --early_stopping_patience"),
    ),
    Bad(
        "soup without evaluations",
        f"{TEXT} --average soup --eval_strategy no",
        ("--average soup", "--eval_strategy epoch"),
    ),
    Bad(
        "soup without evaluations, the best not loaded",
        f"{TEXT} --average soup --eval_strategy no --load_best_model_at_end false",
        ("--average soup", "--eval_strategy epoch"),
    ),
    Bad(
        "solved head averaged",
        f"{TEXT} --method frozen --average ema --head_solver lbfgs",
        ("--head_solver lbfgs", "--average ema"),
    ),
    Bad(
        "a solved head that is to be compiled",
        f"{TEXT} --method frozen --torch_compile --head_solver lbfgs",
        ("--head_solver lbfgs", "--torch_compile"),
    ),
    Bad("average within auto", f"{TEXT} --method auto --average soup", ("--average", "--method auto")),
    Bad("mix without a start", with_model("random:bert") + " --wise_ft", ("--wise_ft", "random:", "Leave it out")),
    Bad("mix of adapters", f"{TEXT} --method lora --wise_ft", ("--wise_ft", "--method lora", "lp_ft")),
    Bad("mix of what is frozen", f"{TEXT} --method frozen --wise_ft", ("--wise_ft", "ends with the head alone")),
    Bad("erasing of two", f"{IMAGE} --random_erasing 2", ("--random_erasing", "between 0 and 1")),
    Bad(
        "erasing of nothing",
        f"{IMAGE} --random_erasing 0.2 --augmentation none",
        ("--random_erasing and --augmentation none contradict",),
    ),
    Bad(
        "flip of what is not flipped",
        f"{IMAGE} --test_time_flip --horizontal_flip false",
        ("--test_time_flip and --horizontal_flip false contradict",),
    ),
    Bad("dropout of all words", f"{TEXT} --word_dropout 1", ("--word_dropout", "between 0 and 1")),
    Bad(
        "no token for a dropped word",
        f"{with_model('{gpt2}')} --word_dropout 0.1",
        ("--word_dropout", "mask or unknown"),
    ),
    Bad("unknown loss", f"{TEXT} --loss focl", ("Unknown loss 'focl'", "Did you mean 'focal'", "logit_adjusted")),
    Bad("no loss file", f"{TEXT} --loss my.py:mine", ("--loss", "no file 'my.py'")),
    Bad(
        "smoothed focal loss",
        f"{TEXT} --loss focal --label_smoothing_factor 0.1",
        ("--label_smoothing_factor", "--loss focal"),
    ),
    Bad(
        "two remedies for rare classes",
        f"{TEXT} --loss logit_adjusted --class_weights balanced --sampler balanced",
        ("--class_weights balanced and --loss logit_adjusted and --sampler balanced", "leave all but one out"),
    ),
    Bad(
        "solved focal loss",
        f"{TEXT} --method frozen --loss focal --head_solver lbfgs",
        ("--head_solver lbfgs", "--loss focal", "trained"),
    ),
    Bad("unknown optimizer", f"{TEXT} --optim adamm", ("adamm", "--optim")),
    Bad("unknown tracker", f"{TEXT} --report_to tensorbord", ("tensorbord", "--report_to")),
    Bad("no config file", f"{TEXT} --config no.yaml", ("'no.yaml' does not exist",)),
    Bad("config without its path", f"{TEXT} --config", ("--config needs the path",)),
    Bad("config that is no YAML", f"{TEXT} --config c.yaml", ("'c.yaml' cannot be read",), {"c.yaml": "a: [1\n"}),
    Bad("two configs", f"{TEXT} --config a.yaml --config b.yaml", ("--config is given more than once",)),
    Bad(
        "one key twice",
        f"{TEXT} --config c.yaml",
        ("'c.yaml'", "'seed' stands there"),
        {"c.yaml": "seed: 1\nseed: 2\n"},
    ),
    Bad("output folder without a name", f"{TEXT} --output_dir ''", ("--output_dir is empty",)),
    Bad("output folder with too long a name", f"{TEXT} --output_dir {'x' * 300}", ("xxx", "too long")),
    Bad("config that is a list", f"{TEXT} --config c.yaml", ("'c.yaml' must hold",), {"c.yaml": "- a\n"}),
    Bad(
        "unknown key",
        f"{TEXT} --config c.yaml",
        ("Unknown key 'learning_rte' in 'c.yaml'", "Did you mean 'learning_rate'"),
        {"c.yaml": "learning_rte: 1e-4\n"},
    ),
    Bad(
        "word for a number in YAML",
        f"{TEXT} --config c.yaml",
        ("--learning_rate", "float", "'fast'"),
        {"c.yaml": "learning_rate: fast\n"},
    ),
    Bad(
        "string for a number in YAML",
        f"{TEXT} --config c.yaml",
        ("--num_train_epochs", "float", "'three'"),
        {"c.yaml": 'num_train_epochs: "three"\n'},
    ),
    Bad(
        "number for yes or no in YAML",
        f"{IMAGE} --config c.yaml",
        ("--horizontal_flip", "7"),
        {"c.yaml": "horizontal_flip: 7\n"},
    ),
    Bad(
        "list for a number in YAML",
        f"{TEXT} --config c.yaml",
        ("'seed' in 'c.yaml'", "not a list"),
        {"c.yaml": "seed: [1, 2]\n"},
    ),
    Bad(
        "settings of another task",
        f"{TEXT} --config c.yaml",
        ("'image-classification'", "'text-classification'"),
        {"c.yaml": "task: image-classification\n"},
    ),
    Bad("batch of none", f"{TEXT} --per_device_train_batch_size 0", ("--per_device_train_batch_size", "above 0")),
    Bad("epochs below none", f"{TEXT} --num_train_epochs -1", ("--num_train_epochs", "above 0")),
    Bad("rate that is no number", f"{TEXT} --learning_rate nan", ("--learning_rate must be a finite number, not nan",)),
    Bad("seed below none", f"{TEXT} --seed -5", ("--seed", "between 0", "-5")),
    Bad("dropout of two", f"{TEXT} --method lora --lora_dropout 2", ("--lora_dropout", "between 0 and 1")),
    Bad("beta of two", f"{TEXT} --adam_beta1 2", ("settings cannot be used", "beta", "2.0")),
    Bad("optimizer that is not installed", f"{TEXT} --optim lomo", ("settings cannot be used", "lomo")),
    Bad("sharding of one process", f"{TEXT} --fsdp full_shard", ("settings cannot be used", "fsdp", "distributed")),
    Bad("no log interval", f"{TEXT} --logging_steps 0", ("--logging_steps",)),
    Bad("fraction of two", f"{TEXT} --validation_fraction 2", ("--validation_fraction", "between 0 and 1", "2")),
    Bad("no best without evaluation", f"{TEXT} --eval_strategy no", ("--load_best_model_at_end false",)),
    Bad(
        "stopping without evaluation",
        f"{TEXT} --early_stopping_patience 2 --eval_strategy no --load_best_model_at_end false",
        ("--early_stopping_patience", "--eval_strategy epoch"),
    ),
    Bad("checkpoint of Trainer's", f"{TEXT} --resume_from_checkpoint old", ("--resume_from_checkpoint", "--resume")),
    Bad("resume and overwrite", f"{TEXT} --resume --overwrite", ("--resume", "--overwrite")),
    Bad(
        "workers below none",
        f"{TEXT} --dataloader_num_workers -5",
        ("--dataloader_num_workers must be 0 or more", "-5"),
    ),
    Bad("package of a flag", f"{TEXT} --deepspeed zero.json", ("--deepspeed", "pip install deepspeed")),
    Bad("image below a patch", f"{IMAGE} --image_size 7", ("--image_size 7", "one patch", "8 pixels")),
    Bad("no data", "train text-classification --model {bert}", ("--dataset is missing",)),
    Bad("no model", "train text-classification --dataset {table}", ("--model is missing", "builtin:NAME")),
]


def with_settings(method: str, settings: str) -> str:
    return f"{TEXT} --method {method} --peft_config '{{{{{settings}}}}}'"  # commands are formatted once more


UNKNOWN_PARAMETER = """import hftl


def my_method(model, arguments):
    return hftl.Plan(model, (hftl.Stage("head", frozenset({"clasifier.weight"}), 1e-3, 1e-3, 1.0),))
"""

METHODS = [
    Bad(
        "method with an unknown parameter",
        f"{TEXT} --method my.py:my_method",
        ("my.py:my_method", "no parameter 'clasifier.weight'", "'classifier.weight'"),
        {"my.py": UNKNOWN_PARAMETER},
    ),
    Bad(
        "method without arguments",
        f"{TEXT} --method my.py:my_method",
        ("must take (model, arguments)",),
        {"my.py": "def my_method():\n    return 7\n"},
    ),
    Bad(
        "method with an empty plan",
        f"{TEXT} --method my.py:my_method",
        ("my.py:my_method", "a plan needs stages"),
        {"my.py": METHOD.replace("return 7", "return hftl.Plan(model, ())")},
    ),
    Bad(
        "method file that imports what is not there",
        f"{TEXT} --method my.py:my_method",
        ("my.py cannot be imported", "'nosuchmodule'"),
        {"my.py": "import nosuchmodule\n"},
    ),
    Bad("swapped letters", f"{TEXT} --method lroa", ("Unknown method 'lroa'", "Did you mean 'lora'")),
    Bad("unknown method", f"{TEXT} --method frozzen", ("Unknown method 'frozzen'", "Did you mean 'frozen'")),
    Bad(
        "flag that the method does not use",
        f"{TEXT} --method full --lora_r 4",
        ("--method full does not use --lora_r", "used by: lora"),
    ),
    Bad("head of another method", f"{TEXT} --head svm", ("--method lp_ft does not use --head", "used by: frozen")),
    Bad("unknown head", f"{TEXT} --method frozen --head swm", ("--head", "'swm'", "nearest_mean")),
    Bad("no layers", f"{TEXT} --method frozen --feature_layers 0", ("--feature_layers must be above 0",)),
    Bad("layers that are not there", f"{TEXT} --method frozen --feature_layers 5", ("between 1", "4 blocks, not 5")),
    Bad("unknown pooling", f"{TEXT} --method frozen --feature_pooling median", ("--feature_pooling", "'median'")),
    Bad("layers of another method", f"{TEXT} --feature_layers 2", ("lp_ft does not use --feature_layers", "frozen")),
    Bad("pooling of another method", f"{TEXT} --feature_pooling max", ("lp_ft does not use --feature_pooling",)),
    Bad(
        "layers of a method of one's own",
        f"{TEXT} --method my.py:my_method --feature_layers 2",
        ("--feature_layers 2 belongs to --method frozen",),
        {"my.py": UNKNOWN_PARAMETER.replace("clasifier", "classifier")},
    ),
    Bad(
        "layers for a trained head",
        f"{TEXT} --method frozen --feature_layers 2 --head_solver sgd",
        ("--feature_layers 2: the head is fitted on kept features", "leave out --head_solver sgd"),
    ),
    Bad(
        "layers that are not kept",
        f"{TEXT} --method frozen --feature_pooling max --feature_cache off",
        ("--feature_pooling max: the head is fitted on kept features", "leave out --feature_cache off"),
    ),
    Bad(
        "layers and mirror images",
        f"{IMAGE} --method frozen --feature_layers 2 --test_time_flip",
        ("--feature_layers 2: the head answers for the plain view alone", "leave out --test_time_flip"),
    ),
    Bad(
        "layers that are one",
        f"{with_model('random:albert')} --method frozen --feature_layers 2",
        ("--feature_layers 2 cannot be", "more than once"),
    ),
    Bad("shots above a class", f"{TEXT} --shots 11", ("--shots 11", "train has 10 rows of the class 'bad'")),
    Bad("shots that leave nothing", f"{TEXT} --shots 10", ("--shots 10", "no rows left for validation")),
    Bad("no shots", f"{TEXT} --shots 0", ("--shots", "above 0")),
    Bad("shots of a part", f"{TEXT} --shots 2 --max_train_samples 9", ("--shots and --max_train_samples exclude",)),
    Bad("checkpoints of trials", f"{TEXT} --method auto --keep_checkpoints", ("--keep_checkpoints", "auto removes")),
    Bad("repeats of auto", f"{TEXT} --method auto --repeats 2", ("--repeats", "Name a method")),
    Bad("repeats below one", f"{TEXT} --repeats 0", ("--repeats", "above 0")),
    Bad(
        "repeats that fail",
        f"{TEXT} --method full --repeats 2 --feature_cache on",
        ("--feature_cache on", "whole model"),
    ),
    Bad(
        "budget for another method", f"{TEXT} --time_budget 10s", ("--method lp_ft does not use --time_budget", "auto")
    ),
    Bad("budget that is no time", f"{TEXT} --method auto --time_budget soon", ("--time_budget", "200s, 10m", "'soon'")),
    Bad("two budgets", f"{TEXT} --method auto --time_budget 1m --preset fast", ("--time_budget and --preset exclude",)),
    Bad(
        "budget too short",
        f"{TEXT} --method auto --time_budget 1s",
        ("too short for anything", "take about ", "Give at least that"),
    ),
    Bad("unknown preset", f"{TEXT} --method auto --preset fats", ("--preset", "Did you mean 'fast'?")),
    Bad(
        "unknown schedule",
        f"{TEXT} --lr_scheduler_type slanted_triangle",
        ("--lr_scheduler_type", "one_cycle", "cosine", "Did you mean 'slanted_triangular'?"),
    ),
    Bad("unknown measure", "rank --models {bert} --dataset {table} --by logmee", ("--by", "Did you mean 'logme'?")),
    Bad(
        "epochs for auto",
        f"{TEXT} --method auto --num_train_epochs 2",
        ("--method auto chooses --num_train_epochs itself",),
    ),
    Bad(
        "key that the method does not use",
        f"{TEXT} --config c.yaml",
        ("--method frozen does not use --unfreeze_blocks", "used by: partial"),
        {"c.yaml": "method: frozen\nunfreeze_blocks: 1\n"},
    ),
    Bad("blocks anew beyond those there are", f"{TEXT} --reinit_blocks 9", ("--reinit_blocks", "between 1", "9")),
    Bad("no blocks anew", f"{TEXT} --reinit_blocks 0", ("--reinit_blocks", "above 0")),
    Bad(
        "more blocks anew than train",
        f"{TEXT} --method partial --unfreeze_blocks 1 --reinit_blocks 2",
        ("--reinit_blocks 2 is more than the 1 blocks that train", "--unfreeze_blocks"),
    ),
    Bad(
        "blocks anew of a model that is new",
        f"{with_model('random:bert')} --reinit_blocks 1",
        ("--reinit_blocks needs a pretrained model", "random:bert"),
    ),
    Bad(
        "statistics of a model that has none",
        f"{TEXT} --batch_norm adapt",
        ("--batch_norm adapt", "BertForSequenceClassification has no BatchNorm layer"),
    ),
    Bad(
        "statistics trained of a model that has none",
        f"{TEXT} --batch_norm train",
        ("--batch_norm train", "BertForSequenceClassification has no BatchNorm layer"),
    ),
    Bad(
        "task of PEFT",
        with_settings("lora", '"task_type": "CAUSAL_LM"'),
        ("'task_type' is set by hftl", "another task of hftl"),
    ),
    Bad(
        "statistics of a model that is not pretrained",
        f"{with_model('random:resnet18', 'image', 'images')} --batch_norm adapt",
        ("--batch_norm adapt needs a pretrained model",),
    ),
    Bad("unknown penalty", f"{TEXT} --penalty l2sp", ("Unknown penalty 'l2sp'", "Did you mean 'l2_sp'", "r_drop")),
    Bad("weight of no penalty", f"{TEXT} --penalty_weight 0.1", ("--penalty_weight", "none is given")),
    Bad("negative weight", f"{TEXT} --penalty bss --penalty_weight -1", ("--penalty_weight", "0 or more")),
    Bad("penalty on what adapters leave alone", f"{TEXT} --method lora --penalty delta", ("delta", "bss or r_drop")),
    Bad(
        "statistics of a head alone",
        f"{with_model('{timm}', 'image', 'images')} --method frozen --batch_norm train",
        ("--batch_norm train", "frozen trains the head alone"),
    ),
    Bad("advice on a rate that is sought", f"advise{TEXT[5:]} --learning_rate auto", ("lr-find", "Leave it out")),
    Bad("penalty of a head alone", f"{TEXT} --method frozen --penalty bss", ("frozen does not use --penalty",)),
    Bad(
        "penalty without a start",
        f"{with_model('random:bert')} --penalty l2_sp",
        ("--penalty l2_sp needs a pretrained model", "random:bert"),
    ),
    Bad(
        "penalty without a start, on features",
        f"{with_model('random:resnet18', 'image', 'images')} --penalty delta",
        ("--penalty delta needs a pretrained model",),
    ),
    Bad(
        "penalty on what starts anew",
        f"{TEXT} --penalty l2_sp --reinit_blocks 1",
        ("--penalty l2_sp", "--reinit_blocks", "leave one"),
    ),
    Bad(
        "two passes that are the same",
        f"{with_model('{timm}', 'image', 'images')} --penalty r_drop",
        ("--penalty r_drop", "dropout", "TimmWrapperForImageClassification has none"),
    ),
    Bad(
        "features that are no vectors",
        f"{with_model('{gpt2}')} --penalty bss",
        ("--penalty bss", "GPT2ForSequenceClassification does not read one vector a row"),
    ),
    Bad("penalty and compilation", f"{TEXT} --penalty bss --torch_compile", ("--penalty", "--torch_compile")),
    Bad(
        "penalty of a wrong form",
        f"{TEXT} --penalty my.py:mine",
        ("--penalty my.py:mine", "must take (stage, model, batch, outputs)"),
        {"my.py": "def mine(model):\n    return 0\n"},
    ),
    Bad("no penalty file", f"{TEXT} --penalty my.py:mine", ("--penalty", "no file 'my.py'")),
    Bad("no method file", f"{TEXT} --method my.py:my_method", ("--method", "no file 'my.py'")),
    Bad(
        "method file without the function",
        f"{TEXT} --method my.py:my_metod",
        ("my.py has no function 'my_metod'", "Did you mean 'my_method'"),
        {"my.py": METHOD},
    ),
    Bad(
        "method file with an error of syntax",
        f"{TEXT} --method broken.py:my_method",
        ("broken.py", "line 1"),
        {"broken.py": "def my_method(\n"},
    ),
    Bad("method of no module", f"{TEXT} --method :f", ("--method", "file.py:function")),
    Bad("no method module", f"{TEXT} --method no_such.module:f", ("no module 'no_such.module'",)),
    Bad("method module without the function", f"{TEXT} --method json:dumpz", ("'dumpz'", "Did you mean 'dump")),
    Bad("method without a plan", f"{TEXT} --method my.py:my_method", ("return a Plan, not int",), {"my.py": METHOD}),
    Bad("too many blocks", f"{TEXT} --method partial --unfreeze_blocks 9", ("--unfreeze_blocks", "between 1", "9")),
    Bad("too many blocks at a time", f"{TEXT} --method gradual --unfreeze_blocks 9", ("between 1", "not 9")),
    Bad("no blocks", f"{TEXT} --method partial --unfreeze_blocks 0", ("--unfreeze_blocks", "between 1")),
    Bad(
        "unknown adapter target",
        f"{TEXT} --method lora --lora_target_modules qery",
        ("--lora_target_modules", "'qery'", "Did you mean 'query'"),
    ),
    Bad("adapter without a type", f"{TEXT} --method peft", ("--method peft needs --peft_type", "LORA")),
    Bad("type left out", f"{TEXT} --method peft --peft_type p_tuning", ("'p_tuning'", "adapts no layer", "ADALORA")),
    Bad("unknown type", f"{TEXT} --method peft --peft_type adalra", ("'adalra'", "Did you mean 'ADALORA'")),
    Bad("misspelled short name", f"{TEXT} --method doar", ("Unknown method 'doar'", "Did you mean 'dora'")),
    Bad(
        "unknown key of a type",
        with_settings("lokr", '"alhpa": 4'),
        ("LOKR has no setting 'alhpa'", "Did you mean 'alpha'"),
    ),
    Bad("key that hftl sets", with_settings("ia3", '"target_modules": []'), ("--lora_target",)),
    Bad("key given twice", with_settings("lora --lora_r 4", '"r": 4'), ("'r'", "--lora_r")),
    Bad("key of a short name", with_settings("dora", '"use_dora": false'), ("'use_dora'",)),
    Bad("settings that are no JSON", f"{TEXT} --method ia3 --peft_config r=4", ("--peft_config is no JSON", "'{")),
    Bad("setting that is no number", with_settings("lora", '"lora_alpha": NaN'), ("--peft_config is no JSON", "NaN")),
    Bad("settings that do not fit", with_settings("miss", '"r": 999'), ("MISS", "999")),
    Bad("adapters with nothing to take", f"{TEXT} --method ia3 --lora_target_modules LayerNorm", ("IA3", "LN_TUNING")),
    Bad("pattern that matches nothing", f"{TEXT} --method lora --lora_layers_pattern qkv", ("'qkv'", "the first are")),
    Bad(
        "pattern that is none", f"{TEXT} --method lora --lora_layers_pattern '('", ("--lora_layers_pattern", "regular")
    ),
    Bad(
        "rank for a type without one",
        f"{TEXT} --method ia3 --lora_r 4",
        ("--method ia3 does not use --lora_r", "used by: lora, dora, rslora, pissa"),
    ),
    Bad(
        "type that takes no convolutions",
        f"{with_model('{timm}', 'image', 'images')} --method vera",
        ("VERA", "convolution", "LORA"),
    ),
    Bad(
        "start that takes no convolutions",
        f"{with_model('{timm}', 'image', 'images')} --method pissa",
        ("pissa", "linear"),
    ),
    Bad("8 bits, whole model", f"{TEXT} --load_in_8bit", ("--method lp_ft does not use --load_in_8bit", "lora, peft")),
    Bad(
        "4 bits, convolutions",
        f"{IMAGE} --model {{timm}} --method lora --load_in_4bit",
        ("--load_in_4bit", "no linear layer"),
    ),
    Bad(
        "a start from the weights, in 8 bits",
        f"{TEXT} --method pissa --load_in_8bit",
        ("--method pissa: this start", "8 or 4 bits"),
    ),
    Bad("DoRA in 8 bits", f"{TEXT} --method dora --load_in_8bit", ("--load_in_8bit", "DoRA", "--load_in_4bit")),
    Bad("8 and 4 bits", f"{TEXT} --method lora --load_in_8bit --load_in_4bit", ("exclude each other",)),
    Bad("4 bits, type without them", f"{TEXT} --method vera --load_in_4bit", ("VERA does not go with", "LORA")),
    Bad(
        "4 bits without the package",
        f"{TEXT} --method lora --load_in_4bit",
        ("--load_in_4bit needs bitsandbytes", "pip install 'hftl[quantized]'"),
        patch=no_bitsandbytes,
    ),
    Bad("no recipe file", "train my.py", ("Recipe", "no file 'my.py'"), {"your.py": "main = print\n"}),
    Bad("folder for a recipe", "train my.py", ("'my.py' is a folder",), {"my.py": FOLDER}),
    Bad("main without its argument", "train my.py", ("no function main(argv)",), {"my.py": "def main(): pass\n"}),
    Bad("recipe without main", "train nomain.py", ("'nomain.py' has no function main",), {"nomain.py": "a = 1\n"}),
]

MODELS = [
    Bad(
        "no model folder",
        with_model("./brt"),
        ("--model './brt'", "no such folder", "Did you mean 'bert'"),
        {"bert/config.json": "{}"},
    ),
    Bad("folder with no model", with_model("nothing"), ("'nothing'", "config.json"), {"nothing/a.txt": "a"}),
    Bad("config that is no JSON", with_model("broken"), ("'broken'", "config"), {"broken/config.json": "{"}),
    Bad("config of no model", with_model("other"), ("'other'", "model_type"), {"other/config.json": "{}"}),
    Bad("model without weights", with_model("{weightless}"), ("weightless", "cannot be loaded", "model.safetensors")),
    Bad("torn weights", with_model("{torn}"), ("torn", "cannot be loaded")),
    Bad("weights that do not match", with_model("{renamed}"), ("renamed", "tensors of the backbone", "first missing")),
    Bad(
        "timm weights that do not match",
        with_model("{renamed_timm}", "image", "images"),
        ("renamed_timm", "tensors of the backbone"),
    ),
    Bad("image model, text task", with_model("{vit}"), ("vit", "not a model for texts")),
    Bad("timm model, text task", with_model("{timm}"), ("timm", "not a model for texts")),
    Bad("text model, image task", with_model("{bert}", "image", "images"), ("bert", "not a model for images")),
    Bad("unknown builtin model", with_model("builtin:minlm"), ("no built-in model 'minlm'", "'minilm'")),
    Bad("unknown architecture", with_model("random:bret"), ("random:bret", "Did you mean 'bert'")),
    Bad("architecture of images", with_model("random:resnet18"), ("random:resnet18 is a model of images",)),
    Bad("architecture that does not run", with_model("random:t5"), ("random:t5", "random:bert")),
    Bad("architecture that is not made small", with_model("random:xlnet"), ("random:xlnet", "random:bert")),
    Bad(
        "kept head of no model", with_model("random:bert") + " --keep_head", ("--keep_head", "needs a pretrained model")
    ),
    Bad("image architecture", with_model("random:vit"), ("random:vit", "not a model for texts")),
    Bad("offline with a Hub id", with_model("google/bert"), ("'google/bert'", "the Hub", "connection"), patch=offline),
    Bad("offline with a folder's name", with_model("brt"), ("'brt'", "Did you mean 'bert'"), {"bert": FOLDER}, offline),
    Bad("offline data", on_text("user/data"), ("'user/data'", "(offline)"), patch=offline),
    Bad("kept head, other classes", with_model("{run}", "text", "colours") + " --keep_head", ("--keep_head", "blue")),
]

DATA = [
    Bad("no data folder", on_text("./tabel.csv"), ("'./tabel.csv'", "Did you mean 'table.csv'"), {"table.csv": "a"}),
    Bad("unknown builtin data", on_images("builtin:digit"), ("no built-in data set 'digit'", "'digits'")),
    Bad("empty folder", on_images("data"), ("data is empty", "class folders"), {"data": FOLDER}),
    Bad("empty folder for texts", on_text("data"), ("data is empty", "tables"), {"data": FOLDER}),
    Bad(
        "empty class folders", on_images("data"), ("no images in class folders",), {"data/a": FOLDER, "data/b": FOLDER}
    ),
    Bad("folder with a file of no use", on_text("data"), ("data holds no table",), {"data/a.bin": "a"}),
    Bad("one class only", on_images("one"), ("one has", "one class only, 'cat'"), classes("one", cat=4)),
    Bad("images without classes", on_images("flat"), ("no class folders",), {"flat/0.png": png(0)}),
    Bad("texts for images", on_images("{table}"), ("holds texts, not images", "text-classification")),
    Bad("images for texts", on_text("{images}"), ("holds images, not texts", "image-classification")),
    Bad(
        "missing column",
        on_text("t.csv --label_column sentment"),
        ("--label_column 'sentment'", "t.csv", "Did you mean 'sentiment'"),
        {"t.csv": table(header="text,sentiment")},
    ),
    Bad(
        "one column for two roles",
        f"{TEXT} --text_column label --label_column label",
        ("'label' is named twice", "--text_column", "--label_column"),
    ),
    Bad("no column to guess", on_text("t.csv"), ("t.csv", "--text_column NAME"), {"t.csv": "k,l,m\n1,2,3\n"}),
    Bad(
        "missing column in validation",
        on_text("data"),
        ("validation.csv has no column 'label'",),
        {"data/train.csv": table(), "data/validation.csv": table(header="text,labl")},
    ),
    Bad(
        "missing image file",
        on_images("pets/train.csv"),
        ("1 of 3 images", "no such file", "gone.png", "--skip_bad_files"),
        {"pets/train.csv": "image,label\na.png,x\nb.png,y\ngone.png,x\n", "pets/a.png": png(1), "pets/b.png": png(2)},
    ),
    Bad(
        "image that is not one",
        on_images("data"),
        ("1 of 9 images", "cat/fake.png", "not an image", "--skip_bad_files"),
        classes("data", cat=4, dog=4) | {"data/cat/fake.png": "no pixels here"},
    ),
    Bad(
        "torn image",
        on_images("data"),
        ("1 of 9 images", "cat/torn.png"),
        classes("data", cat=4, dog=4) | {"data/cat/torn.png": png(1)[:45]},
    ),
    Bad(
        "unseen label in validation",
        on_text("data"),
        ("validation.csv", "'badd' does not occur in train", "row", "10", "Did you mean 'bad'"),
        {"data/train.csv": table(), "data/validation.csv": table("a show,badd")},
    ),
    Bad(
        "unseen class folder in test",
        on_images("data"),
        ("'cow' does not occur in train", "test/cow/0.png"),
        classes("data/train", cat=3, dog=3) | classes("data/test", cat=1, cow=1),
    ),
    Bad("missing label", on_text("t.csv"), ("t.csv: 1 of 11 rows", "no label", "10"), {"t.csv": table("a show,")}),
    Bad(
        "label that is not a number",
        on_text("t.jsonl"),
        ("t.jsonl: 1 of 3 rows", "no label", "2"),
        {"t.jsonl": '{"text": "a", "label": 0}\n{"text": "b", "label": 1}\n{"text": "c", "label": NaN}\n'},
    ),
    Bad("quantities for labels", on_text("t.csv"), ("a quantity",), {"t.csv": "text,label\na,0.5\nb,1.7\n"}),
    Bad(
        "wrong encoding", on_text("t.csv"), ("t.csv is not UTF-8", "iconv"), {"t.csv": table("é,bad").encode("latin1")}
    ),
    Bad("empty CSV", on_text("t.csv"), ("t.csv is empty",), {"t.csv": ""}),
    Bad("header alone", on_text("t.csv"), ("t.csv has no rows",), {"t.csv": "text,label\n"}),
    Bad("row too long", on_text("t.csv"), ("line 12 has 3 fields", "quotes"), {"t.csv": table("a, b,bad")}),
    Bad("no JSON", on_text("t.jsonl"), ("t.jsonl: line 1 is not valid JSON",), {"t.jsonl": "text\n"}),
    Bad("no Parquet", on_text("t.parquet"), ("t.parquet cannot be read as Parquet",), {"t.parquet": "text\n"}),
    Bad("rows of one class each", on_text("t.csv"), ("no class has two rows",), {"t.csv": "text,label\na,x\nb,y\n"}),
    Bad(
        "file name that is not UTF-8",
        on_images("data"),
        ("b\\udcff.png", "not UTF-8", "rename"),
        classes("data", cat=4, dog=4) | {"data/cat/b\udcff.png": png(9)},
    ),
    Bad(
        "half a character",
        on_text("t.jsonl"),
        ("t.jsonl: line 2", "half a character"),
        {"t.jsonl": '{"text": "a", "label": 0}\n{"text": "b\\ud800", "label": 1}\n'},
    ),
    Bad(
        "number with 5,000 digits",
        on_text("t.jsonl"),
        ("t.jsonl: line 1", "digits"),
        {"t.jsonl": f'{{"text": "a", "label": {"1" * 5000}}}\n'},
    ),
    Bad(
        "file name with a line break",
        on_images("data"),
        ("1 of 9 images", "cat/a\\nb.png"),
        classes("data", cat=4, dog=4) | {"data/cat/a\nb.png": "no pixels"},
    ),
    Bad("unknown split", f"{TEXT} --test_split tst", ("--test_split 'tst'", "no such split", "train")),
]

FOLDERS = [
    Bad(
        "folder of another run",
        "train text-classification --model {bert} --dataset {table} --output_dir {run}",
        ("holds a run", "--overwrite", "another folder"),
    ),
    Bad("folder of other things", TEXT, ("'out' is not empty and holds no run",), {"out/photo.txt": "a"}),
    Bad("folder that is a file", TEXT, ("'out' is a file",), {"out": "a"}),
    Bad("folder below a file", f"{TEXT}/deeper", ("out",), {"out": "a"}),
    Bad("folder of an interrupted run", "{stopped} --output_dir {interrupted}", ("--resume goes on", "--overwrite")),
    Bad("nothing to resume", f"{TEXT} --resume", ("Nothing to resume", "Leave out --resume")),
    Bad(
        "finished, not to resume",
        f"{TEXT[:-3]}{{run}} --resume",
        ("Nothing to resume", "holds a finished run", "--overwrite"),
    ),
    Bad(
        "resumed with other settings",
        "{stopped} --output_dir {interrupted} --resume --learning_rate 0.5 --seed 7",
        ("learning_rate was", "is 0.5", "seed was 42, is 7", "--overwrite"),
    ),
    Bad(
        "folder with the data in it",
        "train text-classification --model {bert} --dataset out/t.csv --output_dir out --overwrite",
        ("--overwrite would remove 'out' with --dataset in it",),
        {"out/t.csv": table(), "out/recipe.yaml": "task: text-classification\n"},
    ),
    Bad("no space", TEXT, ("No space for the run in 'out'", "are free", "--output_dir"), patch=full_disk),
    Bad("fp16 without a GPU", f"{TEXT} --fp16", ("--fp16 needs a GPU",), patch=no_gpu),
    Bad(
        "precision fp16 without a GPU",
        f"{TEXT} --precision fp16",
        ("--precision fp16", "--precision bf16"),
        patch=no_gpu,
    ),
    Bad("two precisions", f"{TEXT} --precision fp32 --bf16", ("--precision fp32 and --bf16 contradict",)),
    Bad("both half precisions", f"{TEXT} --fp16 --bf16", ("--bf16 and --fp16 exclude each other",)),
    Bad("no such precision", f"{TEXT} --precision bf61", ("--precision", "'bf61'", "bf16")),
    Bad("precision of an old GPU", f"{TEXT} --precision bf16", ("not supported by this GPU", "fp16"), patch=old_gpu),
    Bad("tf32 without a GPU", f"{TEXT} --tf32 true", ("--tf32 needs an NVIDIA GPU",), patch=no_gpu),
    Bad("bf16 on an old GPU", f"{TEXT} --bf16", ("--bf16 is not supported", "--fp16"), patch=old_gpu),
    Bad("fp16 of the launcher", TEXT, ("fp16", "needs a GPU"), patch=half_precision_launched),
    Bad("processes started apart", TEXT, ("2 processes", "accelerate launch"), patch=started_apart),
    Bad("processes that are not seen", TEXT, ("2 processes", "do not see each other"), patch=unseen_by_accelerate),
    Bad("file that is no metric", f"{TEXT} --metrics ./mine.py", ("./mine.py",), {"mine.py": "x = 1\n"}),
    Bad(
        "metric that fails",
        f"{TEXT} --metrics ./mine",
        ("Metric 'mine' cannot score such answers: no idea",),
        {"mine/mine.py": METRIC},
    ),
    Bad("unknown metric", f"{TEXT} --metrics ./no_metric", ("Metric './no_metric'", "accuracy", "evaluate.load")),
    Bad(
        "unknown best metric",
        f"{TEXT} --metric_for_best_model f1_makro",
        ("--metric_for_best_model 'f1_makro'", "Did you mean 'f1_macro'"),
    ),
]

RUNS = [
    Bad("predict with no run", "predict nowhere a.png", ("'nowhere' is no finished run", "does not exist")),
    Bad("predict with another folder", "predict {bert} a.csv", ("bert", "no finished run", "metrics.json")),
    Bad("evaluate with no run", "evaluate nowhere --dataset {table}", ("'nowhere' is no finished run",)),
    Bad("push of no run", "push nowhere me/model", ("'nowhere' is no finished run",)),
    Bad("push with the Hub out of reach", "push {run} me/model", ("'me/model'", "hftl push"), patch=offline),
    Bad("predict without an input", "predict {run}", ("input", "hftl --help")),
    Bad("unknown flag of predict", "predict {run} a --outptu b", ("--outptu",)),
    Bad(
        "predict on a missing table",
        "predict {run} gone.csv",
        ("'gone.csv'", "Did you mean 'gene.csv'"),
        {"gene.csv": ""},
    ),
    Bad("predict on a missing image", "predict {image_run} gone.png", ("no such file", "'gone.png'")),
    Bad("predict on no image", "predict {image_run} fake.png", ("fake.png", "not an image"), {"fake.png": "a"}),
    Bad("predict on a folder of nothing", "predict {image_run} data", ("data holds no images",), {"data/a.txt": "a"}),
    Bad("other format", "predict {run} fine --output a.jsonl", ("--output 'a.jsonl'", "as CSV", ".csv")),
    Bad("predict on a missing folder", "predict {run} gone/", ("gone",)),
    Bad("predict on a missing path", "predict {run} ./gone", ("gone",)),
    Bad("no folder for the output", "predict {run} fine --output no/out.csv", ("--output", "there is no folder 'no'")),
    Bad(
        "output that is the input", "predict {run} t.csv --output ./t.csv", ("is the input itself",), {"t.csv": table()}
    ),
    Bad("output that is a folder", "predict {run} fine --output data", ("--output", "'data'"), {"data/a.txt": "a"}),
    Bad("batch of none in predict", "predict {run} fine --batch_size 0", ("--batch_size", "above 0")),
    Bad(
        "evaluate with unseen labels",
        "evaluate {run} --dataset t.csv",
        ("t.csv", "'odd' does not occur in train", "10"),
        {"t.csv": table("a show,odd")},
    ),
    Bad("evaluate on no such split", "evaluate {run} --dataset {table} --split tst", ("--split 'tst'", "train")),
    Bad("column of another task", "evaluate {run} --dataset {table} --image_column a", ("--image_column", "text")),
    Bad("copy onto a file", "cp image_classification my.py", ("'my.py' exists already",), {"my.py": ""}),
    Bad("copy of nothing", "cp image_clasification my.py", ("'image_clasification'", "'image_classification'")),
    Bad("copy of no config", "cp configs/no.yaml my.yaml", ("'configs/no.yaml'", "hftl ls")),
    Bad("copy into no folder", "cp image_classification no/my.py", ("there is no folder 'no'",)),
]

RANK = "rank --task text-classification --models {bert} --dataset"
CHOOSING = [
    Bad(
        "rank of what is not there",
        "rank --models {bert} --dataset some/data",
        ("'some/data'", "there is no such file"),
    ),
    Bad(
        "rank of words", "rank --models {bert} --dataset words", ("--task", "do not tell it"), {"words/a.txt": "a film"}
    ),
    Bad("rank of an endless name", f"rank --models {{bert}} --dataset {'a' * 5000}", ("--task is missing",)),
    Bad("rank without task and data", "rank --models {bert}", ("--dataset is missing",), classes("pictures", a=2, b=2)),
    Bad("rank of no such data", "rank --models {bert} --dataset builtin:digit", ("'digit'", "Did you mean 'digits'")),
    Bad("rank by settings", "rank --models {bert} --config s.yaml", ("--dataset is missing",), {"s.yaml": "seed: 1"}),
    Bad(
        "rank by settings that are none",
        "rank --models {bert} --config s.yaml",
        ("Unknown task", "3"),
        {"s.yaml": "task: [3]\ndataset: 3"},
    ),
    Bad("rank by a number", "rank --models {bert} --config s.yaml", ("'3'", "no such file"), {"s.yaml": "dataset: 3"}),
    Bad(
        "rank into the data of its settings",
        "rank --models {bert} --config s.yaml --output t.csv",
        ("is a part of the data",),
        {"s.yaml": "task: text-classification\ndataset: t.csv", "t.csv": table()},
    ),
    Bad("rank without models", "rank --task text-classification --dataset {table}", ("--models",)),
    Bad("rank without data", RANK[:-10], ("--dataset is missing",)),
    Bad("rank of an unknown task", "rank --task text --models a --dataset b", ("'text'", "text-classification")),
    Bad("rank of a model that is not there", f"{RANK} {{table}} --models ./brt", ("'./brt'", "no such folder")),
    Bad("rank by no measure", f"{RANK} {{table}} --by accuracy", ("--by", "'accuracy'", "logme")),
    Bad("rank by a head that is not there", f"{RANK} {{table}} --by leep", ("--by leep", "no trained head")),
    Bad("rank with one class", f"{RANK} t.csv", ("t.csv", "one class"), {"t.csv": "text,label\na,x\nb,x\nc,x\n"}),
    Bad("rank into its data", f"{RANK} t.csv --output t.csv", ("is a part of the data",), {"t.csv": table()}),
    Bad("rank into a sheet", f"{RANK} {{table}} --output t.xlsx", ("ends in .csv",)),
    Bad("rank of one row a class", f"{RANK} {{table}} --shots 1", ("No class has two training rows",)),
    Bad("compare into a run", "compare {run} {run} --output {run}/report.html", ("is a file of a run",)),
    Bad("compare into scores", "compare {run} {run} --output {run}/metrics.json", ("ends in .html",)),
    Bad("lr-find into a sheet", f"lr-find{TEXT[5:-17]} --output t.csv", ("ends in .png",)),
    Bad(
        "lr-find into its data",
        "lr-find image-classification --model {vit} --dataset pets --output pets/a/0.png",
        ("is a part of the data",),
        classes("pets", a=3, b=3),
    ),
    Bad("rank into no folder", f"{RANK} {{table}} --output no/t.csv", ("--output", "there is no folder 'no'")),
    Bad("advise without a task", "advise --model {bert}", ("Name the task: hftl advise TASK", "text-classification")),
    Bad("advise for no such task", "advise text --model {bert}", ("'text'", "text-classification")),
    Bad("advise with a method", f"advise{TEXT[5:]} --method full", ("--method", "Leave it out")),
    Bad("advise without data", "advise text-classification --model {bert}", ("--dataset is missing",)),
    Bad("lr-find without a task", "lr-find --model {bert}", ("Name the task: hftl lr-find TASK",)),
    Bad("lr-find of auto", f"lr-find{TEXT[5:-17]} --method auto", ("--method auto chooses its rates itself",)),
    Bad("lr-find into no folder", f"lr-find{TEXT[5:-17]} --output no/a.png", ("--output", "there is no folder 'no'")),
    Bad("lr-find into a run", f"lr-find{TEXT[5:]} --output_dir run", ("--output_dir", "Name that with --output")),
    Bad("lr-find in no steps", f"lr-find{TEXT[5:-17]} --steps 0", ("--steps", "above 0")),
    Bad("lr-find in few steps", f"lr-find{TEXT[5:-17]} --steps 5", ("--steps 5 are too few", "10 or more")),
    Bad("auto rate of method auto", f"{TEXT} --method auto --learning_rate auto", ("leave out --learning_rate",)),
    Bad("auto rate with --repeats", f"{TEXT} --repeats 2 --learning_rate auto", ("--repeats", "hftl lr-find")),
    Bad("a word for a rate", f"{TEXT} --learning_rate fast", ("--learning_rate", "'fast'")),
    Bad("rank with an unknown flag", f"{RANK} {{table}} --max_train_sample 5", ("Did you mean 'max_train_samples'",)),
]

TUNE = f"tune{TEXT[5:]} --trials 2 --search"
CHOOSING += [
    Bad("tune without a task", "tune --trials 2 --search a=1,2", ("Name the task: hftl tune TASK",)),
    Bad("tune without trials", f"tune{TEXT[5:]} --search seed=1,2", ("--trials",)),
    Bad("tune without a search", f"tune{TEXT[5:]} --trials 2", ("--search",)),
    Bad("tune of no trials", f"tune{TEXT[5:]} --trials 0 --search a=1", ("--trials", "above 0")),
    Bad("tune of no such flag", f"{TUNE} learning_rat=1e-4,1e-3", ("learning_rat", "Did you mean 'learning_rate'")),
    Bad("tune of no range", f"{TUNE} 'learning_rate=lg(1e-5,1e-3)'", ("log(a,b)", "Did you mean 'log'")),
    Bad("tune backwards", f"{TUNE} 'learning_rate=log(1e-3,1e-5)'", ("the first end must be below",)),
    Bad("tune from zero", f"{TUNE} 'learning_rate=log(0,1e-5)'", ("above 0",)),
    Bad("tune between words", f"{TUNE} 'learning_rate=log(low,high)'", ("learning_rate=log(low,high)", "'low'")),
    Bad("tune of an empty list", f"{TUNE} learning_rate=,", ("learning_rate=,", "the list is empty")),
    Bad("tune of nothing", f"{TUNE} learning_rate", ("cannot be read", "learning_rate=log")),
    Bad("tune of an open quote", f'{TUNE} "template=it\'s,b"', ("cannot be read", "single quotes")),
    Bad("tune of no method", f"{TUNE} method=default,lora", ("method=default,lora", "cannot be left out")),
    Bad(
        "tune of a bad weight", f"{TUNE} penalty=l2_sp penalty_weight=-1,0.1 --method full", ("--penalty_weight", "-1")
    ),
    Bad("tune of one end", f"{TUNE} 'learning_rate=log(1e-5)'", ("a range is log(a,b), uniform(a,b) or int(a,b).\n",)),
    Bad(
        "tune of a template without a text",
        f"{TUNE} 'average=none,ema ema_decay=0.9,0.99 template=film,{{{{text}}}}'",
        ("--template", "{text}"),
    ),
    Bad("tune twice", f"{TUNE} learning_rate=1e-4,1e-3 learning_rate=1e-5", ("more than once",)),
    Bad("tune of the data", f"{TUNE} seed=1,2", ("seed must be the same in all trials",)),
    Bad("tune of a bad value", f"{TUNE} learning_rate=1e-4,-1", ("--learning_rate must be above 0",)),
    Bad("tune of a bad choice", f"{TUNE} class_weights=none,balancd", ("'balancd'", "balanced")),
    Bad("tune of no such method", f"{TUNE} method=full,lorra", ("'lorra'", "Did you mean 'lora'")),
    Bad("tune of auto", f"{TUNE} method=full,auto", ("--method auto",)),
    Bad("tune of what no method uses", f"{TUNE} 'lora_r=int(2,8)'", ("--method lp_ft does not use lora_r",)),
    Bad("tune of what is given", f"{TUNE} learning_rate=1e-4,1e-3 --learning_rate 1e-4", ("given and searched",)),
    Bad("tune with --repeats", f"{TUNE} learning_rate=1e-4,1e-3 --repeats 2", ("leave out --repeats",)),
    Bad("tune with --resume", f"{TUNE} learning_rate=1e-4,1e-3 --resume", ("leave out --resume",)),
    Bad("tune without its model", f"{TUNE} learning_rate=1e-4,1e-3 --model ./brt", ("'./brt'", "no such folder")),
    Bad("tune over a run", f"{TUNE} learning_rate=1e-4,1e-3 --output_dir {{run}}", ("holds no search",)),
]

NESTED = f"a: {'[' * 5000}"


def home_that_is_a_file(patch: pytest.MonkeyPatch) -> None:
    patch.setenv("HFTL_HOME", str(Path("home").resolve()))


VALUES = [
    Bad("endless epochs", f"{TEXT} --num_train_epochs inf", ("--num_train_epochs must be a finite number, not inf",)),
    Bad("warm-up that is no number", f"{TEXT} --warmup_steps nan", ("--warmup_steps must be a finite number",)),
    Bad("endless warm-up", f"{TEXT} --warmup_steps inf", ("--warmup_steps must be a finite number",)),
    Bad("endless log interval", f"{TEXT} --logging_steps inf", ("--logging_steps must be a finite number",)),
    Bad("accumulation of none", f"{TEXT} --eval_accumulation_steps 0", ("--eval_accumulation_steps", "above 0")),
    Bad("empty metric", f"{TEXT} --metrics ''", ("--metrics is empty",)),
    Bad(
        "unknown setting of the schedule",
        f"{TEXT} --lr_scheduler_kwargs '{{{{\"a\": 1}}}}'",
        ("--lr_scheduler_kwargs", "'a'"),
    ),
    Bad(
        "settings of the schedule in a list",
        f"{TEXT} --lr_scheduler_kwargs '[1]'",
        ("--lr_scheduler_kwargs must be settings by name",),
    ),
    Bad(
        "statistics of a single row",
        "train image-classification --model {timm} --dataset {images} --output_dir out --batch_norm train "
        "--image_size 32 --per_device_train_batch_size 5",
        ("--batch_norm train", "a single row", "--dataloader_drop_last"),
    ),
    Bad("no such accelerator file", f"{TEXT} --accelerator_config nope.json", ("nope.json",)),
    Bad("adapter of no rank", with_settings("vera", '"r": 0'), ("--peft_config: 'r' must be a whole number",)),
    Bad("ranks the wrong way", with_settings("adalora", '"init_r": 8'), ("'init_r' of AdaLoRA (8)", "'target_r' (8)")),
    Bad("rank in words", with_settings("adalora", '"init_r": "8"'), ("'init_r' must be a whole number", "'8'")),
    Bad("adapter setting of null", with_settings("lora", '"r": null'), ("--peft_config", "r")),
    Bad(
        "noise on the embeddings of images",
        f"{IMAGE} --neftune_noise_alpha 5",
        ("--neftune_noise_alpha", "embeddings of tokens"),
    ),
    Bad("kernels that are not installed", f"{TEXT} --use_liger_kernel", ("liger", "not installed")),
    Bad(
        "views of what all trains",
        f"{IMAGE} --method full --feature_views 4",
        ("--method full", "--feature_views", "frozen"),
    ),
    Bad(
        "kept features of what all trains",
        f"{TEXT} --method full --feature_cache_dtype float32",
        ("--method full", "--feature_cache_dtype", "partial"),
    ),
    Bad(
        "one split for two roles",
        f"{TEXT} --train_split train --test_split train",
        ("--train_split and --test_split", "'train'"),
    ),
    Bad("model with an endless name", with_model("m" * 300), ("--model 'mmm",)),
    Bad("data with an endless name", on_text("d" * 300), ("no local file or folder",)),
    Bad("folder that is a broken link", TEXT, ("'out' is a link to what is not there",), {"out": BROKEN_LINK}),
    Bad("folder with an endless name", f"{TEXT}{'o' * 300}", ("--output_dir", "name another folder")),
    Bad(
        "cache that is a file",
        with_model("builtin:efficientnet_lite0", "image", "images"),
        ("builtin:efficientnet_lite0 cannot be written to", "HFTL_HOME"),
        {"home": "a"},
        home_that_is_a_file,
    ),
    Bad("copy to where nothing can be", f"cp image_classification {'o' * 300}.py", ("cannot be written", "too long")),
    Bad("home of nobody", on_text("~nobody_at_all/t.csv"), ("no such file or folder: '~nobody_at_all/t.csv'",)),
    Bad("model in the home of nobody", with_model("~nobody_at_all/bert"), ("'~nobody_at_all/bert'",)),
    Bad(
        "keys of YAML that are lists",
        f"{TEXT} --config c.yaml",
        ("c.yaml", "cannot be read"),
        {"c.yaml": "? [a]\n: 1\n"},
    ),
    Bad(
        "YAML in itself",
        f"{TEXT} --method lora --config c.yaml",
        ("lora_target_modules",),
        {"c.yaml": "lora_target_modules: &a [*a]\n"},
    ),
    Bad("YAML without an end", f"{TEXT} --config c.yaml", ("c.yaml", "nested too deeply"), {"c.yaml": NESTED}),
    Bad(
        "no day of the calendar",
        f"{TEXT} --config c.yaml",
        ("c.yaml", "cannot be read"),
        {"c.yaml": "loss: 2020-13-45\n"},
    ),
    Bad("YAML date for a number", f"{TEXT} --config c.yaml", ("seed", "2020-01-01"), {"c.yaml": "seed: 2020-01-01\n"}),
]

TABLE = [*FLAGS, *METHODS, *MODELS, *DATA, *FOLDERS, *RUNS, *CHOOSING, *VALUES]


# ---- what the commands name -----------------------------------------------------------------------------------------

# A loss that is not a number from the seventh step on: with four steps an epoch, one checkpoint is there by then.
STOPS = """import torch
import hftl


class Loss:
    calls = 0

    def __call__(self, outputs, labels, num_items_in_batch=None):
        self.calls += outputs["logits"].requires_grad
        loss = torch.nn.functional.cross_entropy(outputs["logits"], labels)
        return loss * float("nan") if self.calls > 6 else loss


def stops(model, arguments):
    names = frozenset(name for name, _ in model.named_parameters())
    return hftl.Plan(model, (hftl.Stage("all", names, 1e-3, 1e-3, 3, loss=Loss()),))
"""


def copied(source: Path, target: Path) -> Path:
    shutil.copytree(source, target)
    return target


def rename_tensors(folder: Path) -> Path:
    weights = load_file(folder / "model.safetensors")
    save_file(
        {f"other.{name}": value for name, value in weights.items()}, folder / "model.safetensors", {"format": "pt"}
    )
    return folder


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Tiny models, data and runs that no command may change."""
    folder = tmp_path_factory.mktemp("world")
    (folder / "table.csv").write_text("\n".join([*table().split("\n")[:-1], *table().split("\n")[1:]]))
    (folder / "colours.csv").write_text("text,label\n" + "a sky,blue\na rose,red\n" * 4)
    (folder / "stops.py").write_text(STOPS)
    for path, content in classes("images", cat=4, dog=4).items():
        write(folder / path, content)
    names = {name: folder / f"{name}.csv" for name in ("table", "colours")} | {"images": folder / "images"}
    names["bert"] = write_tiny_text_model(folder / "bert")
    names["gpt2"] = write_tiny_text_model(folder / "gpt2", kind="gpt2")
    names["vit"] = write_tiny_image_model(folder / "vit")
    names["timm"] = write_timm_folder(folder / "timm", "resnet18", channels=[8, 8, 8, 8], stem_width=8)
    names["renamed"] = rename_tensors(copied(names["bert"], folder / "renamed"))
    names["renamed_timm"] = rename_tensors(copied(names["timm"], folder / "renamed_timm"))
    names["gpt2"] = write_tiny_text_model(folder / "gpt2", kind="gpt2")
    names["weightless"] = copied(names["bert"], folder / "weightless")
    (names["weightless"] / "model.safetensors").unlink()
    names["torn"] = copied(names["bert"], folder / "torn")
    content = (names["torn"] / "model.safetensors").read_bytes()
    (names["torn"] / "model.safetensors").write_bytes(content[: len(content) // 2])

    quick = "--num_train_epochs 1 --report_to none"
    train = f"train text-classification --model {names['bert']} --dataset {names['table']}"
    names["run"], names["image_run"] = folder / "run", folder / "image_run"
    cli.main(shlex.split(f"{train} --output_dir {names['run']} {quick}"))
    images = f"train image-classification --model {names['vit']} --dataset {names['images']} --method frozen"
    cli.main(shlex.split(f"{images} --output_dir {names['image_run']} {quick} --dataloader_num_workers 0"))

    names["interrupted"] = folder / "interrupted"
    stopped = f"{train} --method {folder / 'stops.py'}:stops --per_device_train_batch_size 5 --report_to none"
    return SimpleNamespace(folder=folder, names=names | {"stopped": stopped})


def write(path: Path, content: str | bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if content is FOLDER:
        path.mkdir()
    elif content is BROKEN_LINK:
        path.symlink_to("nowhere")
    else:
        path.write_bytes(content.encode() if isinstance(content, str) else content)


def everything_in(*folders: Path) -> dict[str, tuple[int, int]]:
    """Every path with its size and time of change; what Python compiles is no trace of the command."""
    paths = [path for folder in folders for path in folder.rglob("*") if "__pycache__" not in path.parts]
    return {str(path): (path.lstat().st_size, path.lstat().st_mtime_ns) for path in paths}


def arguments_of(command: str, world: SimpleNamespace) -> list[str]:
    return shlex.split(command.format(**world.names))


def exit_code(argv: list[str]) -> object:
    with pytest.raises(SystemExit) as caught:
        cli.main(argv)
    return caught.value.code


def check_message(text: str, words: tuple[str, ...]) -> None:
    lines = text.splitlines()
    assert len(lines) == 1, text
    assert lines[0].startswith("error: ")
    assert "Traceback" not in text
    assert [word for word in words if word not in text] == [], text
    assert len(text) < 900, text


@pytest.fixture(scope="module")
def interrupted(world):
    """The error of a run that a loss of NaN stopped in its second epoch; its folder is `interrupted` of the world."""
    argv = [*shlex.split(world.names["stopped"]), "--output_dir", str(world.names["interrupted"])]
    stderr = io.StringIO()
    with contextlib.redirect_stderr(stderr):
        assert exit_code(argv) == 2
    return stderr.getvalue()


@pytest.mark.parametrize("bad", TABLE, ids=lambda bad: bad.name)
def test_one_line_and_nothing_left(bad, world, interrupted, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for path, content in bad.files.items():
        write(tmp_path / path, content)
    argv = arguments_of(bad.command, world)
    before = everything_in(tmp_path, world.folder)
    capsys.readouterr()
    with monkeypatch.context() as patch:
        if bad.patch is not None:
            bad.patch(patch)
        assert exit_code(argv) == 2
    output = capsys.readouterr()
    check_message(output.err, bad.words)
    assert "Traceback" not in output.out
    assert everything_in(tmp_path, world.folder) == before


def test_names_are_unique():
    names = [bad.name for bad in TABLE]
    assert sorted(set(names)) == sorted(names)


def test_a_device_is_not_replaced_by_a_table(world, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    os.mkfifo("pipe")
    assert exit_code(arguments_of("predict {run} fine --output pipe", world)) == 2
    check_message(capsys.readouterr().err, ("--output 'pipe' is no ordinary file",))
    assert Path("pipe").is_fifo()


def test_an_error_of_ones_own_loss_brings_a_replaced_run_back(world, tmp_path):
    run = copied(world.names["run"], tmp_path / "run")
    before = {path.relative_to(run): path.read_bytes() for path in run.rglob("*") if path.is_file()}
    (tmp_path / "own.py").write_text("def loss(outputs, labels, num_items_in_batch=None):\n    raise KeyError('x')\n")
    flags = f"--output_dir {run} --overwrite --report_to none --loss {tmp_path / 'own.py'}:loss"
    with pytest.raises(KeyError):
        cli.main(arguments_of(f"train text-classification --model {{bert}} --dataset {{table}} {flags}", world))
    assert {path.relative_to(run): path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


def test_a_mean_of_one_epoch_is_refused_before_the_head_is_fitted(world, tmp_path, capsys):
    command = "train text-classification --model {bert} --dataset {table} --average swa --num_train_epochs 1"
    assert exit_code(arguments_of(f"{command} --report_to none --output_dir {tmp_path / 'run'}", world)) == 2
    said = capsys.readouterr()
    check_message(said.err, ("--average swa", "--num_train_epochs 2"))
    assert "head: " not in said.out


@pytest.mark.parametrize("flag", ["penalty", "loss"])
def test_ones_own_loss_and_penalty_read_the_models_output_and_give_a_scalar(flag, world, tmp_path, capsys):
    body = f"def {flag}(*given, num_items_in_batch=None):\n    return given[{-1 if flag == 'penalty' else 0}].logits"
    Path(tmp_path, "vector.py").write_text(f"{body}\n")
    Path(tmp_path, "mean.py").write_text(f"{body}.square().mean()\n")
    command = "train text-classification --model {bert} --dataset {table} --method full --max_steps 1 --report_to none"
    command += f" --output_dir {tmp_path / 'run'} --{flag} {tmp_path}/"
    assert exit_code(arguments_of(f"{command}vector.py:{flag}", world)) == 2
    check_message(capsys.readouterr().err, (f"--{flag}", "scalar tensor", "shape ("))
    assert not (tmp_path / "run" / "metrics.json").exists()
    cli.main(arguments_of(f"{command}mean.py:{flag} --overwrite", world))


@pytest.mark.parametrize("flags", ["--penalty r_drop", "--learning_rate 1e30 --max_grad_norm 0 --warmup_steps 0"])
def test_a_run_comes_back_when_the_one_in_its_place_fails_at_once(flags, world, tmp_path, capsys):
    """Only a trainer sees that the model has no dropout, and only a step that the rate is too high."""
    run = copied(world.names["run"], tmp_path / "run")
    before = {path.relative_to(run): path.read_bytes() for path in run.rglob("*") if path.is_file()}
    command = "train image-classification --model {timm} --dataset {images} --overwrite --dataloader_num_workers 0"
    assert exit_code(arguments_of(f"{command} --output_dir {run} --report_to none {flags}", world)) == 2
    check_message(capsys.readouterr().err, ("--penalty r_drop",) if "penalty" in flags else ("--learning_rate",))
    assert {path.relative_to(run): path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


# ---- training that goes wrong ---------------------------------------------------------------------------------------


def test_loss_of_nan_keeps_the_last_good_checkpoint(world, interrupted):
    folder = world.names["interrupted"]
    checkpoint = folder / "checkpoints" / "1-all" / "checkpoint-4"
    check_message(interrupted, ("loss is nan at step 7 of stage 'all'", "lower --learning_rate", str(checkpoint)))
    assert [path.name for path in checkpoint.parent.iterdir()] == ["checkpoint-4"]
    weights = load_file(checkpoint / "model.safetensors")
    assert all(torch.isfinite(value).all() for value in weights.values())
    assert not (folder / "model.safetensors").exists()


@pytest.mark.parametrize(
    ("batch", "words"),
    [(2, ("loss is nan at step", "--learning_rate")), (100, ("outputs are no finite numbers", "--learning_rate"))],
)
def test_divergence_in_the_first_epoch_leaves_nothing(batch, words, world, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    far = f"--learning_rate 1e30 --warmup_steps 0 --num_train_epochs 1 --per_device_train_batch_size {batch}"
    assert exit_code(arguments_of(f"{TEXT} {far}", world)) == 2
    check_message(capsys.readouterr().err, words)
    assert list(tmp_path.iterdir()) == []


# ---- the real program -----------------------------------------------------------------------------------------------


def program(command: str, world: SimpleNamespace, folder: Path, **environment: str):
    """`python -m hftl` from nothing: what is set about the Hub is read when its client is imported."""
    settings = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **environment}
    argv = [sys.executable, "-m", "hftl", *arguments_of(command, world)]
    return subprocess.run(argv, cwd=folder, env=settings, capture_output=True, text=True, timeout=120)


REAL = [
    Bad("terminal without arrows", f"{TEXT} --lr_scheduler_kwargs '{{{{\"a\": 1}}}}'", ("--lr_scheduler_kwargs",)),
    Bad("unknown command", "trian", ("Unknown command 'trian'", "Did you mean 'train'")),
    Bad("unknown flag", f"{TEXT} --learning_rat 1e-4", ("Unknown flag --learning_rat", "'learning_rate'")),
    Bad("offline with a Hub id", with_model("google/bert"), ("'google/bert'", "the Hub cannot be reached")),
]


@pytest.mark.slow
@pytest.mark.parametrize("bad", REAL, ids=lambda bad: bad.name)
def test_the_program_itself(bad, world, tmp_path):
    done = program(bad.command, world, tmp_path, HF_HUB_OFFLINE="1", PYTHONIOENCODING="ascii")
    assert done.returncode == 2
    check_message(done.stderr, bad.words)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
@pytest.mark.parametrize("name", ["model", "dataset"])
def test_a_hub_that_refuses_is_asked_once(name, world, tmp_path):
    command = with_model("google/bert") if name == "model" else on_text("user/data")
    done = program(command, world, tmp_path, HF_HUB_OFFLINE="0", HF_ENDPOINT="http://127.0.0.1:9")
    assert done.returncode == 2
    check_message(
        done.stderr, ("'google/bert'", "the Hub cannot be reached") if name == "model" else ("'user/data'", "Hub")
    )
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
@pytest.mark.parametrize("most", [2_000, 30_000, 60_000], ids=["log", "model", "optimizer"])
def test_a_disk_that_fills_up_while_writing(most, world, tmp_path, monkeypatch, capsys):
    """TensorBoard's log, a checkpoint's model (43 kB) and its optimizer (90 kB) are each written by another library."""
    command = f"{TEXT} --num_train_epochs 2"
    done = run_command(arguments_of(command, world), tmp_path, most=most)
    assert done.returncode == 2
    check_message(done.stderr, ("Cannot write to 'out'", "Make room", "--resume"))
    monkeypatch.chdir(tmp_path)
    cli.main(arguments_of(f"{command} --resume", world))
    assert (tmp_path / "out" / "metrics.json").is_file()
    assert not (tmp_path / "out" / "checkpoints").exists()


def test_a_disk_that_is_full_from_the_start(world, tmp_path, monkeypatch, capsys):
    def full(self, *arguments, **settings):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.chdir(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_text", full)
        assert exit_code(arguments_of(TEXT, world)) == 2
        check_message(capsys.readouterr().err, ("Cannot write to 'out'", "the disk is full", "repeat the command."))
        assert list(tmp_path.iterdir()) == []
    done = run_command(arguments_of("predict {run} {table} --output o.csv", world), tmp_path, most=300)
    assert done.returncode == 2
    check_message(done.stderr, ("Cannot write to '.'", "a file may not grow so large", "repeat the command."))
    assert list(tmp_path.iterdir()) == []
