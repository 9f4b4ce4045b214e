"""The run folder: who may write into it, and how it is never half-written."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import re
import shutil
import threading
import time
import uuid
from collections.abc import Callable, Container, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from hftl.errors import DiskError, UsageError
from hftl.inert import visible, without_home
from hftl.yaml_files import read_yaml

if TYPE_CHECKING:
    from hftl.arguments import TransferArguments

RECIPE = "recipe.yaml"
METRICS = "metrics.json"
PREDICTIONS = "predictions.csv"
CHECKPOINTS = "checkpoints"
LOGS = "logs"
#: beside the weights at the end of a stage: what was trained and how it went
STAGE_RECORD = "stage.json"
#: in the logs: rows of each class and split, and what was noticed
FOUND_IN_DATA = "data.json"
#: where the files of a run stand until all of them are there
PARTIAL = ".partial"
#: where a finished run stands until the one that replaces it is whole
REPLACED = ".replaced"
#: seconds after which data workers of a killed process have noticed its death, and hold its folder no longer
_ORPHANS = 15.0
#: seconds
A_DAY = 86_400
#: folders that this process writes into, with the descriptor that holds the lock
_held: dict[Path, int] = {}
#: settings that may differ between an interrupted run and the command that goes on with it
_FREE_ON_RESUME = {
    "keep_checkpoints",
    "logging_steps",
    "per_device_eval_batch_size",
    "hub_model_id",
    "hub_strategy",
    "image_cache_gb",
}
#: where an interrupted run keeps what `--precision auto` chose, which the run that goes on must not choose anew
CHOSEN_PRECISION = "chosen_precision"
#: the same of `--learning_rate auto`
FOUND_RATE = "found_learning_rate"
#: and which rows it was
DATA = "data"


def is_main_process() -> bool:
    """Whether this process is the one that writes and talks."""
    return int(os.environ.get("RANK", "0")) == 0


def scored_split(splits: Container[str]) -> str:
    """The split that the final scores are of: test, where there is one."""
    return "test" if "test" in splits else "validation"


def say(message: str = "") -> None:
    """Print one message, once for all processes."""
    if is_main_process():
        # With its end in one piece: trainings side by side print into one place.
        print(f"{visible(without_home(message))}\n", end="", flush=True)


def repository_of(arguments: TransferArguments) -> str:
    """Where a run goes on the Hub: by default, under the name of its folder."""
    return arguments.hub_model_id or Path(str(arguments.output_dir)).resolve().name


def default_output_dir(arguments: TransferArguments) -> str:
    """`runs/DATASET-MODEL-METHOD`, from the last part of each name."""
    parts = (arguments.dataset_name, arguments.model_name_or_path, arguments.method)
    names = [re.split(r"[/\\:]", str(part).rstrip("/\\"))[-1] for part in parts]
    if set(names[0]) <= {"."}:  # this folder, or one above it
        names[0] = Path(str(arguments.dataset_name)).resolve().name
    names[0] = re.sub(r"\.(csv|tsv|jsonl?|parquet)$", "", names[0])
    return os.path.join("runs", re.sub(r"[^\w.-]+", "_", "-".join(names)))


def check_output_folder(arguments: TransferArguments) -> None:
    """Choose the folder where none was named, and refuse one that this run must not touch. Nothing is written.

    Raises:
        UsageError: the folder holds another run, or there is nothing to resume, or the settings differ.
    """
    if arguments.output_dir is None:
        arguments.output_dir = default_output_dir(arguments)
    folder = Path(arguments.output_dir)
    existing = nearest_existing(folder)
    if os.path.islink(folder) and not os.path.exists(folder):
        raise UsageError(f"--output_dir {str(folder)!r} is a link to what is not there: name another folder.")
    if not existing.is_dir():
        raise UsageError(f"--output_dir {str(folder)!r}: {str(existing)!r} is a file: name another folder.")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise UsageError(f"--output_dir {str(folder)!r}: writing into {str(existing)!r} is not allowed.")
    try:
        interrupted = (folder / CHECKPOINTS / RECIPE).is_file()
    except OSError as error:
        raise UsageError(f"--output_dir {str(folder)!r}: {error.strerror}: name another folder.") from error
    if arguments.resume:
        if not interrupted:
            if (folder / METRICS).is_file():
                raise UsageError(
                    f"Nothing to resume: {str(folder)!r} holds a finished run. --overwrite in place of --resume trains "
                    "it anew."
                )
            raise UsageError(
                f"Nothing to resume: {str(folder)!r} holds no interrupted run. Leave out --resume to start one."
            )
        _check_same_settings(folder / CHECKPOINTS / RECIPE, arguments)
    elif folder.exists() and any(folder.iterdir()):
        if not interrupted and not (folder / RECIPE).is_file() and not any(folder.glob(f"{REPLACED}*")):
            raise UsageError(f"--output_dir {str(folder)!r} is not empty and holds no run: name another folder.")
        if arguments.overwrite:
            _check_replaced(folder, arguments)
            return
        advice = "--resume goes on with it, " if interrupted else ""
        kind = "an interrupted run" if interrupted else "a run"
        raise UsageError(
            f"--output_dir {str(folder)!r} holds {kind}: {advice}--overwrite replaces it, or name another folder."
        )


def _check_replaced(folder: Path, arguments: TransferArguments) -> None:
    """Refuse to remove a folder that holds more than a run.

    Raises:
        UsageError: the data, the model or the working folder are in it.
    """
    named = {"--dataset": arguments.dataset_name, "--model": arguments.model_name_or_path, "this folder": "."}
    for what, name in named.items():
        if name and os.path.exists(name) and Path(name).resolve().is_relative_to(folder.resolve()):
            raise UsageError(
                f"--overwrite would remove {str(folder)!r} with {what} in it: name another folder with --output_dir."
            )


def nearest_existing(path: Path) -> Path:
    """The path itself, or the nearest folder above it that is there."""
    return next(place for place in (path, *path.absolute().parents) if os.path.exists(place))


def _check_same_settings(path: Path, arguments: TransferArguments) -> None:
    before = read_yaml(path)
    now = json.loads(json.dumps(resume_settings(arguments)))
    changed = [
        f"{name} was {_shown(before.get(name))}, is {_shown(now.get(name))}"
        for name in sorted((set(before) | set(now)) - _FREE_ON_RESUME - {CHOSEN_PRECISION, FOUND_RATE, DATA})
        if before.get(name) != now.get(name)
    ]
    if changed:
        raise UsageError(
            f"--resume needs the settings of the interrupted run: {'; '.join(changed)}. Use those, or start anew with "
            "--overwrite."
        )


def resume_settings(arguments: TransferArguments) -> dict[str, Any]:
    """What must be the same when a run goes on: the recipe as asked for, and the processes that share out the rows."""
    from hftl.arguments import to_recipe  # who only reads runs does without transformers

    wish = {"learning_rate": "auto"} if arguments.finds_learning_rate else {}
    return {**to_recipe(arguments), **wish, "processes": arguments.world_size}


def settings_with_data(arguments: TransferArguments, fingerprint: str) -> dict[str, Any]:
    """`resume_settings`, and which rows they are for.

    Raises:
        UsageError: an interrupted run that is to go on began with other rows.
    """
    path = Path(str(arguments.output_dir), CHECKPOINTS, RECIPE)
    if arguments.resume and path.is_file() and read_yaml(path).get(DATA) != fingerprint:
        raise UsageError(
            f"--resume: the data are not those of the interrupted run in {str(arguments.output_dir)!r}: rows or labels "
            "have changed. Put them back, or start anew with --overwrite."
        )
    return {**resume_settings(arguments), DATA: fingerprint}


def _shown(value: Any) -> str:
    return "not given" if value is None else repr(value)


def start_folder(arguments: TransferArguments, settings: dict[str, Any]) -> None:
    """Make the folder of a run that starts; a finished run that it replaces is kept aside until this one is whole.

    Args:
        arguments: the resolved arguments.
        settings: what `settings_with_data` gave before they were resolved, for `--resume` to compare with.

    Raises:
        UsageError: another process is training into it.
    """
    folder = Path(str(arguments.output_dir))
    folder.mkdir(parents=True, exist_ok=True)
    hold(folder, _ORPHANS if arguments.resume else 0.0)
    if arguments.overwrite:
        _set_aside(folder)
    shutil.rmtree(folder / PARTIAL, ignore_errors=True)
    try:
        (folder / CHECKPOINTS).mkdir(exist_ok=True)
        (folder / LOGS).mkdir(exist_ok=True)
        write_text(folder / CHECKPOINTS / RECIPE, yaml.safe_dump(settings, sort_keys=False, allow_unicode=True))
    except OSError:
        discard_start(folder)
        raise


def remember(folder: Path, name: str, value: Any) -> None:
    """Keep what a run has found on its way, for the run that goes on with it."""
    settings = {**read_yaml(folder / CHECKPOINTS / RECIPE), name: value}
    write_text(folder / CHECKPOINTS / RECIPE, yaml.safe_dump(settings, sort_keys=False, allow_unicode=True))


def hold(folder: Path, patience: float = 0.0) -> None:
    """Keep other processes out until `release`; the lock is on the folder itself and goes with the process.

    Args:
        folder: which is there.
        patience: seconds to wait for another process.

    Raises:
        UsageError: another process holds it.
    """
    place, until = folder.resolve(), time.monotonic() + patience
    if place in _held:
        return
    descriptor = os.open(place, os.O_RDONLY)
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except BlockingIOError:
            if time.monotonic() >= until:
                os.close(descriptor)
                raise UsageError(
                    f"--output_dir {str(folder)!r}: another process is training into it. Wait for it, or name another "
                    "folder."
                ) from None
        time.sleep(0.2)
    _held[place] = descriptor


def release(folder: Path) -> None:
    """Let other processes in again."""
    descriptor = _held.pop(folder.resolve(), None)
    if descriptor is not None:
        fcntl.flock(descriptor, fcntl.LOCK_UN)  # also for data workers, which have a copy of the descriptor
        os.close(descriptor)


def _set_aside(folder: Path) -> None:
    """Take everything out of the way: a finished run is kept, one that was interrupted is removed."""
    aside, beside = folder / REPLACED, folder / f"{REPLACED}.partial"
    if (folder / METRICS).is_file() or beside.is_dir():  # or a kill in the midst of this
        shutil.rmtree(aside, ignore_errors=True)
        beside.mkdir(exist_ok=True)
        for path in [path for path in folder.iterdir() if path != beside]:
            os.replace(path, beside / path.name)
        os.replace(beside, aside)
    empty(folder, but=aside)


def empty(folder: Path, but: Path | None = None) -> None:
    """Remove everything in a folder, but one thing perhaps; the folder itself stays, and who holds it."""
    for path in [path for path in folder.iterdir() if path != but]:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


def _took_no_steps(checkpoint: Path) -> bool:
    """Whether a checkpoint is the end of a stage in which nothing was trained step by step."""
    record = checkpoint / STAGE_RECORD
    return record.is_file() and "learning_rate" not in read_json(record)


def discard_start(folder: Path) -> None:
    """Remove what a run that failed has begun, unless there is a checkpoint or an earlier stage to go on from.

    A head that was solved is none: its features are kept elsewhere, and solving takes seconds. A finished run that it
    was to replace comes back.
    """
    if is_main_process() and all(map(_took_no_steps, (folder / CHECKPOINTS).glob("*/*"))):
        shutil.rmtree(folder / CHECKPOINTS, ignore_errors=True)
        shutil.rmtree(folder / LOGS, ignore_errors=True)
        if (folder / REPLACED).is_dir():
            _move_all(folder / REPLACED, folder)
        release(folder)
        with contextlib.suppress(OSError):  # not empty, or not there
            folder.rmdir()


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A path beside `path` to write to; it is renamed to it at the end, so that a file is whole or not there."""
    beside = path.with_name(f".{path.name}.{uuid.uuid4().hex}")  # several threads and processes may write one file
    try:
        yield beside
        os.replace(beside, path)
    finally:
        with contextlib.suppress(OSError):  # what keeps it from being written may keep it from being removed
            beside.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a text file whole or not at all."""
    with replacing(path) as beside:
        beside.write_text(text, encoding="utf-8")


def write_json(path: Path, content: Any) -> None:
    """Write a JSON file whole or not at all."""
    write_text(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def read_json(path: Path) -> Any:
    """What a JSON file holds.

    Raises:
        ValueError: it is no JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def kept(path: Path) -> dict[str, Any] | None:
    """What a JSON file of the cache holds by key; None where it is damaged."""
    try:
        return dict(read_json(path))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, TypeError):
        return None


