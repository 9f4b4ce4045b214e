"""Arguments: one dataclass over `TrainingArguments`; a YAML file, then the command line, into it."""

from __future__ import annotations

import argparse
import copy
import dataclasses
import functools
import importlib.util
import json
import math
import numbers
import os
import re
import string
import sys
import textwrap
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any, ClassVar, NoReturn, TypeVar

from transformers import HfArgumentParser, IntervalStrategy, SchedulerType, TrainingArguments
from transformers.trainer_utils import SaveStrategy

from hftl.errors import UsageError, did_you_mean, nearest_choice
from hftl.inert import visible
from hftl.yaml_files import read_yaml

#: schedules beside Trainer's, see `hftl.optim`
OWN_SCHEDULES = ("slanted_triangular", "one_cycle")
#: `--prompts none`
NO_PROMPTS = ["none"]
#: part of the steps in which the rate of one_cycle rises, as in torch's OneCycleLR
_ONE_CYCLE_RISE = 0.3


def _argument(default: Any, help: str, *aliases: str, choices: Sequence[str] | None = None) -> Any:
    """A dataclass field with what argparse needs to know of it."""
    metadata: dict[str, Any] = {"help": help.replace("%", "%%")}  # argparse would take it for a format
    if aliases:
        metadata["aliases"] = list(aliases)
    if choices:
        metadata["choices"] = list(choices)
    return field(default=default, metadata=metadata)


