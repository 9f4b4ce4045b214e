"""How well the methods do: data sets x methods x seeds, test scores and seconds of the whole process.

A run that is in quality.json already is not done again, so that the table grows over several calls; remove the file
to start anew. Every run starts with nothing kept.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from pathlib import Path
from typing import Any

from benchmark import report
from benchmark.jobs import Job, JobError, Runner, job

IMAGE, TEXT = ("image", "builtin:efficientnet_lite0"), ("text", "builtin:minilm")
#: data set → task and model, and flags; the folder has its name. Small images (digits of 28 pixels, cells of 45 to 240)
#: stay small: at 224 pixels a training takes five to twelve times as long
DATA: dict[str, tuple[tuple[str, str], list[str]]] = {
    "dogs_cats": (IMAGE, []),
    "blood_cells": (IMAGE, ["--image_size=96"]),
    "mnist_small": (IMAGE, ["--image_size=64", "--horizontal_flip=false"]),
    "movie_snippets": (TEXT, ["--max_train_samples=2000"]),
    "sst2": (TEXT, ["--max_train_samples=2000"]),
    "trec": (TEXT, ["--label_column=label"]),
}
#: rows a class of the columns with few rows
SHOTS = 16
#: what is compared → its flags
VARIANTS: dict[str, list[str]] = {
    "full": ["--method=full"],
    "full, highest score": ["--method=full", "--early_stopping_patience=1000"],
    "full, last weights": ["--method=full", "--load_best_model_at_end=false"],
    "full, layer decay 0.9": ["--method=full", "--layer_decay=0.9"],
    "full, soup": ["--method=full", "--average=soup"],
    "full, soup of 3 runs": ["--method=full", "--soup_runs=3"],
    "lp_ft": ["--method=lp_ft"],
    "lp_ft, soup of 3 runs": ["--method=lp_ft", "--soup_runs=3"],
    "lp_ft, WiSE-FT": ["--method=lp_ft", "--wise_ft=true"],
    "frozen": ["--method=frozen"],
    "partial": ["--method=partial"],
    "lora": ["--method=lora"],
    "gradual": ["--method=gradual"],
    "setfit": ["--method=setfit"],
    "bitfit": ["--method=bitfit"],
    "norm": ["--method=norm"],
    "surgical": ["--method=surgical"],
    "full, L2-SP": ["--method=full", "--penalty=l2_sp"],
    "full, DELTA": ["--method=full", "--penalty=delta"],
    "full, BSS": ["--method=full", "--penalty=bss"],
    "full, R-Drop": ["--method=full", "--penalty=r_drop"],
    "full, EMA": ["--method=full", "--average=ema"],
    "full, SWA": ["--method=full", "--average=swa"],
    "auto, 60 s": ["--method=auto", "--time_budget=60s"],
    "auto, 200 s": ["--method=auto", "--time_budget=200s"],
}
Entry = dict[str, Any]


def columns(few: bool) -> list[str]:
    """Names of the columns: the data sets, and with `few` each with few rows too."""
    return [*DATA, *(f"{name}, {SHOTS} a class" for name in DATA if few)]


def quality_job(root: Path, column: str, variant: str, seed: int) -> Job:
    """One training."""
    name, _, few = column.partition(", ")
    (task, model), flags = DATA[name]
    shots = [f"--shots={SHOTS}"] if few else []
    flags = [flag for flag in flags if not (few and flag.startswith("--max_train_samples"))]
    argv = ["train", f"{task}-classification", f"--model={model}", f"--dataset={root / name}", *flags, *shots]
    argv += [*VARIANTS[variant], f"--seed={seed}", "--output_dir={output}", "--report_to=none"]
    return job(f"{column}, {variant}, seed {seed}", "hftl", argv=argv, run="{output}")


def run(options: argparse.Namespace, root: Path, runner: Runner, content: dict[str, Any]) -> int:
    """Every run that is not there yet; the files are written after each. 1 when one failed.

    Args:
        options: `columns`, `variants` and `seeds` that are wanted, and `output`.
        root: the folder of the data sets.
        runner: of the processes.
        content: what stands above the results.
    """
    path = options.output / "quality.json"
    entries: list[Entry] = json.loads(path.read_text(encoding="utf-8"))["runs"] if path.is_file() else []
    done = {(entry["column"], entry["variant"], entry["seed"]) for entry in entries}
    failed = 0
    for seed in range(options.seeds):
        for column in options.columns:
            for variant in options.variants:
                if (column, variant, seed) in done:
                    continue
                try:
                    figures = runner.run(quality_job(root, column, variant, seed))
                except JobError as error:
                    print(f"FAILED {error}", file=sys.stderr, flush=True)
                    failed = 1
                    continue
                kept = {key: figures[key] for key in ("accuracy", "f1_macro", "seconds")}
                where = {"column": column, "variant": variant, "seed": seed}
                entries.append(where | kept | {"commit": content["commit"], "date": content["date"]})
                print(f"{column}, {variant}, seed {seed}: {kept}", flush=True)
                grown = {**content, "runs": entries}
                report.write_pair(options.output, "quality", grown, as_markdown(grown))
    print(f"written to {options.output / 'quality.md'} and quality.json")
    return failed


def as_markdown(content: dict[str, Any]) -> str:
    """A row for each variant, a column for each data set: mean accuracy, its spread, and seconds."""
    runs: list[Entry] = content["runs"]
    names = [name for name in columns(few=True) if any(entry["column"] == name for entry in runs)]
    variants = [name for name in VARIANTS if any(entry["variant"] == name for entry in runs)]
    commits = ", ".join(sorted({str(entry["commit"]) for entry in runs}))
    machine = content["machine"]
    lines = ["# Quality", ""]
    lines += [f"{content['date']}, commits {commits}, {machine['cpu']}, {machine['cores']} cores", ""]
    lines += [
        "Test accuracy in points (for blood_cells macro F1), mean over the seeds and standard deviation; in brackets "
        "the number of seeds and the seconds of a whole process, median. Every setting at its default but those named; "
        "`builtin:efficientnet_lite0` for images, `builtin:minilm` for texts, 2,000 training rows of movie_snippets "
        "and sst2, images of blood_cells at 96 pixels and of mnist_small at 64."
    ]
    lines += ["", "| | " + " | ".join(names) + " | mean |", "| --- |" + " --- |" * (len(names) + 1)]
    for variant in variants:
        found = [[entry for entry in runs if (entry["column"], entry["variant"]) == (name, variant)] for name in names]
        means = [statistics.mean(map(score, entries)) for entries in found if entries]
        mean = f"{statistics.mean(means):.1f}" if len(means) == len(names) else ""
        lines.append(f"| {variant} | " + " | ".join(map(_cell, found)) + f" | {mean} |")
    lines += ["", *(f"- {note}" for note in content["notes"])] if content.get("notes") else []
    return "\n".join(lines) + "\n"


def score(entry: Entry) -> float:
    """In points: accuracy, or macro F1 where one class is eleven times as frequent as another."""
    return 100 * entry["f1_macro" if entry["column"].startswith("blood_cells") else "accuracy"]


def _cell(entries: list[Entry]) -> str:
    if not entries:
        return ""
    values = [score(entry) for entry in entries]
    spread = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
    seconds = statistics.median(entry["seconds"] for entry in entries)
    return f"{statistics.mean(values):.1f}{spread} ({len(values)}; {seconds:.0f} s)"
