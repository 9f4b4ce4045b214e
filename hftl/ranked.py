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
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hftl import folder, machine
from hftl.builtin import builtin_task, cache_folder
from hftl.errors import UsageError
from hftl.folder import say
from hftl.suffixes import AUDIO_SUFFIXES, IMAGE_SUFFIXES, TABLE_SUFFIXES, VIDEO_SUFFIXES, is_stray
from hftl.tables import aligned, as_csv
from hftl.tasks import TASKS

#: scores that models can be ranked by
MEASURES = ("logme", "probe", "h_score", "transrate", "leep", "nce")
#: a model that is so many times as fast is worth naming
_FASTER = 1.25
#: beside the shards of a model's features: what was said of it
ANSWERS = "ranked.json"
#: flags that name files which are read
_DATA, _WEIGHTS = ("dataset", "dataset_name"), ("weights", "text_model")
#: models and data that hftl brings, or makes by its seeds
_OWN = ("builtin:", "random:")
#: tasks whose tables hold all that is read
_TEXTS = ("text-classification", "token-classification", "multiple-choice")
_TASK_OF_SUFFIX = {
    **dict.fromkeys(IMAGE_SUFFIXES, "image-classification"),
    **dict.fromkeys(AUDIO_SUFFIXES, "audio-classification"),
    **dict.fromkeys(VIDEO_SUFFIXES, "video-classification"),
}
#: variables of the environment that change what is read, computed, or how fast
_ENVIRONMENT = re.compile(
    "HFTL_|HF_|TRANSFORMERS_|ACCELERATE_|(PY)?TORCH|PYTHONPATH|WORLD_SIZE|CUDA_|NVIDIA_|HIP_|ROCR_|OMP_|MKL_|KMP_|GOMP_|"
    "ONEDNN_|DNNL_|ATEN_|OPENBLAS_|TIMM_|LD_|MALLOC_|GLIBC_"
)


