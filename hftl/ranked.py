"""What `hftl rank` says of models, and what it said before: while nothing has changed, no model is read again.

Imports neither torch nor transformers: that takes longer than all the rest where the answer is known.
"""

from __future__ import annotations

import contextlib
import dataclasses
import glob
import hashlib
import json
import math
import os
import platform
import re
import shlex
import sys
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hftl import folder
from hftl.builtin import cache_folder
from hftl.errors import UsageError
from hftl.folder import read_json, say
from hftl.tables import aligned, as_csv

#: scores that models can be ranked by
MEASURES = ("logme", "probe", "h_score", "transrate", "leep", "nce")
#: a model that is so many times as fast is worth naming
_FASTER = 1.25
#: beside the shards of a model's features: what was said of it
ANSWERS = "ranked.json"
#: settings from outside the command line: of hftl, the Hugging Face libraries, torch, its threads and its devices
_ENVIRONMENT = re.compile("HFTL_|HF_|TRANSFORMERS_|WORLD_SIZE|TORCH|PYTHONPATH|CUDA_|HIP_|OMP_|MKL_|KMP_|GOMP_")


@dataclass(frozen=True)
class Candidate:
    """A model and its scores; LEEP and NCE are None where it has no trained head of its own.

    Attributes:
        rank: from 1.
        model: as it was named.
        logme: see `hftl.transferability`, as the next ones.
        parameters: of the backbone and the fresh head.
        features_per_second: rows through the model, in the precision that suits it here.
        flags: which name it to `hftl train`.
    """

    rank: int
    model: str
    logme: float
    h_score: float
    transrate: float
    leep: float | None
    nce: float | None
    probe: float
    parameters: int
    features_per_second: float
    flags: list[str]


@dataclass(frozen=True)
class Answer:
    """What is kept of a model.

    Attributes:
        candidate: its scores.
        rows: that they are of.
        report: the lines that tell of the data.
    """

    candidate: Candidate
    rows: int
    report: list[str]