@dataclass
class TransferArguments(TrainingArguments):
    """What every task takes, beside every field of `transformers.TrainingArguments`.

    Fields that are None here are chosen later: by the method and the size of the model (rates, epochs), by the task
    (batch size) or by the data (the metric of the best checkpoint).
    """

    task: str = _argument("", "Name of the task; only checked, so that a configuration file can say what it is for.")

    # Model
    model_name_or_path: str | None = _argument(
        None,
        "Hub id, local folder, builtin:NAME, torchvision:NAME, torchhub:OWNER/REPO:ENTRY, pytorchvideo:NAME, "
        "keras:NAME, or random:ARCH for a model that is not pretrained.",
        "--model",
    )
    model_revision: str = _argument("main", "Branch, tag or commit of the model on the Hub.")
    trust_remote_code: bool = _argument(False, "Run Python code that comes with the model.")
    allow_pickle: bool = _argument(False, "Read weights that are pickled (pytorch_model.bin), as tensors alone.")
    weights: str | None = _argument(
        None, "File of another library's weights for the architecture of --model (random:ARCH), .safetensors or .pth."
    )
    keep_head: bool = _argument(False, "Keep the model's trained output layer; its classes must be the data's.")

    # Data
    dataset_name: str | None = _argument(
        None,
        "Hub id, folder of class folders, CSV, TSV, JSONL or Parquet (file or folder), or builtin:NAME.",
        "--dataset",
    )
    dataset_config_name: str | None = _argument(None, "Configuration of a Hub data set that has several.")
    train_split: str | None = _argument(None, "Name of the split to train on.")
    validation_split: str | None = _argument(None, "Name of the split that chooses the best checkpoint.")
    test_split: str | None = _argument(None, "Name of the split that is evaluated once, at the end.")
    # A tenth: enough to compare checkpoints on a few hundred rows, and nine tenths are left to learn from.
    validation_fraction: float = _argument(0.1, "Part of train used for validation when there is no such split.")
    label_column: str | None = _argument(None, "Column of the labels (guessed when not given).")
    problem_type: str = _argument(
        "single_label_classification",
        "What a label is: one class of several; of multi_label_classification a list of them, or none; of regression a "
        "number. The names are transformers' own.",
        choices=("single_label_classification", "multi_label_classification", "regression"),
    )
    label_separator: str | None = _argument(
        None, "multi_label_classification: what stands between the labels of a cell (default: | or ; or , if found)."
    )
    label_columns: list[str] | None = _argument(
        None, "multi_label_classification: columns of 0 and 1, one a label, instead of one column of lists."
    )
    max_train_samples: int | None = _argument(None, "Train on a seeded, stratified part of this many rows.")
    max_eval_samples: int | None = _argument(None, "Evaluate on a seeded, stratified part of this many rows.")
    shots: int | None = _argument(
        None, "Train on so many rows of each class, drawn by the seed, and validate on no more of each."
    )
    repeats: int = _argument(1, "Run so often, with the seeds from --seed on; scores get a mean and a 95 % interval.")
    skip_bad_files: bool = _argument(False, "Leave out files that cannot be read, instead of stopping.")
    follow_links: bool = _argument(False, "Read files outside of the data folder that links in it lead to.")

    # Method
    method: str = _argument(
        "",
        "How the model is adapted: a method's name, or module:function, or file.py:function (default: lp_ft for images "
        "or texts of one class each where a pretrained model gets a new head, unless --max_steps is given; else full).",
    )
    unfreeze_blocks: int | None = _argument(
        None,
        "partial: how many of the last blocks train (default 2). gradual: how many more in each step at most, 1 for "
        "block by block (default about a quarter of them).",
    )
    layer_decay: float | None = _argument(
        None, "Of methods that train several blocks: each learns at this times the rate of the next."
    )
    head_learning_rate: float | None = _argument(None, "Learning rate of the new output layer.")
    head_epochs: float | None = _argument(
        None, "lp_ft, gradual, surgical: epochs of the first stage, in which the head trains alone."
    )
    reinit_blocks: int | None = _argument(
        None, "full, partial, lp_ft, gradual: start the last so many blocks anew, with the model's own initialisation."
    )
    lora_r: int | None = _argument(None, "lora: rank of the adapters (default 8).")
    lora_alpha: int | None = _argument(None, "lora: scale of the adapters (default twice the rank).")
    lora_dropout: float | None = _argument(None, "lora: dropout on the adapters' input (default 0).")
    use_rslora: bool = _argument(False, "lora: scale by the root of the rank, for ranks above 32.")
    use_dora: bool = _argument(False, "lora: learn the weights' lengths apart from their directions.")
    init_lora_weights: str | None = _argument(
        None,
        "lora: how the adapters start (default: one matrix random, the other zero).",
        choices=("gaussian", "orthogonal", "pissa", "olora"),
    )
    lora_plus_ratio: float | None = _argument(
        None, "lora, dora, …: the second matrices learn at this times the rate of the first (LoRA+: 16)."
    )
    lora_blocks: int | None = _argument(
        None, "lora, peft, …: adapt the last so many blocks only (default: all but the first)."
    )
    lora_layers_pattern: str | None = _argument(
        None, "lora, peft, …: adapt only layers in whose full names this regular expression is found."
    )
    lora_target_modules: list[str] | None = _argument(
        None, "lora, peft, …: names of the adapted layers (default: chosen)."
    )
    peft_type: str | None = _argument(None, "peft: the type of adapter, by its name in the peft package.")
    peft_config: str | None = _argument(
        None, "lora, peft, …: settings of the type's configuration in peft, as JSON: '{\"r\": 4}'."
    )
    load_in_8bit: bool = _argument(False, "lora, peft, …: hold the frozen weights in 8 bits (bitsandbytes).")
    load_in_4bit: bool = _argument(False, "lora, peft, …: hold the frozen weights in 4 bits (QLoRA; bitsandbytes).")
    batch_norm: str | None = _argument(
        None,
        "Statistics of the BatchNorm layers: frozen keeps those of the pretrained model (default for it), adapt takes "
        "those of the training images once, before training, train updates those of the layers that train.",
        choices=("frozen", "adapt", "train"),
    )
    penalty: str | None = _argument(
        None,
        "Added to the loss in training: l2_sp, delta (near to the pretrained weights, features), bss, r_drop, or "
        "module:function, or file.py:function.",
    )
    penalty_weight: float | None = _argument(None, "Weight of the penalty (default: by penalty).")

    time_budget: str | None = _argument(
        None, "auto: what it may take from start to end, as 200s, 10m or 1h (default: that of --preset)."
    )
    preset: str | None = _argument(
        None, "auto: a budget by name: fast is 1m, medium 10m (default), best 1h.", choices=("fast", "medium", "best")
    )

    # Frozen parts: run once an example, and a head that is solved
    feature_cache: str = _argument(
        "auto",
        "Run what is frozen once an example and keep what it gives. auto: where the results are the same; on: or stop; "
        "off: never, and no tokens either.",
        choices=("auto", "on", "off"),
    )
    # One: the plain view. Each further one costs a pass over the rows.
    feature_views: int = _argument(
        1,
        "Augmented views kept of each training example; 1 is the plain one, 0 keeps none and augments in every epoch.",
    )
    feature_cache_gb: float = _argument(10.0, "What all kept features may take on disk.")
    feature_cache_dtype: str = _argument(
        "auto",
        "How they are kept. auto: in 16 bits where that changes no prediction of the first rows, else float32.",
        choices=("auto", "float16", "bfloat16", "float32"),
    )
    feature_cache_hash: str = _argument(
        "fast",
        "How files are recognised. fast: by size, time, beginning and end; full: by all of their content.",
        choices=("fast", "full"),
    )
    head: str | None = _argument(
        None,
        "frozen: the classifier fitted on the features. svm, ridge, nearest_mean: linear, as logistic (default); the "
        "model's own output layer holds them. knn, mlp, tip (Tip-Adapter's cache): beside the model, for hftl alone.",
        choices=("logistic", "svm", "ridge", "nearest_mean", "knn", "mlp", "tip"),
    )
    feature_layers: int | None = _argument(
        None,
        "frozen: fit the head on the outputs of the last so many blocks, joined; 1 (default) is what the model's own "
        "output layer reads. Beside the model, for hftl alone.",
    )
    feature_pooling: str | None = _argument(
        None,
        "frozen: how the output of a block becomes one vector. model (default): the last block's as the model does it, "
        "earlier ones by their mean; mean, max, mean_max (both): the last block's that way too, joined to the model's.",
        choices=("model", "mean", "max", "mean_max"),
    )
    head_solver: str = _argument(
        "auto",
        "How a head alone is fitted. lbfgs: solved on kept features, the penalty chosen on validation; sgd: trained; "
        "auto: solved where it is one linear layer and no setting of the training is given.",
        choices=("auto", "lbfgs", "sgd"),
    )

    # Training: fields of TrainingArguments with another default, and None for what is chosen later
    dataloader_num_workers: int = _argument(-1, "Processes that prepare rows; -1: as many as keep pace.")
    output_dir: str | None = _argument(None, "The run folder (default: runs/DATASET-MODEL-METHOD).")
    learning_rate: float | None = _argument(
        None, "Learning rate of the backbone, or auto: found by a range test (default: by method and model size)."
    )
    num_train_epochs: float | None = _argument(None, "Passes over the training rows (default: by method).")
    per_device_train_batch_size: int | None = _argument(None, "Rows a step and device (default: by task).")
    # Evaluation keeps no activations, so that twice the usual batch fits wherever training fitted.
    per_device_eval_batch_size: int = _argument(32, "Rows a step and device in evaluation.")
    # AdamW's paper (Loshchilov and Hutter 2019) and the BERT paper use 0.01; norms and biases are left out of it.
    weight_decay: float = _argument(
        0.01, "Weight decay of matrices; norms, biases and embeddings of position have none."
    )
    # A tenth of the steps, as in the BERT paper: a fresh head's first gradients would disturb the backbone.
    warmup_steps: float = _argument(
        0.1, "Warm-up: a number of steps, or below 1 a part of them (default with one_cycle 0.3)."
    )
    lr_scheduler_type: str = _argument(
        "cosine", "Schedule of the learning rate: Trainer's, slanted_triangular or one_cycle."
    )
    eval_strategy: str = _argument("epoch", "When to evaluate on validation: no, steps or epoch.")
    save_strategy: str = _argument("epoch", "When to write a checkpoint: no, steps, epoch or best.")
    eval_epochs: int | None = _argument(
        None,
        "With the strategy epoch: epochs from one evaluation to the next (default 1; more where a few rows make many "
        "short epochs, so that there are about ten).",
    )
    save_total_limit: int | None = _argument(1, "Checkpoints kept beside the best one.")
    load_best_model_at_end: bool = _argument(True, "Keep the best checkpoint on validation, of equal ones the latest.")
    logging_steps: float = _argument(10, "Log the loss every so many steps.")
    report_to: str | None = _argument("tensorboard", "Trackers: tensorboard, wandb, mlflow, … or none.")
    # The collators pick what the model takes; Trainer would drop the columns that they need.
    remove_unused_columns: bool = _argument(False, "Leave false: the collator picks the columns.")
    logging_nan_inf_filter: bool = _argument(False, "Leave false: a loss that is not finite stops the run.")
    hub_strategy: str = _argument(
        "end",
        "When to push: end; every_save: each checkpoint's model too, into in-progress/, as training goes on.",
    )

    # Training: fields of our own
    class_weights: str = _argument("none", "Weigh the loss by class frequency.", choices=("none", "balanced"))
    loss: str = _argument(
        "",
        "cross_entropy (default); focal: sure rows count less; logit_adjusted: as if all classes were alike frequent; "
        "of regression mse (default) or mae; or module:function.",
    )
    sampler: str = _argument(
        "random",
        "random: each row once an epoch; balanced: each class equally often, rare rows repeated.",
        choices=("random", "balanced"),
    )
    precision: str = _argument(
        "auto",
        "Of the computation; weights stay in float32. auto: bf16 on a GPU that has it, and on a CPU where a short "
        "measurement finds it faster. Same as --bf16, --fp16.",
        choices=("auto", "fp32", "bf16", "fp16"),
    )
    average: str = _argument(
        "none",
        "Weights averaged in the last stage. ema: over the steps; swa: over the last epochs; soup: over the best "
        "checkpoints, as far as that helps on validation.",
        choices=("none", "ema", "swa", "soup"),
    )
    soup_runs: int = _argument(
        1,
        "Trainings of the last stage from the same start, each in another order; their weights are averaged, but for "
        "what makes it worse on validation by more than chance.",
    )
    ema_decay: float | None = _argument(None, "ema: what is left of the average at each step (default 0.999).")
    wise_ft: bool = _argument(
        False,
        "Mix the pretrained and the fine-tuned backbone (of CLIP and SigLIP the head too) as is best on validation; "
        "goes well with lp_ft.",
    )
    early_stopping_patience: int | None = _argument(None, "Stop after so many evaluations without a better one.")
    metrics: list[str] | None = _argument(None, "Further metrics for evaluate.load: a Hub id or a local folder.")
    resume: bool = _argument(False, "Go on with the interrupted run in the output folder.")
    overwrite: bool = _argument(False, "Replace the run in the output folder, with all that is in the folder.")
    keep_checkpoints: bool = _argument(False, "Keep the training checkpoints of a finished run.")

    # Not a field: names of the arguments that the person gave (configuration file or command line), set by `parse`.
    given: ClassVar[frozenset[str]] = frozenset()
    # Those of them that were not read from a configuration file: a run's recipe has everything.
    typed: ClassVar[frozenset[str]] = frozenset()
    # Neither: `--learning_rate auto`, whose field is None until the rate is found.
    finds_learning_rate: ClassVar[bool] = False
    # Nor: the method of a configuration file, where another one is typed beside it.
    old_method: ClassVar[str] = ""
    # Nor: bf16 because the GPU is made for it, which nobody asked for and whose loss is looked at before it is used.
    bf16_is_unasked: ClassVar[bool] = False
    #: three: on 8,000 movie reviews more gained nothing (MiniLM, 0.874 to 0.878)
    usual_epochs: ClassVar[float] = 3.0
    #: the default of `method` where rows have one class each and a pretrained model gets a new head
    usual_method: ClassVar[str] = "full"

    def __post_init__(self) -> None:
        """Choose the device before TrainingArguments asks for it, and check what Trainer would only trip over."""
        self.loss = self.loss or ("mse" if self.problem_type == "regression" else "cross_entropy")
        self.method = self.method or _usual_method(self)
        _match_precision(self)
        _check_device(self)
        metric: str | None = self.metric_for_best_model  # type: ignore[has-type]  # a field of TrainingArguments
        _match_strategies(self)
        for item in dataclasses.fields(self):
            setattr(self, item.name, _with_home(getattr(self, item.name)))
        _check_finite(self)
        schedule: str = self.lr_scheduler_type
        known = [*OWN_SCHEDULES, *(kind.value for kind in SchedulerType)]
        if schedule not in known:
            near = did_you_mean(schedule, known)
            raise UsageError(f"--lr_scheduler_type {schedule!r} is not known.{near} There are: {', '.join(known)}.")
        if schedule in OWN_SCHEDULES:
            self.lr_scheduler_type = "constant"  # Trainer knows none but its own
            if self.lr_scheduler_kwargs:
                raise UsageError(f"--lr_scheduler_kwargs: {schedule} takes none. Leave it out.")
        folder = self.output_dir
        super().__post_init__()
        if schedule in OWN_SCHEDULES:
            self.lr_scheduler_type = schedule
        if self.precision == "fp32":
            self.mixed_precision = "no"  # the flag wins over the launcher
        self.metric_for_best_model, self.output_dir = metric, folder  # Trainer's choices would be loss, trainer_output
        if metric is None:
            self.greater_is_better = None
        _check_ranges(self)
        _check_values(self)
        _check_combinations(self)
        self.label_names = ["labels"]

    def to_dict(self) -> dict[str, Any]:
        """The settings for trackers, without the name of the home folder, which is that of the person."""
        return {name: _without_home(value) for name, value in super().to_dict().items()}

    def get_warmup_steps(self, num_training_steps: int) -> int:
        """Warm-up in steps; a part of a few steps is none: rounded up, as Trainer does, the only step had rate 0."""
        return int(self.warmup_steps if self.warmup_steps >= 1 else self.warmup_steps * num_training_steps)