def keep(path: Path, key: str, value: Any) -> Any:
    """Keep a value in a JSON file of the cache, where that can be written; the value."""
    content = kept(path)
    if content is None:
        say(f"{str(path)!r} is damaged and is made again")
    try:
        write_json(path, {**(content or {}), key: value})
    except (OSError, UnicodeEncodeError) as error:  # a full disk, the folder was removed, or a name is half a character
        reason = getattr(error, "strerror", None) or "a name in it is not UTF-8"
        say(f"{str(path)!r} cannot be kept ({reason}): it is found again next time")
    return value


def remembered(path: Path, key: str, find: Callable[[], Any]) -> Any:
    """What a JSON file of the cache has under a key; found, and kept there, where it has nothing."""
    known = kept(path) or {}
    return known[key] if key in known else keep(path, key, find())


def publish(folder: Path) -> None:
    """Move what stands in the partial folder into the run; the metrics, which mark a finished run, come last."""
    _move_all(folder / PARTIAL, folder)
    shutil.rmtree(folder / REPLACED, ignore_errors=True)


def _move_all(source: Path, folder: Path) -> None:
    for path in sorted(source.iterdir(), key=lambda path: path.name == METRICS):
        target = folder / path.name
        if target.is_dir():
            shutil.rmtree(target)
        os.replace(path, target)
    source.rmdir()


