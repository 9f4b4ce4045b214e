"""Time and memory by number of rows, processes and state of the cache, as a picture and as JSON."""

from __future__ import annotations

import importlib.util
import json
import statistics
from pathlib import Path
from typing import Any

from benchmark.comparisons import Setting, hftl_train
from benchmark.jobs import Job, Runner

FACTORS = (1, 2, 4, 8)


def drawing_is_possible() -> bool:
    """Whether matplotlib is installed."""
    return importlib.util.find_spec("matplotlib") is not None


def scaling_jobs(setting: Setting, task: str) -> dict[str, dict[int, Job]]:
    """Line of the picture → training rows → job; eight times the least are all rows."""
    with (setting.data / f"{task}s" / "train.csv").open(encoding="utf-8", newline="") as file:
        least = max(8, (sum(1 for _ in file) - 1) // FACTORS[-1])
    lines: dict[str, dict[int, Job]] = {}
    for factor in FACTORS[:2] if setting.options.quick else FACTORS:
        rows = least * factor
        part = f"--max_train_samples={rows}"
        full = ["--method=full", "--num_train_epochs=1", part]
        for processes in (1, 2):
            name = f"full, {processes} process{'es' * (processes > 1)}"
            lines.setdefault(name, {})[rows] = hftl_train(setting, name, task, *full, processes=processes)
        frozen = ["--method=frozen", part]
        cold = hftl_train(setting, "frozen, cache cold", task, *frozen)
        warm = hftl_train(setting, "frozen, cache warm", task, *frozen, "--seed=7", before=cold)
        lines.setdefault(cold.name, {})[rows] = cold
        lines.setdefault(warm.name, {})[rows] = warm
    return lines


def measure(setting: Setting, runner: Runner, task: str) -> dict[str, Any]:
    """Rows, seconds (process start to the saved model) and memory (of the largest process) of every line."""
    lines = scaling_jobs(setting, task)
    runs: dict[Job, list[dict[str, Any]]] = {}
    jobs = [job for line in lines.values() for job in line.values()]
    for repeat in range(setting.options.repeats):
        for wanted in jobs[:: -1 if repeat % 2 else 1]:
            figures = runner.run(wanted)
            runs.setdefault(wanted, []).append(figures)
            print(f"{task}, repeat {repeat + 1}: {wanted.name}: {figures['seconds']:.1f} s", flush=True)
    return {
        name: [
            {
                "rows": rows,
                "seconds": min(run["seconds"] for run in runs[wanted]),
                "seconds_median": statistics.median(run["seconds"] for run in runs[wanted]),
                "memory_mb": max(run["memory_mb"] for run in runs[wanted]),
            }
            for rows, wanted in line.items()
        ]
        for name, line in lines.items()
    }


def draw(path: Path, tasks: dict[str, dict[str, Any]]) -> None:
    """Seconds on the left, memory on the right, a row of panels a task."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(len(tasks), 2, figsize=(11, 4 * len(tasks)), squeeze=False)
    for row, (task, lines) in zip(panels, tasks.items(), strict=True):
        for panel, key, label in zip(row, ("seconds", "memory_mb"), ("seconds, whole process", "MB"), strict=True):
            for name, points in lines.items():
                panel.plot([p["rows"] for p in points], [p[key] for p in points], marker="o", label=name)
            panel.set(xlabel=f"training rows ({task})", ylabel=label, xticks=[p["rows"] for p in points])
            panel.set_ylim(bottom=0)
            panel.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def write(folder: Path, content: dict[str, Any]) -> None:
    """`scaling.json` and `scaling.png`."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "scaling.json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    draw(folder / "scaling.png", content["results"])