def _usual_method(arguments: TransferArguments) -> str:
    """Name of the method where none is given: that of the task where a new head is to be fitted, else full.

    Not where steps are counted: 100 of each stage are no better than 100 of `full` (three data sets of texts, and
    digits, two seeds: 0.4 points less). Not where weights are sharded, of which no features are kept either.
    """
    has_new_head = is_pretrained(arguments) and not arguments.keep_head
    one_class = arguments.problem_type == "single_label_classification"
    fits_head = has_new_head and one_class and arguments.max_steps < 0 and not is_sharded(arguments)
    return arguments.usual_method if fits_head else "full"


def _with_home(value: Any) -> Any:
    """`~/…` as the path that it stands for, which a shell does not see to behind `=`; anything else as it is."""
    if isinstance(value, list):
        return [_with_home(entry) for entry in value]
    return os.path.expanduser(value) if isinstance(value, str) and value.startswith("~/") else value


def _without_home(value: Any) -> Any:
    """The other way round."""
    if isinstance(value, list):
        return [_without_home(entry) for entry in value]
    home = os.path.expanduser("~/")
    return f"~/{value.removeprefix(home)}" if isinstance(value, str) and value.startswith(home) else value


ArgumentsType = TypeVar("ArgumentsType", bound=TransferArguments)


@dataclass
class ImageArguments(TransferArguments):
    """Arguments of image tasks."""

    #: a point more than full over twelve columns of images and texts, and of texts with a head of two layers over six
    #: (docs/methods/lp_ft.md)
    usual_method: ClassVar[str] = "lp_ft"

    task: str = _argument("image-classification", "Name of the task.")
    image_column: str | None = _argument(None, "Column of the images (guessed when not given).")
    image_size: int | None = _argument(None, "Side of the square image in pixels (default: the model's own).")
    # Light by default: timm's own training crop (scale 0.08 to 1) and colour jitter are made for ImageNet from scratch.
    augmentation: str = _argument(
        "light",
        "light: random crop of at least half and flip; strong: RandAugment and erasing too; trivial: TrivialAugment.",
        choices=("none", "light", "strong", "trivial"),
    )
    random_erasing: float | None = _argument(
        None, "Part of the training images of which a rectangle is erased (default 0, with strong 0.25)."
    )
    mixup: float | None = _argument(
        None, "Mix training images and their labels in pairs, weights from Beta(a, a): 0.2 to 1 are usual."
    )
    cutmix: float | None = _argument(
        None, "Paste a part of one training image into another, labels by area from Beta(a, a): 1 is usual."
    )
    horizontal_flip: bool = _argument(True, "Mirror training images at random; false for digits and text.")
    test_time_flip: bool = _argument(
        False, "Average the logits of an image and its mirror image in the final scores and in hftl predict."
    )
    image_cache: str = _argument(
        "auto",
        "Keep images of training and validation on disk at the size that they are used in, so that later epochs "
        "decode nothing; auto: for more than one epoch of photos much larger than that.",
        choices=("auto", "on", "off"),
    )
    prompts: list[str] | None = _argument(
        None,
        "CLIP, SigLIP: texts of a class with {label} in them, whose mean its head starts from (default: seven that are "
        "true of any photo); none: transformers' own classifier, with a fresh head.",
    )
    # 25,000 pictures of 317 x 423 pixels.
    image_cache_gb: float = _argument(10.0, "What all kept images may take on the disk; otherwise none are kept.")


@dataclass
class SimilarityArguments(ImageArguments):
    """Arguments of tasks that learn which images are alike."""

    task: str = _argument("image-similarity", "Name of the task.")
    problem_type: str = _argument("similarity", "What a label is: which rows are alike.", choices=("similarity",))
    loss: str = _argument(
        "contrastive", "contrastive: rows of one class near to each other, far from the rest; or module:function."
    )
    # 128 numbers are what Musgrave et al. 2020 compare all methods with.
    embedding_size: int = _argument(128, "Numbers of the vector that an image becomes.")
    # The temperature of Khosla et al. 2020.
    temperature: float = _argument(0.1, "contrastive: by what cosines are divided; less minds the nearest more.")
    sampler: str = _argument(
        "groups",
        "groups: four rows of a class come together, so that each has some like it in its batch; random.",
        choices=("groups", "random"),
    )


