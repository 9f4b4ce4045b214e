"""The tables, and the files: what was measured, on which machine, with which versions, when and at which commit."""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import os
import platform
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmark.jobs import ROOT

HEADINGS = [
    "comparison", "who", "fastest", "median", "ratio", "lowest to highest", "at least", "met", "accuracy",
    "s a step", "rows/s", "memory MB", "precision",
]  # fmt: skip


def describe(gpu: str | None) -> dict[str, Any]:
    """The machine, the versions, the date and the commit; `gpu` is the card's name where one is used."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    cpu = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.processor())
    git = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True)
    names = ("torch", "torchvision", "transformers", "accelerate", "timm", "peft", "scikit-learn")
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "commit": git.stdout.strip() or None,
        "machine": {"cpu": cpu, "cores": os.cpu_count(), "threads": os.environ.get("OMP_NUM_THREADS"), "gpu": gpu},
        "versions": {"python": platform.python_version(), **{name: importlib.metadata.version(name) for name in names}},
    }


def table(results: dict[str, Any]) -> list[list[str]]:
    """The cells of the table, headings first."""
    rows = [HEADINGS]
    for name, result in results.items():
        unit = " MB" if result["measure"] == "memory_mb" else " s"
        rows.append([name, *_figures(result["hftl"], unit, ["", "", "", ""])])
        for index, peer in enumerate(result["peers"]):
            ratio = [f"{peer['ratio']:.2f}", f"{peer['ratio_low']:.2f} to {peer['ratio_high']:.2f}"]
            target = [f"{result['least']:.2f}", "yes" if result["met"] else "no"]
            target = target if index < result["targets"] else ["", ""]
            rows.append(["", *_figures(peer, unit, [*ratio, *target])])
    return rows


def _figures(side: dict[str, Any], unit: str, middle: list[str]) -> list[str]:
    def shown(key: str, form: str) -> str:
        return "" if side[key] is None else format(side[key], form)

    last = [shown("accuracy", ".4f"), shown("step_seconds", ".4f"), shown("examples_per_second", ".1f")]
    memory = side["gpu_memory_mb"] or side["memory_mb"]
    fastest, median = (
        f"{side[key]:,.1f}{unit}" if side[key] >= 10 else f"{side[key]:.4f}{unit}" for key in ("min", "median")
    )
    return [side["name"], fastest, median, *middle, *last, f"{memory:,.0f}", side["precision"] or ""]


def as_text(rows: list[list[str]]) -> str:
    """The table for a terminal."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )


def as_markdown(content: dict[str, Any]) -> str:
    """The table, what was checked beside it, what was left out, and how it was measured."""
    head, *rows = table(content["results"])
    machine, versions = content["machine"], content["versions"]
    lines = ["# Benchmark", ""]
    lines += [f"{machine['cpu']}, {machine['cores']} cores" + (f", {machine['gpu']}" if machine["gpu"] else "")]
    lines += ["", ", ".join(f"{name} {version}" for name, version in versions.items()), ""]
    settings = content["settings"]
    lines += [
        f"`python scripts/benchmark.py`, training rows of texts: {settings['rows']:,}: every run a process of its own, "
    ]
    lines[-1] += (
        "in turns. Ratio: time of the peer over that of hftl, of the fastest runs; beside it the repeats' own ratios."
    )
    lines += ["", "| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
    lines += ["| " + " | ".join(row) + " |" for row in rows]
    notes = [f"- {note}" for note in content["notes"]]
    lines += [""]
    for name, result in content["results"].items():
        checks = "".join(f"; {check['text']}" for check in result["checks"].values())
        made = result["made"]
        lines += [f"- {name}: {made['repeats']} repeats, {made['date'][:10]}, commit {made['commit']}{checks}"]
    lines += ["", "Left out or failed:", "", *notes] if notes else []
    return "\n".join(lines) + "\n"


def write(folder: Path, content: dict[str, Any], order: Sequence[str]) -> None:
    """`results.json` and `results.md`; comparisons that an earlier call made on such a machine stay in them.

    Args:
        folder: of the files.
        content: what `describe` gave, `settings`, `notes` and `results`.
        order: names of all comparisons.
    """
    path = folder / "results.json"
    earlier = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else content
    same = all(earlier[key] == content[key] for key in ("machine", "versions"))
    same = same and all(earlier["settings"][key] == content["settings"][key] for key in ("rows", "quick", "data"))
    made = {"date": content["date"], "commit": content["commit"]}
    results = {
        name: {**result, "made": {**made, "repeats": len(result["hftl"]["runs"])}}
        for name, result in content["results"].items()
    }
    results = {**(earlier["results"] if same else {}), **results}
    whole = {**content, "results": {name: results[name] for name in order if name in results}}
    write_pair(folder, "results", whole, as_markdown(whole))


def write_pair(folder: Path, name: str, content: dict[str, Any], page: str) -> None:
    """`NAME.json` with all that was measured, and `NAME.md` for people."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    (folder / f"{name}.md").write_text(page, encoding="utf-8")