def promote(place: Path, folder: Path) -> None:
    """Put a copy of a finished run in the place of another, or of none."""
    partial = folder / PARTIAL
    shutil.rmtree(partial, ignore_errors=True)
    shutil.copytree(place, partial, ignore=shutil.ignore_patterns(CHECKPOINTS, PARTIAL))
    # What the other has and this one has not would be read with it: weights, adapters, a head beside the model.
    for path in (*folder.glob("*.safetensors*"), *(folder / name for name in ("adapter", "base", "probe"))):
        if path.is_dir() and not (partial / path.name).exists():
            shutil.rmtree(path)
        elif path.is_file() and not (partial / path.name).exists():
            path.unlink()
    publish(folder)


def finish(folder: Path, keep_checkpoints: bool = False) -> None:
    """Let a run count as finished: what it could be gone on with is no longer needed."""
    (folder / CHECKPOINTS / RECIPE).unlink()  # first: with it the run counts as interrupted
    if not keep_checkpoints:
        shutil.rmtree(folder / CHECKPOINTS)
    release(folder)


def discard_first(folder: Path, trainings: str) -> None:
    """Remove what the first of several trainings has begun, unless there is a checkpoint to go on from.

    Args:
        folder: of the run.
        trainings: name of the folder in it that holds one for each training.
    """
    if is_main_process() and not any((folder / trainings).glob(f"*/{CHECKPOINTS}/*/*")):
        shutil.rmtree(folder / trainings, ignore_errors=True)
        discard_start(folder)