@dataclass
class AudioArguments(TransferArguments):
    """Arguments of audio tasks."""

    #: pictures of sounds are far from the photos that image models have seen: of spoken digits EfficientNet-Lite0
    #: learns 0.967 in three epochs, 0.977 in five, 0.980 in six
    usual_epochs: ClassVar[float] = 6.0

    task: str = _argument("audio-classification", "Name of the task.")
    audio_column: str | None = _argument(None, "Column of the recordings (guessed when not given).")
    clip_seconds: float | None = _argument(
        None,
        "Seconds of a recording that the model takes: its beginning, with augmentation a window at a random place "
        "(default: what 95 % of the training recordings fit in, 10 at most).",
    )
    test_time_windows: int = _argument(
        1,
        "Windows of --clip_seconds, spread evenly over a recording that is longer, whose logits are averaged in the "
        "final scores and in hftl predict.",
    )
    augmentation: str = _argument(
        "light",
        "light: the sound is moved in its window, and some of its bands and moments are silenced (SpecAugment); "
        "strong: louder or quieter and with noise too.",
        choices=("none", "light", "strong"),
    )
    mixup: float | None = _argument(
        None, "Mix pictures of sounds and their labels in pairs, weights from Beta(a, a): 0.2 to 1 are usual."
    )
    # As the authors of wav2vec 2.0 do it (Baevski et al. 2020, 4.2): it is general, and unstable to train.
    freeze_feature_encoder: bool = _argument(
        True, "wav2vec 2.0, HuBERT, WavLM: leave the convolutions below the transformer as they are, in any method."
    )


@dataclass
class VideoArguments(TransferArguments):
    """Arguments of video tasks."""

    task: str = _argument("video-classification", "Name of the task.")
    video_column: str | None = _argument(None, "Column of the videos (guessed when not given).")
    frames: int | None = _argument(
        None, "Frames that the model reads of a video, over all of it (default: the model's own)."
    )
    image_size: int | None = _argument(None, "Side of the square frames in pixels (default: the model's own).")
    augmentation: str = _argument(
        "light",
        "light: frames at random places of their parts, and one random crop of all; strong: RandAugment too.",
        choices=("none", "light", "strong"),
    )
    # Where something moves to is often what is asked.
    horizontal_flip: bool = _argument(False, "Mirror training videos at random; not where directions matter.")


@dataclass
class ReadingArguments(TransferArguments):
    """Arguments of tasks that read texts."""

    text_column: str | None = _argument(None, "Column of the texts (guessed when not given).")
    # 256 tokens hold most reviews, and attention costs the square of it; how many rows were cut is reported.
    max_length: int = _argument(256, "Tokens a row at most; what is longer is cut and counted.")
    word_dropout: float | None = _argument(
        None, "Part of the tokens of a training text that are masked, others in each epoch: 0.1 is usual."
    )


@dataclass
class TokenArguments(ReadingArguments):
    """Arguments of tasks with a tag a word."""

    task: str = _argument("token-classification", "Name of the task.")
    problem_type: str = _argument(
        "token_classification", "What a label is: a tag for each word.", choices=("token_classification",)
    )

    # What texts with one label have too.
    text_pair_column: ClassVar[None] = None
    pooling: ClassVar[str] = "architecture"
    template: ClassVar[None] = None


@dataclass
class ChoiceArguments(ReadingArguments):
    """Arguments of tasks with choices in each row."""

    task: str = _argument("multiple-choice", "Name of the task.")
    problem_type: str = _argument(
        "multiple_choice", "What a label is: one of the row's choices.", choices=("multiple_choice",)
    )
    choices_column: str | None = _argument(None, "Column with lists of choices (guessed when not given).")
    choice_columns: list[str] | None = _argument(None, "Columns with a choice each, instead of one of lists.")

    # What texts with one label have too; each choice is read as the second text of a pair.
    text_pair_column: ClassVar[str] = "choices"
    pooling: ClassVar[str] = "architecture"
    template: ClassVar[None] = None


@dataclass
class TextArguments(ReadingArguments):
    """Arguments of text tasks."""

    #: as for images
    usual_method: ClassVar[str] = "lp_ft"

    task: str = _argument("text-classification", "Name of the task.")
    text_pair_column: str | None = _argument(None, "Column of the second text of a pair (guessed when not given).")
    pooling: str = _argument(
        "auto",
        "mean: of the token features; architecture: leave it as it is; auto: what the checkpoint was trained with.",
        choices=("auto", "mean", "architecture"),
    )
    template: str | None = _argument(
        None,
        "What the model reads of a row, with {text} and {text_pair} in it: 'Review: {text}\\nSentiment:'. Of a text "
        "that is too long the text is cut, not what stands behind it.",
    )


@dataclass
class ImageTextArguments(ImageArguments, TextArguments):
    """Arguments of tasks of images with texts; `--model` names the image backbone."""

    #: what is told by both together alone is learned late: of the builtin captions 0.917 in three epochs, 1.000 in five
    usual_epochs: ClassVar[float] = 5.0
    #: not measured for heads that join both
    usual_method: ClassVar[str] = "full"

    task: str = _argument("image-text-classification", "Name of the task.")
    text_model: str | None = _argument(
        None, "The text backbone, as --model names the image backbone; none where --model is a run of this task."
    )
    number_columns: list[str] | None = _argument(
        None, "Columns of numbers that the model reads too, standardised; an empty cell is missing."
    )
    category_columns: list[str] | None = _argument(
        None, "Columns of categories that the model reads too; one that training has not seen is missing."
    )
    modality_dropout: float = _argument(
        0.1, "Part of the training rows that lose their image, and as many their text, so that either is enough."
    )
    fusion_dropout: float = _argument(0.1, "Part of the joined features that are left out in training.")


class _Parser(HfArgumentParser):
    """Errors as `UsageError`, with the nearest name."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message[0].upper()}{message[1:].rstrip('.')}.{nearest_choice(message)}")


class _Help(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    """Descriptions as they are written; a default of None, or empty, is explained in the text of its flag."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default in (None, "") else super()._get_help_string(action)


def averaged_views(arguments: TransferArguments) -> str | None:
    """The flag by which the final scores average the logits of several views of a row, where one is given."""
    if getattr(arguments, "test_time_flip", False):
        return "--test_time_flip"
    windows = getattr(arguments, "test_time_windows", 1)
    return f"--test_time_windows {windows}" if windows > 1 else None


def views_of_a_row(arguments: TransferArguments) -> int:
    """How many of a row's views the final scores average."""
    return 2 if getattr(arguments, "test_time_flip", False) else getattr(arguments, "test_time_windows", 1)


def flag_names(arguments_class: type) -> dict[str, str]:
    """Every name that a flag has (with underscores, aliases too) → the field's name."""
    names = {}
    for item in dataclasses.fields(arguments_class):
        names[item.name] = item.name
        aliases = item.metadata.get("aliases", [])
        names.update({alias.lstrip("-").replace("-", "_"): item.name for alias in aliases})
    return names


