"""Predictions as a CSV file that grows beside its place: from any number of rows, in any number of processes."""

from __future__ import annotations

import contextlib
import csv
import itertools
import os
import shutil
import signal
import sys
import tempfile
import threading
from collections import Counter
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from hftl.errors import UsageError
from hftl.folder import explained_disk_errors, is_main_process, read_json, replacing, say, write_json
from hftl.inert import as_cell

if TYPE_CHECKING:
    from hftl.run import Run

#: how long a process waits for the slowest; one that ends is noticed at once
_LONGEST_WAIT = timedelta(days=7)


def write_predictions(run: Run, inputs: Any, output: Path | None, **settings: Any) -> None:
    """Predict and write rows as they come, with the columns of a run's predictions.csv but the label.

    The file stands beside its place until it is whole; what an interruption leaves is removed. Several processes (those
    of `accelerate launch`) share out the rows, and one file with all of them in order comes out.

    Args:
        run: the finished run.
        inputs: as `Run.predict`.
        output: the file; None prints the rows.
        settings: as `Run.predict_batches`.

    Raises:
        UsageError: an input cannot be read, the file cannot be written, or another process has failed.
    """
    rank, processes = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    if processes > 1 and output is None:
        raise UsageError("--output is missing: several processes cannot print one table.")
    pieces = run.predict_batches(inputs, share=(rank, processes), **settings)
    if output is None:
        first = next(pieces, [])  # where it cannot be read nothing is printed
        _write_rows(run, itertools.chain([first], pieces), sys.stdout, header=True)
    else:
        with _ended_by_sigterm(), explained_disk_errors(output.parent):
            if processes > 1:
                count = _write_shared(run, pieces, output)
            else:
                with replacing(output) as beside, beside.open("w", encoding="utf-8", newline="") as file:
                    count = sum(_write_rows(run, pieces, file, header=True)[1])
        say(f"{count:,} predictions written to {output}")
    if is_main_process():
        remarks = [f"{run.cut:,} texts were longer than the model reads and were cut"] if run.cut else []
        remarks += [f"rows without {what}, answered by the rest: {count:,}" for what, count in (+run.missing).items()]
        print("".join(f"{line}\n" for line in remarks), end="", file=sys.stderr)


def _write_rows(run: Run, pieces: Iterator[list[Any]], file: IO[str], header: bool) -> tuple[list[int], list[int]]:
    """Write pieces as they come; the bytes (of a file on disk) and the rows of each."""
    writer = csv.writer(file, lineterminator="\n")
    if header:
        columns = run.task.problem.answer_columns(run.label_names)
        writer.writerow(["id", *map(as_cell, columns)])
        file.flush()
    sizes, rows, before = [], [], 0
    for piece in pieces:
        for entry in piece:
            said, *numbers = entry.cells()
            writer.writerow([as_cell(entry.id), as_cell(said), *numbers])
        file.flush()  # so that one can watch it grow
        end = os.fstat(file.fileno()).st_size if file is not sys.stdout else 0
        sizes.append(end - before)
        rows.append(len(piece))
        before = end
    return sizes, rows


def _write_shared(run: Run, pieces: Iterator[list[Any]], output: Path) -> int:
    """Write this process's pieces into a folder made for this command alone; the main process joins them in turn."""
    import torch

    distributed = torch.distributed
    if not distributed.is_initialized():
        distributed.init_process_group("gloo", timeout=_LONGEST_WAIT)
    rank, processes = distributed.get_rank(), distributed.get_world_size()
    folder = Path(tempfile.mkdtemp(prefix=f".{output.name}.", dir=output.parent)) if rank == 0 else None
    try:
        # A folder with a new name: what a killed command may have left is never taken for a part of this one.
        name: list[Any] = [None if folder is None else folder.name]
        _together(distributed.broadcast_object_list, name)
        place = output.parent / name[0]
        with (place / f"{rank}.csv").open("w", encoding="utf-8", newline="") as file:
            sizes, rows = _write_rows(run, pieces, file, header=False)
        write_json(place / f"{rank}.json", {"sizes": sizes, "rows": rows, "cut": run.cut, "missing": run.missing})
        _together(distributed.barrier)
        count = 0
        if rank == 0:
            with replacing(output) as beside:
                count = _join(run, place, processes, beside)
        _together(distributed.barrier)
        return count
    finally:
        if folder is not None:
            shutil.rmtree(folder, ignore_errors=True)


def _together(call: Any, *arguments: Any) -> None:
    """Do something that needs all processes.

    Raises:
        UsageError: one of them has ended.
    """
    try:
        call(*arguments)
    except RuntimeError as error:
        raise UsageError("Another process of this command has ended; its message says why.") from error


def _join(run: Run, folder: Path, processes: int, beside: Path) -> int:
    """One file of the parts, a piece from each process in turn; the number of rows."""
    parts = [read_json(folder / f"{rank}.json") for rank in range(processes)]
    with contextlib.ExitStack() as stack:
        files = [stack.enter_context((folder / f"{rank}.csv").open("rb")) for rank in range(processes)]
        with beside.open("w", encoding="utf-8", newline="") as table:
            _write_rows(run, iter(()), table, header=True)
        target = stack.enter_context(beside.open("ab"))
        for turn in range(max(len(part["sizes"]) for part in parts)):
            for part, file in zip(parts, files, strict=True):
                if turn < len(part["sizes"]):
                    target.write(file.read(part["sizes"][turn]))
    run.cut = sum(part["cut"] for part in parts)
    run.missing = sum((Counter(part["missing"]) for part in parts), Counter())
    return sum(sum(part["rows"]) for part in parts)


@contextlib.contextmanager
def _ended_by_sigterm() -> Iterator[None]:
    """Let SIGTERM end the command the way Ctrl-C does, so that what it has begun is removed."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