def is_complete_checkpoint(path: Path) -> bool:
    """Whether Trainer finished writing a checkpoint: the state, which it writes last, is whole."""
    try:
        read_json(path / "trainer_state.json")
    except (FileNotFoundError, NotADirectoryError, ValueError):  # any other error says nothing about the checkpoint
        return False
    return True


def last_checkpoint(folder: Path) -> Path | None:
    """The newest whole checkpoint of a stage; torn ones (a kill while writing) are removed."""
    whole = []
    for path in folder.glob("checkpoint-*"):
        if is_complete_checkpoint(path):
            whole.append(path)
        else:
            shutil.rmtree(path, ignore_errors=True)  # another process may be removing it too
    return max(whole, key=lambda path: int(path.name.rpartition("-")[2]), default=None)


def folder_bytes(folder: Path) -> int:
    """What the files below a folder take; or a file."""
    total = folder.stat().st_size if folder.is_file() else 0
    for place, _, names in os.walk(folder):  # which passes over folders that are removed meanwhile
        for name in names:
            with contextlib.suppress(FileNotFoundError):
                total += Path(place, name).stat().st_size
    return total


def mark_as_used(path: Path) -> None:
    """Put off the day on which a kept file is removed; one of somebody else stays as it is."""
    with contextlib.suppress(OSError):
        os.utime(path)