def parse(
    arguments_class: type[ArgumentsType],
    argv: Sequence[str] | None = None,
    description: str | None = None,
) -> ArgumentsType:
    """Arguments from a configuration file and the command line; the command line wins.

    Args:
        arguments_class: a dataclass that extends `TransferArguments`.
        argv: the command line without the program's name; `sys.argv[1:]` when None.
        description: shown above the flags by `--help`.

    Raises:
        UsageError: an unknown flag or key, a value of the wrong type, a file that is not there.
    """
    quiet_libraries()
    tokens = list(sys.argv[1:] if argv is None else argv)
    path, tokens = _take_config(tokens)
    names = flag_names(arguments_class)
    typed = _check_names(tokens, names)
    config = [] if path is None else _config_tokens(find_config(path), names, _list_fields(arguments_class))
    given = typed | _check_names(config, names)
    tokens = config + tokens
    usage = "--model MODEL --dataset DATASET [--method METHOD] [--config FILE.yaml] [other flags]"
    parser = _Parser(arguments_class, usage=usage, description=description, formatter_class=_Help, allow_abbrev=False)
    for action in parser._actions:  # a second spelling with hyphens doubles the length of --help
        action.option_strings = [name for name in action.option_strings if "-" not in name.lstrip("-")]
    for action in parser._actions:
        action.type = float_or_auto if action.dest == "learning_rate" else action.type
    _group(parser, arguments_class)
    try:
        namespace, rest = parser.parse_known_args(tokens)
        if rest:
            raise UsageError(f"Unexpected argument {rest[0]!r}: a value belongs behind a flag such as --dataset.")
        _check_gpu_wish(namespace, given)
        if namespace.deepspeed and importlib.util.find_spec("deepspeed") is None:
            raise UsageError("--deepspeed: its package is not installed: pip install deepspeed, or leave it out.")
        finds = namespace.learning_rate == "auto"
        namespace.learning_rate = None if finds else namespace.learning_rate
        keys = {item.name for item in dataclasses.fields(arguments_class) if item.init}
        arguments = arguments_class(**{key: value for key, value in vars(namespace).items() if key in keys})
    except (ValueError, ImportError, OSError) as error:  # TrainingArguments' own checks
        raise UsageError(_with_flag(" ".join(str(error).split()), vars(namespace), given)) from error
    object.__setattr__(arguments, "typed", frozenset(typed))
    object.__setattr__(arguments, "given", frozenset(given - _outdated(arguments, typed, config)))
    if arguments.lr_scheduler_type == "one_cycle" and "warmup_steps" not in given:
        arguments.warmup_steps = _ONE_CYCLE_RISE
    object.__setattr__(arguments, "finds_learning_rate", finds)
    expected = arguments_class.__dataclass_fields__["task"].default
    if arguments.task != expected and expected:
        raise UsageError(f"These settings are for the task {arguments.task!r}, but this recipe is for {expected!r}.")
    return arguments


#: what only matters to a head that is trained: whoever gives it wants that
OF_HEAD_TRAINING = {
    "num_train_epochs", "max_steps", "learning_rate", "head_learning_rate", "weight_decay", "lr_scheduler_type",
    "optim",
}  # fmt: skip


#: what may decide whether a head can be solved
_OF_HEAD = {
    "sampler", "loss", "average", "feature_cache", "word_dropout", "reinit_blocks", "torch_compile", "penalty",
}  # fmt: skip


#: headings of the flags in `--help`, each with the first field that stands below it
_GROUPS = {
    "task": "Task",
    "model_name_or_path": "Model",
    "dataset_name": "Data",
    "method": "Method",
    "time_budget": "Method auto",
    "feature_cache": "Frozen parts",
    "dataloader_num_workers": "Training: fields of transformers.TrainingArguments with a default of hftl's",
    "class_weights": "Training: hftl's own",
}


def _group(parser: argparse.ArgumentParser, arguments_class: type) -> None:
    """Put the flags below headings, hftl's own first; argparse has no public way to move them."""
    trainers = {item.name for item in dataclasses.fields(TrainingArguments)}
    headings: dict[str, str] = {}
    heading = ""
    for name in TransferArguments.__annotations__:
        heading = headings[name] = _GROUPS.get(name, heading)
    for item in dataclasses.fields(arguments_class):
        if item.name not in headings:
            kind = "Training: other fields of transformers.TrainingArguments"
            headings[item.name] = kind if item.name in trainers else "Of this task"
    actions: dict[str, list[argparse.Action]] = {}
    for action in parser._optionals._group_actions:  # several where there is a flag --no_… too
        actions.setdefault(action.dest, []).append(action)
    for title in dict.fromkeys([*_GROUPS.values(), "Of this task", *headings.values()]):
        group = parser.add_argument_group(title)
        for name in (name for name, found in headings.items() if found == title and name in actions):
            group._group_actions += actions.pop(name)
    parser._optionals._group_actions[:] = [action for kept in actions.values() for action in kept]


def float_or_auto(text: str) -> float | str:
    """A number, or the word auto, for argparse."""
    return text if text == "auto" else float(text)


def _outdated(arguments: TransferArguments, typed: set[str], config: list[str]) -> set[str]:
    """Settings of a recipe that followed from others, which flags beside it change: as if they had not been given."""
    outdated = set()
    flips = getattr(arguments, "horizontal_flip", False) and getattr(arguments, "augmentation", "none") != "none"
    asked = {"augmentation", "random_erasing"} | ({"horizontal_flip"} if flips else set())
    augments = bool(typed & asked) and arguments.feature_views == 1
    if augments:
        outdated.add("feature_views")  # the default, which every recipe has
    trains = typed & (_OF_HEAD | (OF_HEAD_TRAINING if arguments.method == "frozen" else {"head_epochs", "max_steps"}))
    old_method = next((token for token in config if token.startswith("--method=")), f"--method={arguments.method}")
    is_new = old_method != f"--method={arguments.method}"
    if config and (augments or trains or is_new):
        outdated.add("head_solver")  # a recipe says how the head was found
    if is_new or ("head_solver" in outdated and "--head_solver=lbfgs" in config):  # which took none of the epochs
        outdated.add("head_epochs")
    if is_new:
        outdated.add("unfreeze_blocks")  # which another method takes for something else
        object.__setattr__(arguments, "old_method", old_method.removeprefix("--method="))
    outdated -= typed
    for name in outdated & {"head_solver", "head_epochs", "unfreeze_blocks"}:
        setattr(arguments, name, type(arguments).__dataclass_fields__[name].default)
    return outdated


def _with_flag(message: str, values: dict[str, Any], given: set[str]) -> str:
    """The enumerations of transformers complain of a value without the flag that it came from."""
    value, found, _ = message.partition(" is not a valid ")
    flags = [name for name in sorted(given) if str(values.get(name)) == value]
    return f"--{flags[0]}: {message}" if found and flags else message


def quiet_libraries() -> None:
    """Silence what asks nothing of the person: progress bars of loading, notes on defaults, deprecations to come."""
    import warnings

    import datasets
    import transformers

    if not sys.warnoptions:
        warnings.simplefilter("ignore")
    datasets.disable_progress_bars()
    transformers.utils.logging.disable_progress_bar()
    if "TRANSFORMERS_VERBOSITY" not in os.environ:
        transformers.logging.set_verbosity_error()


def _take_config(tokens: list[str]) -> tuple[str | None, list[str]]:
    """The value of `--config` and the other tokens."""
    if sum(token == "--config" or token.startswith("--config=") for token in tokens) > 1:
        raise UsageError("--config is given more than once: put all settings into one file, or behind it as flags.")
    for position, token in enumerate(tokens):
        if token.startswith("--config="):
            return token.partition("=")[2], tokens[:position] + tokens[position + 1 :]
        if token == "--config":
            if position + 1 == len(tokens):
                raise UsageError("--config needs the path of a YAML file.")
            return tokens[position + 1], tokens[:position] + tokens[position + 2 :]
    return None, tokens


#: settings that can name code of one's own, or let that of others run
_LETS_CODE_RUN = ("metrics", "trust_remote_code", "allow_pickle")
_NAMES_CODE = ("method", "penalty", "loss", *_LETS_CODE_RUN)