@dataclass(frozen=True)
class Candidate:
    """A model and its scores; LEEP and NCE are None where it has no trained head of its own.

    Attributes:
        rank: from 1; 0 where it is not ranked yet.
        model: as it was named.
        logme: see `hftl.transferability`, as the next ones.
        parameters: of the backbone and the fresh head.
        features_per_second: rows through the model, in the precision that suits it here.
        flags: which name it to `hftl train`.
        rows: that it was scored on.
        chance: the part of them that is in the largest class.
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
    rows: int
    chance: float


def task_of_data(name: str | None) -> str:
    """The task that data are for, as far as the names of their files say it.

    Raises:
        UsageError: they do not, or there are none.
    """
    if name is None:
        raise UsageError("--dataset is missing: name a folder, a table, a Hub id or builtin:NAME.")
    place = os.path.expanduser(name)
    task = builtin_task(name.removeprefix("builtin:")) if name.startswith("builtin:") else _task_of_files(place)
    if task is None:
        why = "the names of its files do not tell it" if os.path.exists(place) else "there is no such file or folder"
        raise UsageError(f"--task is missing, and of --dataset {name[:200]!r} {why}: name one of {', '.join(TASKS)}.")
    say(f"task: {task} (--task names another)")
    return task


def dataset_of(tokens: Sequence[str]) -> str | None:
    """What `--dataset` names, of several the last one."""
    named = [value for flag, values in _values(tokens).items() if flag in _DATA for value in values]
    return named[-1] if named else None


def _task_of_files(place: str) -> str | None:
    """The task of the first picture, recording or video of a folder; where there are tables alone that of texts."""
    task = None
    for path in _files(place):
        suffix = os.path.splitext(path)[1].lower()
        if suffix in _TASK_OF_SUFFIX:
            return _TASK_OF_SUFFIX[suffix]
        task = task or ("text-classification" if suffix in TABLE_SUFFIXES else None)
    return task


def _files(place: str) -> Iterator[str]:
    """The files of a folder, in an order that does not depend on the disk, without hidden ones; of a file itself."""
    if not os.path.isdir(place):
        yield place
    for above, folders, names in os.walk(place):
        folders[:] = sorted(entry for entry in folders if not is_stray(entry))
        yield from (os.path.join(above, entry) for entry in sorted(names) if not is_stray(entry))


def identify(task_name: str, models: Sequence[str], tokens: Sequence[str]) -> dict[str, str]:
    """For each model a name for all that its scores, rows and speed depend on.

    That is the flags; where each file of the model and of the data is, with its number, size and times of change, as
    Git knows its files; hftl's own files; the versions of what is installed; settings in the environment; the machine.

    Args:
        task_name: as for `--task`.
        models: as `--models` names them, perhaps with `@SIDE`.
        tokens: the other flags.

    Returns:
        From a model to its name; without those that rest on more than that: on what a name on the Hub stands for, on
        files that a table or a configuration names, on code of others, on what links to folders lead to.
    """
    flags = _values(tokens)
    others = [value for name, values in flags.items() if name not in (*_DATA, *_WEIGHTS) for value in values]
    if {"config", "trust_remote_code"} & set(flags) or any(":" in value for value in others):
        return {}
    is_text = task_name in _TEXTS
    states = {model: _model_state(model if is_text else re.sub(r"@\d+$", "", model)) for model in models}
    states = {model: state for model, state in states.items() if state is not None}
    if not states:
        return {}
    inputs = [_state(value, tables=is_text) for name in _DATA for value in flags.get(name, ())]
    inputs += [_state(value) for name in _WEIGHTS for value in flags.get(name, ())]
    inputs.append(_state(os.path.dirname(__file__)))
    if None in inputs:
        return {}
    installed = [
        os.path.join(place, name) for place in sys.path for name in glob.glob("*.*-info", root_dir=place or ".")
    ]
    shared = [
        [task_name, *tokens, os.path.abspath("."), inputs],
        [sys.version, sorted(map(_stamp, installed))],
        sorted(item for item in os.environ.items() if _ENVIRONMENT.match(item[0])),
        [platform.node(), machine.processor(), machine.cores(), machine.accelerators()],
    ]
    digest = _digest(shared)
    return {model: _digest([model, state, digest]) for model, state in states.items()}


def _digest(content: list[Any]) -> str:
    return hashlib.blake2b(json.dumps(content).encode(), digest_size=16).hexdigest()


def _model_state(name: str) -> list[Any] | None:
    is_model = name.startswith(_OWN) or os.path.isfile(os.path.join(os.path.expanduser(name), "config.json"))
    return _state(name) if is_model else None


def _values(tokens: Sequence[str]) -> dict[str, list[str]]:
    """Of flags as they were typed: what stands behind each."""
    found: dict[str, list[str]] = {}
    name = ""
    for token in tokens:
        is_flag = token.startswith("--")
        name, assigned, value = token.partition("=") if is_flag else (name, "=", token)
        values = found.setdefault(name.lstrip("-").replace("-", "_"), [])
        values += [value] if assigned else []
    return found


def _state(name: str, tables: bool = True) -> list[Any] | None:
    """Of a file, or of each in a folder, what changes with it; None where that cannot be told.

    Args:
        name: of a file, a folder, or what hftl brings itself.
        tables: whether it may be a table, or have some at its top: not where these name other files.
    """
    endings = () if tables else tuple(TABLE_SUFFIXES)
    place = os.path.expanduser(name)
    if name.startswith(_OWN):
        return []
    if os.path.isfile(place):
        return None if place.lower().endswith(endings) else [_stamp(place)]
    found: list[Any] = []
    for above, folders, names in os.walk(place):
        folders[:] = sorted(entry for entry in folders if entry != "__pycache__")
        linked = any(os.path.islink(os.path.join(above, entry)) for entry in folders)
        if linked or (above == place and any(entry.lower().endswith(endings) for entry in names)):
            return None
        found += [above, *(_stamp(os.path.join(above, entry)) for entry in sorted(names))]
    return found or None


def _stamp(path: str) -> list[Any]:
    """What changes with a file."""
    try:
        status = os.stat(path)
    except OSError:  # a link to nowhere
        return [path]
    return [path, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns]


def known(identities: Mapping[str, str]) -> dict[str, Candidate]:
    """Of the models those that were ranked before, where nothing has changed since then."""
    answers: dict[str, tuple[Path, Any]] = {}
    for path in cache_folder().glob(f"features/*/{ANSWERS}"):
        answers |= {identity: (path, entry) for identity, entry in (folder.kept(path) or {}).items()}
    found = {}
    for model, identity in identities.items():
        if identity not in answers:
            continue
        path, entry = answers[identity]
        with contextlib.suppress(TypeError):  # what belongs to it is not there: it is ranked anew
            found[model] = Candidate(**entry)
            folder.mark_as_used(path.with_name("settings.json"))
    return found


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


def recommendation(candidates: Sequence[Candidate], by: str, task_name: str, tokens: Sequence[str]) -> str:
    """Which model to take, why, and the faster ones that are as good as far as the rows can tell."""
    best = candidates[0]
    error = math.sqrt(best.probe * (1 - best.probe) / best.rows)
    reason = f"highest {_COLUMNS[by]}" + (
        "" if by == "probe" else f"; its probe is right on {best.probe:.4f} of the rows"
    )
    lines = [f"recommended: {best.model} ({reason})"]
    if best.probe <= best.chance + error:
        lines.append(
            f"but: that is no better than always naming the largest class ({best.chance:.4f}): the rows do not show "
            "that the features of this model know these classes"
        )
    if by == "h_score" and best.h_score > 0.5 and math.isclose(best.h_score, round(best.h_score), abs_tol=1e-6):
        lines.append(
            "but: its features outnumber the rows: there H-score is one less than there are classes, and tells "
            "nothing: use another measure, such as logme"
        )
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
    flags = shlex.join([*tokens, *best.flags])  # of a flag that is named twice the last one holds
    lines.append(f"next: hftl train {task_name} {flags}, or hftl advise with the same")
    return "\n".join(lines)


def show(candidates: Sequence[Candidate], by: str, task_name: str, tokens: Sequence[str], output: str | None) -> None:
    """Print the table and the recommendation, and write the file that was asked for.

    Raises:
        UsageError: by LEEP or NCE where a model has no trained head.
    """
    ranked = in_order(candidates, by)
    say(f"\n{table(ranked)}\n\n{recommendation(ranked, by, task_name, tokens)}")
    if output is not None:
        folder.write_text(Path(output), csv_of(ranked))