def tidy(folder: Path) -> int:
    """Remove files that nobody used for 30 days, and what a killed process left half-written a day ago.

    Returns:
        bytes of what stays.
    """
    total = 0
    for place, _, names in os.walk(folder):
        for name in names:
            path = Path(place, name)
            with contextlib.suppress(OSError):  # gone meanwhile; or of somebody else, and stays
                state = path.stat()
                total += state.st_size
                if time.time() - state.st_mtime > (A_DAY if name.startswith(".") else 30 * A_DAY):
                    path.unlink()
                    total -= state.st_size
    return total


def check_space(folder: Path, needed: int) -> None:
    """Refuse a run whose files would not fit.

    Raises:
        UsageError: less than `needed` bytes are free on the disk of `folder`.
    """
    free = _free_space(folder)
    if free < needed:
        raise DiskError(
            f"No space for the run in {str(folder)!r}: its checkpoints and model need about {needed / 1e6:,.0f} MB and "
            f"{free / 1e6:,.0f} MB are free. Free some space, or name a folder on another disk with --output_dir."
        )


def has_space(folder: Path, needed: int) -> bool:
    """Whether so many bytes are free on the disk of a folder for a run in it."""
    return _free_space(folder) >= needed


def _free_space(folder: Path) -> int:
    """Bytes for a run in a folder, with those of its checkpoints that are there already."""
    goes = folder.is_dir() and not (folder / METRICS).is_file()  # a finished run stays until another is whole
    written = folder_bytes(folder / CHECKPOINTS) if goes else 0
    return shutil.disk_usage(nearest_existing(folder)).free + written


_DISK_ERRORS = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the quota is used up",
    errno.EFBIG: "a file may not grow so large",
    errno.EROFS: "the disk is read-only",
    errno.EACCES: "writing there is not allowed",
    errno.EISDIR: "there is a folder in the place of a file",
    errno.ENOTDIR: "there is a file in the place of a folder",
    errno.EEXIST: "something of that name is there",
}


_OTHERWISE = {
    **{_DISK_ERRORS[number]: "Allow it, or name another folder" for number in (errno.EROFS, errno.EACCES)},
    **{_DISK_ERRORS[number]: "Move it away" for number in (errno.EISDIR, errno.ENOTDIR, errno.EEXIST)},
}

#: torch's zip writer only says that it wrote less than it wanted, or stands elsewhere
_TORCH_ERRORS = ("PytorchStreamWriter failed writing", "unexpected pos")


@contextlib.contextmanager
def explained_disk_errors(folder: Path) -> Iterator[None]:
    """Turn a failed write, whichever library met it, into one clear error."""
    hook = threading.excepthook
    # The writer thread of TensorBoard would print a traceback, and its error comes up again in the main thread.
    threading.excepthook = lambda failed: None if disk_error(failed.exc_value) else hook(failed)
    try:
        yield
    except UsageError:
        raise
    except Exception as error:
        reason = disk_error(error)
        if reason is None:
            raise
        resume = " with --resume added" if (folder / CHECKPOINTS / RECIPE).is_file() else ""
        advice = _OTHERWISE.get(reason, "Make room")
        raise DiskError(
            f"Cannot write to {str(folder)!r}: {reason}. {advice}, then repeat the command{resume}."
        ) from error
    finally:
        threading.excepthook = hook


def disk_error(error: BaseException | None) -> str | None:
    """What a disk error means, None for another; safetensors and torch report it in the text of one of their own."""
    if isinstance(error, OSError) and error.errno in _DISK_ERRORS:
        return _DISK_ERRORS[error.errno]
    for number, reason in _DISK_ERRORS.items():
        if os.strerror(number) in str(error):
            return reason
    return "the disk is full" if any(text in str(error) for text in _TORCH_ERRORS) else None


def check_not_data(output: str | os.PathLike[str] | None, dataset: str | None) -> None:
    """Refuse to write over a file of the data.

    Raises:
        UsageError: as said.
    """
    if output is None or dataset is None or not os.path.exists(output):
        return
    dataset = os.path.expanduser(dataset)
    if any(Path(place(output)).is_relative_to(place(dataset)) for place in (os.path.abspath, os.path.realpath)):
        raise UsageError(f"--output {str(output)!r} is a part of the data: name another file.")