@functools.cache
def find_config(name: str) -> Path:
    """The file of `--config`: a path, or `hf://USER/NAME/recipe.yaml` of the Hub, which is shown and asked about first.

    Raises:
        UsageError: it is not there, nobody can be asked, or the answer is no.
    """
    if not name.startswith("hf://"):
        return Path(os.path.expanduser(name))
    owner, _, rest = name.removeprefix("hf://").partition("/")
    repository, _, file = rest.partition("/")
    if not (owner and repository and file):
        raise UsageError(f"--config {name!r}: name a file in a repository, as hf://USER/NAME/recipe.yaml.")
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, HTTPError, RepositoryNotFoundError

    try:
        path = Path(hf_hub_download(f"{owner}/{repository}", file))
    except (EntryNotFoundError, RepositoryNotFoundError) as error:
        raise UsageError(
            f"--config {name!r}: the Hub has no such repository or file, or lets nobody in without a token (`hf auth "
            "login`)."
        ) from error
    except (HTTPError, OSError, ValueError) as error:
        raise UsageError(f"--config {name!r} cannot be fetched: {' '.join(str(error).split())[:200]}") from error
    settings = read_yaml(path)
    for line in path.read_text(encoding="utf-8").splitlines():
        if line.startswith("#"):  # what has to be named anew here
            print(visible(f"  {line}"))
    for key, value in settings.items():
        if value is not None:
            print(visible(f"  {key}: {value!r}"))
    for key in _NAMES_CODE:
        if settings.get(key) and (key in _LETS_CODE_RUN or re.search("[:/.]", str(settings[key]))):
            print(visible(f"  this names code or files that may run code: {key}: {settings[key]!r}"))
    if not sys.stdin.isatty() or int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UsageError(
            f"--config {name!r} comes from elsewhere, and nobody can be asked here: read it above, then `hf download "
            f"{owner}/{repository} {file} --local-dir .` and --config {file}."
        )
    try:
        answer = input(f"Train with these settings of {name}? [y/N] ")
    except EOFError:
        answer = ""
    if answer.strip().lower() not in ("y", "yes"):
        raise UsageError(f"--config {name!r}: not used.")
    return path


def _list_fields(arguments_class: type) -> set[str]:
    """The fields that take several values."""
    return {item.name for item in dataclasses.fields(arguments_class) if "list" in str(item.type)}


def _config_tokens(path: Path, names: dict[str, str], lists: set[str]) -> list[str]:
    """A YAML mapping as command-line tokens, so that types and choices are checked alike in both."""
    tokens = []
    for key, value in read_yaml(path).items():
        if str(key) not in names:
            raise UsageError(f"Unknown key {key!r} in {str(path)!r}.{_hint(str(key), names)}")
        if isinstance(value, list) and names[key] not in lists:
            raise UsageError(f"Key {key!r} in {str(path)!r} takes one value, not a list.")
        tokens += argument_tokens(names[key], value)
    return tokens


def argument_tokens(name: str, value: Any) -> list[str]:
    """One setting as command-line tokens; none for None."""
    if value is None:
        return []
    if isinstance(value, bool):
        return [f"--{name}={str(value).lower()}"]
    if isinstance(value, dict):
        return [f"--{name}={json.dumps(value)}"]
    if isinstance(value, list | tuple):
        return [f"--{name}", *map(str, _plain(value))] if value else []
    if not isinstance(value, str | os.PathLike | numbers.Number | Enum):
        shown = f"{type(value).__name__} {textwrap.shorten(str(value), 60)}"
        raise UsageError(f"--{name} is a name, a path or a number, and not a {shown}.")
    return [f"--{name}={_plain(value)}"]


#: image flags that people look for with texts too
_IMAGES_ONLY = ("mixup", "cutmix")


def _check_names(tokens: Sequence[str], names: dict[str, str]) -> set[str]:
    """The fields that the tokens name; an unknown flag is an error with the nearest name."""
    given = set()
    for token in tokens:
        if not token.startswith("--") or token in ("--", "--help"):
            continue
        name = token[2:].partition("=")[0].replace("-", "_")
        field_name = names.get(name) or names.get(name.removeprefix("no_"))
        if field_name is None:
            if name == "cutmix" and "mixup" in names:
                raise UsageError("--cutmix pastes parts of images: for sounds take --mixup.")
            if name in _IMAGES_ONLY:
                raise UsageError(
                    f"--{name} mixes the pixels of images; mixing videos or the embeddings of texts is not supported."
                )
            raise UsageError(f"Unknown flag --{name}.{_hint(name, [*names, 'config', 'help'])}")
        given.add(field_name)
    return given


def _hint(name: str, names: Iterable[str]) -> str:
    """What may be meant by an unknown name: a flag of other tasks, or the nearest one."""
    from hftl.tasks import TASKS, find_task

    users = [task for task in TASKS if name in flag_names(find_task(task).arguments_class)]
    return f" It is for {', '.join(users)}: leave it out." if users else did_you_mean(name, names)


def _check_gpu_wish(namespace: argparse.Namespace, given: set[str]) -> None:
    """Refuse `--use_cpu false` where there is nothing but the CPU."""
    import torch

    if "use_cpu" in given and not namespace.use_cpu and not torch.accelerator.is_available():
        raise UsageError("--use_cpu false asks for a GPU and none was found: leave it out.")


def _match_precision(arguments: TransferArguments) -> None:
    """`--precision` and Trainer's own `--bf16` and `--fp16` say the same; what the launcher asks for wins over auto.

    On a GPU auto is settled here: bf16 on those made for it (NVIDIA: Ampere and later), else float32. Before a training
    the loss may still say float32.
    """
    import torch

    flags = [name for name in ("bf16", "fp16") if getattr(arguments, name)]
    if len(flags) == 2:
        raise UsageError("--bf16 and --fp16 exclude each other: leave one out.")
    if arguments.precision == "auto":
        launcher = os.environ.get("ACCELERATE_MIXED_PRECISION")  # "no" also where nobody asked
        asked = [*flags, launcher] if launcher in ("bf16", "fp16") else flags
        if asked:
            arguments.precision = str(asked[0])
        elif torch.accelerator.is_available() and not arguments.use_cpu and launcher != "fp8":
            made_for_it = torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)
            arguments.precision = "bf16" if made_for_it else "fp32"
            object.__setattr__(arguments, "bf16_is_unasked", made_for_it)
            if made_for_it and arguments.tf32 is None:
                torch.set_float32_matmul_precision("high")  # what autocast leaves in float32
    elif flags and flags[0] != arguments.precision:
        raise UsageError(f"--precision {arguments.precision} and --{flags[0]} contradict each other: leave one out.")
    arguments.bf16, arguments.fp16 = arguments.precision == "bf16", arguments.precision == "fp16"


def set_precision(arguments: TransferArguments, precision: str) -> None:
    """Put a chosen precision in the place of auto, before a trainer is made."""
    arguments.precision = precision
    arguments.bf16, arguments.fp16 = precision == "bf16", precision == "fp16"
    arguments.mixed_precision = {"fp32": "no"}.get(precision, precision)  # what Accelerate is given


def _check_device(arguments: TransferArguments) -> None:
    """Use the CPU where nothing else is, and refuse what the hardware cannot do."""
    import torch

    if os.environ.get("WORLD_SIZE", "1") != "1" and not {"RANK", "LOCAL_RANK", "MASTER_ADDR"} <= set(os.environ):
        raise _separate_processes()
    if not torch.accelerator.is_available():
        if arguments.fp16 and os.environ.get("ACCELERATE_MIXED_PRECISION") == "fp16":
            raise UsageError("The launcher asks for fp16, which needs a GPU, and none was found: use bf16, or no.")
        if arguments.fp16:
            raise UsageError(
                "--precision fp16 or --fp16 needs a GPU and none was found: use --precision bf16, or leave it out."
            )
        if arguments.tf32:
            raise UsageError("--tf32 needs an NVIDIA GPU of the Ampere generation or later and none was found.")
        # Two CPU processes only see each other with use_cpu (Accelerate asks for it), and bf16 raises without it.
        arguments.use_cpu = True
        return
    if arguments.bf16 and not arguments.use_cpu and torch.cuda.is_available() and not torch.cuda.is_bf16_supported():
        raise UsageError(
            "--precision bf16 or --bf16 is not supported by this GPU: use --precision fp16 (or --fp16) instead."
        )


