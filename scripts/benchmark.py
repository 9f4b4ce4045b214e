"""What a training step costs in hftl, over a bare `transformers.Trainer` that does the same work.

    python scripts/benchmark.py                                     # both tasks, no download
    python scripts/benchmark.py --task image --data-root my/images  # a folder of class folders
    python scripts/benchmark.py --task text --data-root my.csv      # a table with the columns text and label
    python scripts/benchmark.py --against-itself                    # bare against bare: the noise of this machine

Both sides get equal weights, the same prepared rows, collator, order and precision, and take turns in one process; who
goes first changes every repeat. A step lasts from the end of one to the end of the next: data, forward, backward, update,
and whatever the trainer does between. The table and benchmarks/results.json give seconds a step (median and minimum
over all steps) and the ratio hftl / bare: the median over repeats, with the lowest and the highest.
"""

from __future__ import annotations

import argparse
import copy
import csv
import datetime
import importlib.metadata
import itertools
import json
import os
import platform
import random
import statistics
import subprocess
import tempfile
import time
from pathlib import Path

import torch
import transformers

ROOT = Path(__file__).resolve().parent.parent
Rows = list[dict]


class StepClock(transformers.TrainerCallback):
    """The seconds between the ends of consecutive steps, without the first ones."""

    def __init__(self, warmup: int) -> None:
        """Leave out the first `warmup` steps."""
        self.warmup, self.ends = warmup, []

    def on_step_end(self, *args, **kwargs) -> None:
        """Note the time."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.ends.append(time.perf_counter())

    def seconds(self) -> list[float]:
        """One figure a counted step."""
        ends = self.ends[self.warmup - 1 :]
        return [after - before for before, after in itertools.pairwise(ends)]


def bare_trainer(model, args, rows, collate) -> transformers.Trainer:
    """The yardstick."""
    return transformers.Trainer(model=model, args=args, train_dataset=rows, data_collator=collate)


def hftl_trainer(model, args, rows, collate) -> transformers.Trainer:
    """The same through hftl: everything trained, in one stage."""
    from hftl.methods import METHODS
    from hftl.trainer import TransferTrainer

    plan = METHODS["full"](model)
    return TransferTrainer(
        model=plan.model, args=args, stage=plan.stages[0], train_dataset=rows, data_collator=collate, loss=None
    )


def image_work(data_root: str | None, count: int) -> tuple[torch.nn.Module, Rows, object]:
    """EfficientNet-Lite0 at 224 px, all trained. Weights are drawn at random: a step takes as long with any."""
    from PIL import Image
    from torchvision.transforms import v2

    if data_root:
        files = sorted(p for p in Path(data_root).glob("*/*") if p.suffix.lower() in {".jpg", ".jpeg", ".png"})
        random.Random(0).shuffle(files)
        names = sorted({p.parent.name for p in files})
        pairs = [(Image.open(p).convert("RGB"), names.index(p.parent.name)) for p in files[:count]]
    else:
        from sklearn.datasets import load_digits

        digits = load_digits()
        names, pixels = digits.target_names, (digits.images * 15.9).astype("uint8")[:count]
        pairs = [(Image.fromarray(x).convert("RGB"), int(y)) for x, y in zip(pixels, digits.target, strict=False)]
    size = v2.Compose([v2.ToImage(), v2.Resize((224, 224)), v2.ToDtype(torch.float32, scale=True)])
    rows = [{"pixel_values": size(image), "labels": label} for image, label in pairs]
    config = transformers.TimmWrapperConfig(architecture="tf_efficientnet_lite0", num_labels=len(names))
    model = transformers.AutoModelForImageClassification.from_config(config)
    return model, rows, transformers.default_data_collator


def text_work(data_root: str | None, count: int) -> tuple[torch.nn.Module, Rows, object]:
    """A BERT of six layers (384 wide, as MiniLM), padded dynamically, all trained; a token is a hash of a word."""
    if data_root:
        with open(data_root, encoding="utf-8", newline="") as file:
            table = list(csv.DictReader(file))
        pairs = [(row["text"], row["label"]) for row in random.Random(0).sample(table, min(count, len(table)))]
    else:  # as long as sentences are; what they mean does not change how long a step takes
        draw = random.Random(0)
        pairs = [(" word" * min(60, 4 + int(draw.expovariate(1 / 18))), str(draw.randrange(2))) for _ in range(count)]
    names = sorted({label for _, label in pairs})
    rows = []
    for text, label in pairs:
        ids = [101, *(1000 + sum(word.encode()) % 20000 for word in text.split()[:126]), 102]
        rows.append({"input_ids": ids, "attention_mask": [1] * len(ids), "labels": names.index(label)})
    config = transformers.BertConfig(
        hidden_size=384, num_hidden_layers=6, num_attention_heads=12, intermediate_size=1536, num_labels=len(names)
    )

    def collate(batch: Rows) -> dict[str, torch.Tensor]:
        width = -(-max(len(row["input_ids"]) for row in batch) // 8) * 8
        padded = {k: [row[k] + [0] * (width - len(row[k])) for row in batch] for k in ("input_ids", "attention_mask")}
        return {k: torch.tensor(v) for k, v in {**padded, "labels": [row["labels"] for row in batch]}.items()}

    return transformers.AutoModelForSequenceClassification.from_config(config), rows, collate


def run_once(build, model, rows, collate, options, folder: str) -> list[float]:
    """Train a copy of the model; the seconds of each counted step."""
    args = transformers.TrainingArguments(
        output_dir=folder,
        per_device_train_batch_size=options.batch_size,
        max_steps=options.warmup + options.steps,
        learning_rate=1e-5,
        seed=0,
        bf16=options.bf16,
        use_cpu=not torch.cuda.is_available(),
        remove_unused_columns=False,
        report_to="none",
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
    )
    trainer = build(copy.deepcopy(model), args, rows, collate)
    clock = StepClock(options.warmup)
    trainer.add_callback(clock)
    trainer.train()
    return clock.seconds()


def compare(task: str, options) -> dict:
    """Let both sides take turns on one task; the figures."""
    transformers.set_seed(0)
    work = image_work if task == "image" else text_work
    model, rows, collate = work(options.data_root, options.batch_size * (options.warmup + options.steps))
    sides = {"bare": bare_trainer, "hftl": bare_trainer if options.against_itself else hftl_trainer}
    seconds: dict[str, list[list[float]]] = {name: [] for name in sides}
    with tempfile.TemporaryDirectory() as folder:
        for repeat in range(options.repeats):
            for name in sorted(sides, reverse=bool(repeat % 2)):
                seconds[name].append(run_once(sides[name], model, rows, collate, options, folder))
    flat = {name: [s for one in repeats for s in one] for name, repeats in seconds.items()}
    # Step i has the same batch on both sides; their median shrugs off a step that something else slowed.
    ratios = [
        statistics.median(h / b for h, b in zip(hftl, bare, strict=True))
        for hftl, bare in zip(seconds["hftl"], seconds["bare"], strict=True)
    ]
    sides_of = {k: {"median_s": statistics.median(v), "min_s": min(v), "steps": len(v)} for k, v in flat.items()}
    return {**sides_of, "ratio": statistics.median(ratios), "ratio_low": min(ratios), "ratio_high": max(ratios)}


def describe() -> dict:
    """The machine, the versions, the date and the commit."""
    cpuinfo = Path("/proc/cpuinfo")
    text = cpuinfo.read_text() if cpuinfo.exists() else ""
    cpu = next(
        (x.split(":", 1)[1].strip() for x in text.splitlines() if x.startswith("model name")), platform.processor()
    )
    gpu = torch.cuda.get_device_name(0) if torch.cuda.is_available() else None
    git = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True)
    versions = {p: importlib.metadata.version(p) for p in ("torch", "transformers", "accelerate", "timm", "peft")}
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
    parser.add_argument("--data-root", help="own data: a folder of class folders, or a CSV file")
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
    transformers.logging.set_verbosity_error()
    results = {}
    other = "bare again" if options.against_itself else "hftl"
    print(f"{'task':<7}{'side':<12}{'median s':>10}{'min s':>10}   ratio (lowest to highest of {options.repeats})")
    for task in ("image", "text") if options.task == "both" else (options.task,):
        r = results[task] = compare(task, options)
        print(f"{task:<7}{'bare':<12}{r['bare']['median_s']:>10.4f}{r['bare']['min_s']:>10.4f}   1")
        spread = f"{r['ratio']:.3f} ({r['ratio_low']:.3f} to {r['ratio_high']:.3f})"
        print(f"{task:<7}{other:<12}{r['hftl']['median_s']:>10.4f}{r['hftl']['min_s']:>10.4f}   {spread}", flush=True)
    settings = {k: v for k, v in vars(options).items() if k != "output"}
    settings["data_root"] = Path(options.data_root).name if options.data_root else None
    record = {**describe(), "settings": settings, "step": results}
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    print(f"written: {options.output}")


if __name__ == "__main__":
    main()
