"""What a training step costs in hftl, over a bare `transformers.Trainer` that does the same work.

    python scripts/benchmark.py                                       # both tasks, built-in data and weights
    python scripts/benchmark.py --task image --data-root my/images    # a folder of class folders
    python scripts/benchmark.py --task text --data-root my/table.csv  # a table of texts and labels
    python scripts/benchmark.py --against-itself                      # bare against bare: the noise of this machine

Both sides get the same weights, rows, transforms, collator, batches and precision, and take turns in one process; who
goes first changes every repeat. A step lasts from the end of one to the end of the next: data, forward, backward,
update, and whatever the trainer does between. The table and benchmarks/results.json give seconds a step (median and
minimum over all steps) and the ratio hftl / bare: of the fastest time of each step over all repeats, since what else a
machine does only ever adds time; beside it the median of the repeats' own ratios, with the lowest and the highest.
"""

from __future__ import annotations

import argparse
import copy
import datetime
import importlib.metadata
import itertools
import json
import os
import platform
import statistics
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import transformers

import hftl

ROOT = Path(__file__).resolve().parent.parent
TASKS = {
    "image": (hftl.ImageClassification, hftl.ImageArguments, "builtin:efficientnet_lite0", "builtin:digits"),
    "text": (hftl.TextClassification, hftl.TextArguments, "builtin:minilm", "builtin:movie-snippets"),
}


class StepClock(transformers.TrainerCallback):
    """The seconds between the ends of consecutive steps, without the first ones."""

    def __init__(self, warmup: int) -> None:
        """Leave out the first `warmup` steps."""
        self.warmup, self.ends = warmup, []

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        """Note the time."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.ends.append(time.perf_counter())

    def seconds(self) -> list[float]:
        """One figure a counted step."""
        return [after - before for before, after in itertools.pairwise(self.ends[self.warmup - 1 :])]


class Work:
    """A task with its data, model and plan, made once; both trainers get copies of the same."""

    def __init__(self, kind: str, options: argparse.Namespace, folder: str) -> None:
        """Load the data and the model as a recipe does."""
        task_class, arguments_class, model, data = TASKS[kind]
        flags = [f"--model={model}", f"--dataset={options.data_root or data}", f"--output_dir={folder}/{kind}"]
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
            "--batch_norm=train",  # as the bare Trainer does: equal work
        ]
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


def describe() -> dict[str, Any]:
    """The machine, the versions, the date and the commit."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    cpu = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.processor())
    gpu = torch.cuda.get_device_name(0) if torch.cuda.is_available() else None
    git = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True)
    versions = {
        name: importlib.metadata.version(name) for name in ("torch", "transformers", "accelerate", "timm", "peft")
    }
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "commit": git.stdout.strip() or None,
        "machine": {"cpu": cpu, "cores": os.cpu_count(), "threads": torch.get_num_threads(), "gpu": gpu},
        "versions": {"python": platform.python_version(), **versions},
    }


def main() -> None:
    """Run what was asked for, print the table, write the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", choices=("image", "text", "both"), default="both")
    parser.add_argument("--data-root", help="own data: a folder of class folders, or a table")
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--steps", type=int, default=12, help="counted steps a repeat")
    parser.add_argument("--warmup", type=int, default=3, help="steps before those, at least 1")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--bf16", action="store_true", help="bf16 autocast on both sides")
    parser.add_argument("--against-itself", action="store_true", help="bare against bare: the noise")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results.json")
    options = parser.parse_args()
    if options.data_root and options.task == "both":
        parser.error("--data-root needs --task image or --task text")
    if options.warmup < 1:
        parser.error("--warmup must be at least 1")
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
    options.output.parent.mkdir(parents=True, exist_ok=True)
    settings = {name: str(value) for name, value in vars(options).items() if name not in ("output", "data_root")}
    content = {**describe(), "settings": settings, "results": results}
    options.output.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    print(f"written to {options.output}")


if __name__ == "__main__":
    main()