def _match_strategies(arguments: TransferArguments) -> None:
    """The best checkpoint needs one for each evaluation: of two strategies, the default follows the other."""
    if arguments.average == "soup" and arguments.eval_strategy == "no":
        raise UsageError("--average soup needs evaluations: --eval_strategy epoch, or steps.")
    if not arguments.load_best_model_at_end:
        return
    for name in ("eval", "save"):
        if getattr(arguments, f"{name}_strategy") == "no":
            raise UsageError(f"--{name}_strategy no leaves no best checkpoint: add --load_best_model_at_end false.")
    if arguments.eval_strategy == "steps" and arguments.save_strategy == "epoch":
        arguments.eval_steps = arguments.eval_steps or arguments.logging_steps
        arguments.save_strategy, arguments.save_steps = "steps", arguments.eval_steps
    elif arguments.save_strategy == "steps" and arguments.eval_strategy == "epoch":
        arguments.eval_strategy, arguments.eval_steps = "steps", arguments.save_steps


def _check_finite(arguments: TransferArguments) -> None:
    """Python reads nan and inf as numbers."""
    for item in dataclasses.fields(arguments):
        value = getattr(arguments, item.name)
        if isinstance(value, float) and not math.isfinite(value):
            raise UsageError(f"--{item.name} must be a finite number, not {value}.")


#: what numbers may be: names, whether a value is right, and the rule in words
_RANGES: tuple[tuple[tuple[str, ...], Callable[[float], bool], str], ...] = (
    (
        (
            "num_train_epochs", "head_epochs", "eval_epochs", "per_device_train_batch_size",
            "per_device_eval_batch_size", "gradient_accumulation_steps", "eval_accumulation_steps",
            "max_train_samples", "max_eval_samples", "shots", "repeats", "soup_runs", "learning_rate",
            "head_learning_rate", "lora_r", "lora_alpha", "lora_blocks", "lora_plus_ratio", "reinit_blocks", "mixup",
            "cutmix", "feature_layers", "feature_cache_gb", "frames", "image_size", "image_cache_gb",
            "max_length", "clip_seconds", "test_time_windows", "early_stopping_patience", "embedding_size",
            "temperature",
        ),
        lambda value: value > 0,
        "be above 0",
    ),
    (("max_steps",), lambda value: value > 0 or value == -1, "be above 0"),
    (("feature_views",), lambda value: value >= 0, "be 0 or more"),
    (("dataloader_num_workers",), lambda value: value >= -1, "be 0 or more (-1 chooses)"),
    (("weight_decay", "max_grad_norm"), lambda value: value >= 0, "be a number from 0 on"),
    (("lora_dropout", "label_smoothing_factor"), lambda value: 0 <= value < 1, "lie between 0 and 1"),
    (
        ("validation_fraction", "random_erasing", "word_dropout", "ema_decay"),
        lambda value: 0 < value < 1,
        "lie between 0 and 1, and be neither",
    ),
    (("layer_decay",), lambda value: 0 < value <= 1, "lie above 0 and not above 1"),
)  # fmt: skip


def _check_ranges(arguments: TransferArguments) -> None:
    """Numbers that argparse lets through and that mean nothing."""
    for names, is_right, rule in _RANGES:
        for name in names:
            value = getattr(arguments, name, None)
            if value is not None and not is_right(value):
                raise UsageError(f"--{name} must {rule}, not {value}.")
    if not 0 <= arguments.seed <= 2**32 - arguments.repeats:
        raise UsageError(f"--seed must lie between 0 and {2**32 - arguments.repeats}, not {arguments.seed}.")
    if arguments.time_budget is not None:
        seconds_of(arguments.time_budget)


def _check_values(arguments: TransferArguments) -> None:
    """Other values that hftl has no use for, or that this machine has not."""
    for name, needed in (("eval_do_concat_batches", True), ("prediction_loss_only", False)):
        if getattr(arguments, name) is not needed:
            raise UsageError(f"--{name}: hftl scores an evaluation by all of its answers. Leave it out.")
    for kind in ("bf16", "fp16"):
        if getattr(arguments, f"{kind}_full_eval"):  # Trainer casts the model itself, outside of a training for good
            raise UsageError(
                f"--{kind}_full_eval rounds the trained weights. Take --precision {kind}, which evaluates so too."
            )
    if arguments.output_dir is not None and not arguments.output_dir.strip():
        raise UsageError("--output_dir is empty: name a folder, or leave it out.")
    if not all(name.strip() for name in arguments.metrics or []):
        raise UsageError("--metrics is empty: name metrics, or leave it out.")
    if not isinstance(arguments.lr_scheduler_kwargs or {}, dict):
        raise UsageError("--lr_scheduler_kwargs must be settings by name, as JSON: '{\"num_cycles\": 0.5}'.")
    if arguments.use_liger_kernel and importlib.util.find_spec("liger_kernel") is None:
        raise UsageError("--use_liger_kernel: its package is not installed: pip install liger-kernel, or leave it out.")
    if arguments.neftune_noise_alpha is not None and isinstance(arguments, ImageArguments):
        raise UsageError("--neftune_noise_alpha disturbs the embeddings of tokens, which an image model has not.")
    if arguments.push_to_hub and arguments.hub_strategy not in ("end", "every_save"):
        raise UsageError("--hub_strategy must be end (the finished run in one commit) or every_save.")
    if (
        arguments.push_to_hub
        and arguments.hub_strategy != "end"
        and (arguments.method == "auto" or arguments.repeats > 1)
    ):
        raise UsageError("--hub_strategy every_save is for one training: leave it out here (--method auto, --repeats).")
    if arguments.resume_from_checkpoint:
        raise UsageError("--resume_from_checkpoint is not used: --resume finds the checkpoint in --output_dir.")
    _check_trackers(arguments)
    if arguments.world_size != int(os.environ.get("WORLD_SIZE", "1")):
        raise _separate_processes()


def _check_combinations(arguments: TransferArguments) -> None:
    """Values that contradict each other."""
    if arguments.time_budget is not None and arguments.preset is not None:
        raise UsageError("--time_budget and --preset exclude each other: leave one out.")
    if arguments.shots is not None:
        # Of the fraction only a changed one is refused: the recipe of a run holds every setting.
        changed = {"max_train_samples": None, "validation_fraction": 0.1}
        for name, default in changed.items():
            if getattr(arguments, name) != default:
                raise UsageError(f"--shots and --{name} exclude each other: leave one out.")
    if arguments.repeats > 1 and arguments.method == "auto":
        raise UsageError("--repeats: --method auto chooses a method for each seed anew. Name a method.")
    if getattr(arguments, "random_erasing", None) and getattr(arguments, "augmentation", None) == "none":
        raise UsageError("--random_erasing and --augmentation none contradict each other: leave one out.")
    if getattr(arguments, "test_time_flip", False) and not getattr(arguments, "horizontal_flip", True):
        raise UsageError("--test_time_flip and --horizontal_flip false contradict each other: leave one out.")
    _check_averaging(arguments)
    _check_template(arguments)
    _check_prompts(arguments)
    if arguments.early_stopping_patience and arguments.eval_strategy == "no":
        raise UsageError("--early_stopping_patience needs evaluations: --eval_strategy epoch, or steps.")
    if arguments.eval_epochs is not None and arguments.eval_strategy != "epoch":
        raise UsageError(f"--eval_epochs goes with --eval_strategy epoch, not {arguments.eval_strategy}: leave it out.")
    if arguments.auto_find_batch_size and arguments.world_size > 1:
        raise UsageError(
            "--auto_find_batch_size works in one process: when one of several runs out of memory the others would wait "
            "for it. Give --per_device_train_batch_size and --gradient_accumulation_steps."
        )
    if arguments.resume and arguments.overwrite:
        raise UsageError("--resume and --overwrite exclude each other.")


