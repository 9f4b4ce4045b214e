"""What a training step costs in hftl, over a bare `transformers.Trainer` that does the same work.

Both sides get the same weights, rows, transforms, collator, batches and precision, and take turns in one process; who
goes first changes every repeat. A step lasts from the end of one to the end of the next: data, forward, backward,
update, and whatever the trainer does between. Figures are seconds a step (median and minimum over all steps) and the
ratio hftl / bare: of the fastest time of each step over all repeats, since what else a machine does only ever adds
time; beside it the median of the repeats' own ratios, with the lowest and the highest.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import statistics
import tempfile
import time
from typing import Any

import torch
import transformers

import hftl
from benchmark import report

TASKS = {
    "image": (hftl.ImageClassification, hftl.ImageArguments, "builtin:efficientnet_lite0", "builtin:digits"),
    "text": (hftl.TextClassification, hftl.TextArguments, "builtin:minilm", "builtin:movie-snippets"),
}


class StepClock(transformers.TrainerCallback):
    """The seconds between the ends of consecutive steps, without the first ones."""

    def __init__(self, warmup: int) -> None:
        """Leave out the first `warmup` steps."""
        self.warmup = warmup
        self.ends: list[float] = []

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        """Note the time."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.ends.append(time.perf_counter())

    def seconds(self) -> list[float]:
        """One figure a counted step."""
        return [after - before for before, after in itertools.pairwise(self.ends[self.warmup - 1 :])]


def _dataset(kind: str, options: argparse.Namespace) -> str | None:
    """The data set of a task below `--data-root`."""
    if options.data_root is None:
        return None
    return str(options.data_root / {"image": "dogs_cats", "text": "movie_snippets"}[kind])


class Work:
    """A task with its data, model and plan, made once; both trainers get copies of the same."""

    def __init__(self, kind: str, options: argparse.Namespace, folder: str) -> None:
        """Load the data and the model as a recipe does."""
        task_class, arguments_class, model, data = TASKS[kind]
        flags = [f"--model={model}", f"--dataset={_dataset(kind, options) or data}", f"--output_dir={folder}/{kind}"]
        flags += [
            f"--max_steps={options.warmup + options.steps}",
            f"--per_device_train_batch_size={options.batch_size}",
        ]
        flags += ["--eval_strategy=no", "--save_strategy=no", "--load_best_model_at_end=false", "--report_to=none"]
        flags += [
            "--logging_strategy=no",
            "--disable_tqdm=true",
            "--dataloader_num_workers=0",
            "--learning_rate=1e-5",
            "--num_train_epochs=1",
        ]
        flags += ["--batch_norm=train"] if kind == "image" else []  # as the bare Trainer does: equal work
        self.arguments = hftl.parse(arguments_class, flags + (["--bf16"] if options.bf16 else []))
        self.task = task_class(self.arguments)
        self.splits = self.task.load_splits()
        self.plan = hftl.build_plan(self.task.build_model(self.splits), self.arguments)
        self.rows = self.task.dataset(self.splits.train, training=True)

    def bare(self) -> transformers.Trainer:
        """Trainer as it is, but in our order of rows, so that step i has the same rows on both sides."""
        order = self.hftl()._get_train_sampler()
        order.set_epoch(0)

        class Bare(transformers.Trainer):
            def _get_train_sampler(self, train_dataset: Any = None) -> list[int]:
                return list(order)

        return Bare(
            model=copy.deepcopy(self.plan.model),
            args=self.arguments,
            train_dataset=self.rows,
            data_collator=self.task.collate,
            compute_loss_func=self.task.loss(self.splits),
        )

    def hftl(self) -> transformers.Trainer:
        """The trainer of hftl's own fit."""
        return hftl.TransferTrainer(
            stage=self.plan.stages[0],
            loss=self.task.loss(self.splits),
            model=copy.deepcopy(self.plan.model),
            args=self.arguments,
            train_dataset=self.rows,
            data_collator=self.task.collate,
        )


def compare(kind: str, options: argparse.Namespace) -> dict[str, Any]:
    """Let both sides take turns on one task; the figures."""
    with tempfile.TemporaryDirectory() as folder:
        work = Work(kind, options, folder)
        sides = {"bare": work.bare, "hftl": work.bare if options.against_itself else work.hftl}
        seconds: dict[str, list[list[float]]] = {name: [] for name in sides}
        for repeat in range(options.repeats):
            for name in sorted(sides, reverse=bool(repeat % 2)):
                trainer, clock = sides[name](), StepClock(options.warmup)
                trainer.add_callback(clock)
                trainer.train()
                seconds[name].append(clock.seconds())
    # Step i has the same rows on both sides; the median shrugs off a step that something else slowed.
    ratios = [
        statistics.median(mine / other for mine, other in zip(ours, theirs, strict=True))
        for ours, theirs in zip(seconds["hftl"], seconds["bare"], strict=True)
    ]
    fastest = {name: [min(step) for step in zip(*repeats, strict=True)] for name, repeats in seconds.items()}
    flat = {name: [value for one in repeats for value in one] for name, repeats in seconds.items()}
    figures = {name: {"median_s": statistics.median(v), "min_s": min(v), "steps": len(v)} for name, v in flat.items()}
    return {
        **figures,
        "ratio": sum(fastest["hftl"]) / sum(fastest["bare"]),
        "ratio_median": statistics.median(ratios),
        "ratio_low": min(ratios),
        "ratio_high": max(ratios),
    }


def run(options: argparse.Namespace) -> int:
    """Compare what was asked for, print the table, write steps.json."""
    kinds = list(TASKS) if options.task == "both" else [options.task]
    results = {kind: compare(kind, options) for kind in kinds}
    other = "bare again" if options.against_itself else "hftl"
    print(f"\n{'task':<8}{'bare s/step':>14}{other + ' s/step':>20}{'ratio':>8}   repeats: median, lowest to highest")
    for kind, figures in results.items():
        low, high = figures["ratio_low"], figures["ratio_high"]
        print(
            f"{kind:<8}{figures['bare']['median_s']:>14.4f}{figures['hftl']['median_s']:>20.4f}{figures['ratio']:>8.3f}"
            f"   {figures['ratio_median']:.3f}, {low:.3f} to {high:.3f}"
        )
    names = ("batch_size", "steps", "warmup", "repeats", "bf16", "against_itself")
    settings = {name: getattr(options, name) for name in names}
    gpu = torch.cuda.get_device_name(0) if torch.cuda.is_available() else None
    options.output.mkdir(parents=True, exist_ok=True)
    content = {**report.describe(gpu), "settings": settings, "results": results}
    (options.output / "steps.json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    print(f"written to {options.output / 'steps.json'}")
    return 0