def identify(task_name: str, models: Sequence[str], tokens: Sequence[str]) -> dict[str, str]:
    """For each model a name for all that an answer about it depends on.

    That is the flags; the size and the times of change of every file that they name or that lies in a folder they name,
    as Git knows its files; hftl's own files; the versions of what is installed; settings in the environment; and the
    machine, for its speed. Not what a name on the Hub stands for, nor files that a table or a configuration names:
    answers about these are not to be kept.

    Args:
        task_name: as for `--task`.
        models: as `--models` names them, perhaps with `@SIDE`.
        tokens: the other flags.
    """
    packages = {name for place in sys.path if os.path.isdir(place) for name in os.listdir(place)}
    shared = [
        [task_name, *tokens, os.getcwd()],
        [_state(token.partition("=")[2] or token) for token in tokens],
        _state(os.path.dirname(__file__)),
        [sys.version, *sorted(name for name in packages if name.endswith(".dist-info"))],
        sorted(item for item in os.environ.items() if _ENVIRONMENT.match(item[0])),
        [platform.node(), sorted(_cores()), sorted(glob.glob("/dev/nvidia[0-9]*")), os.path.exists("/dev/kfd")],
    ]
    known = {model: [model, _state(model), _state(re.sub(r"@\d+$", "", model)), shared] for model in models}
    return {
        model: hashlib.blake2b(json.dumps(parts).encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()
        for model, parts in known.items()
    }


def _state(name: str) -> list[Any]:
    """Of a file, or of each in a folder: its path, size, time of change, and time at which even that was set."""
    place, files = os.path.expanduser(name), []
    for above, folders, names in os.walk(place):
        if any(os.path.islink(os.path.join(above, entry)) for entry in folders):
            return [uuid.uuid4().hex]  # what lies behind such a link may change: never the same
        folders[:] = sorted(entry for entry in folders if entry != "__pycache__")
        files += [os.path.join(above, entry) for entry in sorted(names)]
    found: list[Any] = []
    for path in files or [place]:
        with contextlib.suppress(OSError, ValueError):  # no file, or a link to nowhere
            status = os.stat(path)
            found.append([path, status.st_size, status.st_mtime_ns, status.st_ctime_ns])
    return found


def _cores() -> set[int]:
    """That this process may use."""
    return os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set(range(os.cpu_count() or 1))


def answers(identities: Mapping[str, str]) -> dict[str, Answer]:
    """Of the models those that were ranked before, with what was found, where nothing has changed since then."""
    known: dict[str, tuple[Path, Any]] = {}
    for path in cache_folder().glob(f"features/*/{ANSWERS}"):
        known |= {identity: (path, entry) for identity, entry in read_kept(path).items()}
    found = {}
    for model, identity in identities.items():
        if identity in known:
            path, entry = known[identity]
            folder.mark_as_used(path)
            found[model] = Answer(Candidate(**entry["candidate"]), entry["rows"], entry["report"])
    return found


def recalled(known: Sequence[Answer]) -> tuple[list[Candidate], int]:
    """Say what was found before of the data and the models; the models, and the rows that they were ranked on."""
    if not known:
        return [], 0
    for line in known[0].report:
        say(line)
    say(
        f"{len(known)} models ranked before on {known[0].rows:,} rows: their files, those of the data and the "
        "installed versions are the same"
    )
    return [answer.candidate for answer in known], known[0].rows


def read_kept(path: Path) -> dict[str, Any]:
    """What a JSON file of the cache has by key; nothing where it is not there or damaged."""
    try:
        return dict(read_json(path)) if path.is_file() else {}
    except (ValueError, TypeError):
        say(f"{str(path)!r} is damaged and is made again")
        return {}


def remembered(path: Path, key: str, find: Callable[[], Any]) -> Any:
    """What a JSON file of the cache has under a key; found, and kept there, where it has nothing."""
    known = read_kept(path)
    if key not in known:
        known[key] = find()
        try:
            folder.write_json(path, known)
        except OSError as error:  # a full disk, or the folder was removed meanwhile
            say(f"{str(path)!r} cannot be kept ({error.strerror}): it is found again next time")
    return known[key]


def in_order(candidates: Sequence[Candidate], by: str) -> list[Candidate]:
    """The models by a measure, the best first, with their ranks.

    Raises:
        UsageError: by LEEP or NCE, where a model has no trained head.
    """
    without = [entry.model for entry in candidates if getattr(entry, by) is None]
    if without:
        raise UsageError(f"--by {by}: {without[0]} has no trained head of its own. Use another measure, such as logme.")
    ordered = sorted(candidates, key=lambda entry: -getattr(entry, by))
    return [dataclasses.replace(entry, rank=number) for number, entry in enumerate(ordered, start=1)]


_COLUMNS = {
    "rank": "rank", "model": "model", "logme": "LogME", "h_score": "H-score", "transrate": "TransRate", "leep": "LEEP",
    "nce": "NCE", "probe": "probe", "parameters": "parameters", "features_per_second": "features/s",
}  # fmt: skip


def table(candidates: Sequence[Candidate]) -> str:
    """The models, one a line."""
    lines = [list(_COLUMNS.values()), *([_shown(getattr(entry, name)) for name in _COLUMNS] for entry in candidates)]
    return "\n".join(aligned(lines, left=[1]))


def _shown(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.1f}" if abs(value) >= 10 else f"{value:.4f}"
    return "-" if value is None else f"{value:,}" if isinstance(value, int) else str(value)


def csv_of(candidates: Sequence[Candidate]) -> str:
    """The same table with all digits, as CSV."""
    return as_csv([list(_COLUMNS), *([getattr(entry, name) for name in _COLUMNS] for entry in candidates)])


def recommendation(candidates: Sequence[Candidate], rows: int, by: str, task_name: str, tokens: Sequence[str]) -> str:
    """Which model to take, why, and the faster ones that are as good as far as the rows can tell."""
    best = candidates[0]
    error = math.sqrt(best.probe * (1 - best.probe) / rows)
    reason = f"highest {_COLUMNS[by]}" + (
        "" if by == "probe" else f"; its probe is right on {best.probe:.4f} of the rows"
    )
    lines = [f"recommended: {best.model} ({reason})"]
    faster = [
        entry
        for entry in candidates[1:]
        if entry.probe >= best.probe - error and entry.features_per_second >= _FASTER * best.features_per_second
    ]
    for entry in sorted(faster, key=lambda entry: -entry.features_per_second)[:1]:
        times = entry.features_per_second / best.features_per_second
        lines.append(
            f"in a hurry: {entry.model} ({times:.1f} times the speed, its probe {entry.probe:.4f} is not worse by more "
            f"than the standard error of {error:.4f})"
        )
    if by != "probe" and max(entry.probe for entry in candidates) > best.probe + error:
        top = max(candidates, key=lambda entry: entry.probe)
        lines.append(f"but: the probe prefers {top.model} ({top.probe:.4f}): try both")
    flags = shlex.join([*best.flags, *tokens])
    lines.append(f"next: hftl train {task_name} {flags}, or hftl advise with the same")
    return "\n".join(lines)


def show(
    candidates: Sequence[Candidate], rows: int, by: str, task_name: str, tokens: Sequence[str], output: str | None
) -> None:
    """Print the table and the recommendation, and write the file that was asked for."""
    ranked = in_order(candidates, by)
    say(f"\n{table(ranked)}\n\n{recommendation(ranked, rows, by, task_name, tokens)}")
    if output is not None:
        folder.write_text(Path(output), csv_of(ranked))