def _check_template(arguments: TransferArguments) -> None:
    """A template has a place for the text, and for nothing that a row has not."""
    template = getattr(arguments, "template", None)
    if template is None:
        return
    names = _places_in(template, "--template")
    unknown = sorted(names - {"text", "text_pair"})
    if unknown or "text" not in names:
        found = f"{{{unknown[0]}}} is no part of a row" if unknown else "there is no {text} in it"
        raise UsageError(f"--template: {found}. It may hold {{text}} and {{text_pair}}.")


def _check_prompts(arguments: TransferArguments) -> None:
    """A prompt has a place for the name of a class, and for nothing else."""
    prompts = getattr(arguments, "prompts", None)
    if prompts is None or prompts == NO_PROMPTS:
        return
    if not prompts:
        raise UsageError("--prompts is empty: name texts with {label} in them, or leave it out.")
    for prompt in prompts:
        names = _places_in(prompt, "--prompts")
        if names != {"label"} or re.search(r"\{label[^}]", prompt):  # {label:d}, {label!r}
            raise UsageError(
                f"--prompts: {prompt!r} must hold {{label}}, for the name of a class, and nothing else in braces."
            )


def _places_in(text: str, flag: str) -> set[str]:
    """The names that stand in braces in a text."""
    try:
        return {name for _, name, _, _ in string.Formatter().parse(text) if name is not None}
    except ValueError as error:
        raise UsageError(f"{flag}: {error}. A brace that stands for itself is doubled: {{{{ or }}}}.") from error


def _check_averaging(arguments: TransferArguments) -> None:
    """What an average needs of the training."""
    if arguments.ema_decay is not None and arguments.average != "ema":
        raise UsageError("--ema_decay is for --average ema: add that, or leave it out.")
    if arguments.average == "swa" and arguments.early_stopping_patience:
        raise UsageError(
            "--average swa takes the last part of a training whose length is known: leave out "
            "--early_stopping_patience, or use --average ema."
        )
    if arguments.average in ("ema", "swa") and arguments.save_only_model:
        raise UsageError(f"--save_only_model leaves the average of --average {arguments.average} out: leave out one.")


def seconds_of(duration: str) -> float:
    """Seconds of a duration such as 200s, 10m, 1.5h, or 200.

    Raises:
        UsageError: it is none, or not above 0.
    """
    found = re.fullmatch(r"(\d+(?:\.\d*)?|\.\d+)\s*([smh]?)", duration.strip())
    seconds = float(found[1]) * {"": 1, "s": 1, "m": 60, "h": 3600}[found[2]] if found else 0.0
    if not seconds > 0:
        raise UsageError(f"--time_budget must be a time above 0 such as 200s, 10m or 1h, not {duration!r}.")
    return seconds


def _separate_processes() -> UsageError:
    return UsageError(
        f"{os.environ['WORLD_SIZE']} processes were started, but they do not see each other, and would train "
        "alone, over one folder: launch with `accelerate launch --config_file accelerate_configs/FILE.yaml` (hftl ls)."
    )


def _check_trackers(arguments: TransferArguments) -> None:
    """Refuse a tracker that Trainer would only miss when it starts."""
    from transformers import integrations

    known = integrations.integration_utils.INTEGRATION_TO_CALLBACK
    for name in arguments.report_to or []:
        if name not in known:
            raise UsageError(
                f"--report_to {name!r} is not known.{did_you_mean(name, known)} There are: {', '.join(known)}."
            )
        if name not in integrations.get_available_reporting_integrations() and name not in ("flyte", "kubeflow"):
            raise UsageError(f"--report_to {name}: its package is not installed. Install it, or leave it out.")


#: what a repeated run must not take over: where it goes, how it is started, and secrets.
NOT_IN_RECIPE = {
    "output_dir", "resume", "overwrite", "hub_token", "local_rank", "push_to_hub", "disable_tqdm", "label_names",
    "gradient_checkpointing", "gradient_checkpointing_kwargs", "resume_from_checkpoint", "use_cpu", "do_eval",
    "dataloader_num_workers", "average_tokens_across_devices", "log_level", "log_level_replica", "report_to", "debug",
    "dataloader_pin_memory", "dataloader_persistent_workers", "dataloader_prefetch_factor",
    "bf16", "fp16",  # precision says it
}  # fmt: skip


def is_sharded(arguments: TransferArguments) -> bool:
    """Whether the launcher or a flag asks for FSDP or DeepSpeed, with which no process holds the whole model."""
    launched = any(os.environ.get(f"ACCELERATE_USE_{kind}") == "true" for kind in ("FSDP", "DEEPSPEED"))
    return launched or bool(arguments.fsdp or arguments.deepspeed)


def has_checkpoint(arguments: TransferArguments) -> bool:
    """Whether `--model` names a checkpoint, and not an architecture alone."""
    return not str(arguments.model_name_or_path).startswith("random:")


def is_pretrained(arguments: TransferArguments) -> bool:
    """Whether the model comes with weights that learned something."""
    return has_checkpoint(arguments) or arguments.weights is not None


def to_recipe(arguments: TransferArguments) -> dict[str, Any]:
    """Every resolved argument that differs from Trainer's default or is hftl's own, ready for `--config`.

    The home folder stands there as `~`.
    """
    own = {item.name for item in dataclasses.fields(type(arguments))} - {
        item.name for item in dataclasses.fields(TrainingArguments)
    }
    always = set(TransferArguments.__annotations__) | own | {"seed", "greater_is_better"}
    recipe = {}
    for item in dataclasses.fields(type(arguments)):
        value = getattr(arguments, item.name)
        if item.name in NOT_IN_RECIPE or value is None or not item.init:
            continue
        # Trainer fills some fields that are None by default; false and empty mean the same there.
        unset = (value is False and item.default is None) or value in ([], {})
        if item.name not in always and (unset or _plain(value) == _plain(item.default)):
            continue
        if dataclasses.is_dataclass(value):
            continue
        recipe[item.name] = _without_home(_plain(value))
    return recipe


def _plain(value: Any) -> Any:
    """Enums as their values, as YAML wants them."""
    if isinstance(value, Enum):
        return value.value
    return [_plain(entry) for entry in value] if isinstance(value, list | tuple) else value


def unwatched(arguments: ArgumentsType, **changes: Any) -> ArgumentsType:
    """The arguments of a training in which nothing is evaluated, saved or reported.

    Args:
        arguments: of the run.
        changes: other fields; `dataloader_num_workers` is among them.
    """
    workers = changes["dataloader_num_workers"]
    return stage_arguments(
        arguments,
        eval_strategy=IntervalStrategy.NO,
        save_strategy=SaveStrategy.NO,
        load_best_model_at_end=False,
        report_to=[],
        push_to_hub=False,
        disable_tqdm=True,
        dataloader_prefetch_factor=arguments.dataloader_prefetch_factor if workers else None,
        dataloader_persistent_workers=workers > 0,
        **changes,
    )


def stage_arguments(arguments: ArgumentsType, **changes: Any) -> ArgumentsType:
    """A copy with changed fields; the device and the checked state stay as they are."""
    changed = copy.copy(arguments)
    for name, value in changes.items():
        setattr(changed, name, value)
    return changed
