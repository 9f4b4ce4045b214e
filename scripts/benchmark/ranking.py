"""How well the measures of `hftl rank` foretell the accuracy after fine-tuning: Kendall's tau over models and sizes."""

from __future__ import annotations

import argparse
import csv
import subprocess
import sys
from pathlib import Path
from typing import Any

from benchmark import report
from benchmark.jobs import Runner, job

#: what is ranked, and fine-tuned
CANDIDATES = [f"builtin:efficientnet_lite{size}@{side}" for size in (0, 1, 2) for side in (64, 96, 128)]
#: of the columns of `hftl rank`, those that rank; none looks at more than the training rows
MEASURES = {
    "logme": "LogME",
    "h_score": "H-score",
    "transrate": "TransRate",
    "leep": "LEEP",
    "nce": "NCE",
    "probe": "probe",
}


def run(options: argparse.Namespace, dataset: str, flags: list[str], runner: Runner, content: dict[str, Any]) -> int:
    """Rank, fine-tune every candidate with the defaults of `full`, and write `ranking.md` and `ranking.json`.

    Args:
        options: `output`.
        dataset: as `--dataset`; `flags` go with it.
        runner: of the trainings.
        content: what stands above the results.
    """
    table = runner.work / "ranking.csv"
    table.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "hftl", "rank", "--task", "image-classification", "--dataset", dataset]
    environment = runner.environment(runner.home, 1)
    subprocess.run([*command, "--output", str(table), *flags, "--models", *CANDIDATES], env=environment, check=True)
    rows: list[dict[str, Any]] = list(csv.DictReader(table.read_text(encoding="utf-8").splitlines()))
    for row in rows:
        model, _, side = row["model"].rpartition("@")
        argv = ["train", "image-classification", f"--model={model}", f"--image_size={side}", f"--dataset={dataset}"]
        argv += [*flags, "--method=full", "--output_dir={output}", "--report_to=none"]
        figures = runner.run(job(row["model"], "hftl", argv=argv, run="{output}"))
        row["accuracy"], row["seconds"] = figures["accuracy"], figures["seconds"]
        print(f"{row['model']}: {row['accuracy']:.4f} in {row['seconds']:.0f} s", flush=True)
    content |= {"dataset": Path(dataset).name, "candidates": rows, "tau": kendall(rows)}
    report.write_pair(options.output, "ranking", content, as_markdown(content))
    print(f"written to {options.output / 'ranking.md'} and ranking.json")
    return 0


def kendall(rows: list[dict[str, Any]]) -> dict[str, float]:
    """Kendall's tau-b of every measure that all candidates have, with the accuracy."""
    from scipy.stats import kendalltau

    return {
        name: float(kendalltau([float(row[name]) for row in rows], [row["accuracy"] for row in rows]).statistic)
        for name in MEASURES
        if all(row[name] for row in rows)
    }


def as_markdown(content: dict[str, Any]) -> str:
    """The candidates, the most accurate first, and the taus."""
    rows = sorted(content["candidates"], key=lambda row: -row["accuracy"])
    machine = content["machine"]
    where = f"{content['date']}, commit {content['commit']}, {machine['cpu']}, {machine['cores']} cores"
    what = (
        f"`{content['settings']['command']}`: test accuracy on {content['dataset']} after `--method full` with every "
        "setting at its default (one run each), and what `hftl rank` says of the training rows."
    )
    lines = ["# Ranking", "", where, "", what]
    names = list(content["tau"])
    lines += ["", "| model | accuracy | seconds | " + " | ".join(MEASURES[name] for name in names) + " |"]
    lines += ["| --- |" + " --- |" * (len(names) + 2)]
    for row in rows:
        cells = [f"{float(row[name]):.4g}" for name in names]
        lines.append(f"| {row['model']} | {row['accuracy']:.4f} | {row['seconds']:.0f} | " + " | ".join(cells) + " |")
    lines.append("| Kendall's tau | | | " + " | ".join(f"{content['tau'][name]:.2f}" for name in names) + " |")
    return "\n".join(lines) + "\n"
