"""Rows on their way through a finished model: which go together, and what is prepared meanwhile."""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np

from hftl import compute, machine
from hftl.errors import UsageError
from hftl.inert import visible, without_home

#: rows at once on an accelerator
_ROWS = 32
#: on a CPU activations should stay in its caches: EfficientNet-Lite0 takes 11 ms of one core an image by 8, 14 by 32
_IMAGES_ON_CPU = 8
#: … and MiniLM 8.8 ms a text by 512 tokens (padded), 10.5 by 2,048, 13.2 by 4,096
_TOKENS_ON_CPU = 512
#: in half precision, for whose matrices processors have units of their own, 2.1 ms a text by 512, 1.4 by 2,048
_TOKENS_IN_HALF = 2048
#: batches that are prepared while one is computed
_AHEAD = 2


def groups(
    lengths: Sequence[int] | None, rows: int, batch_size: int | None, on_cpu: bool, half: bool = False
) -> list[list[int]]:
    """Row numbers, each once, in the groups that go through the model together.

    Args:
        lengths: tokens of each row, or None where all rows are of one size. Rows of like length come together, the
            longest first, so that what does not fit the memory fails at once.
        rows: how many there are.
        batch_size: rows a group; None chooses by what was measured, see the constants of this file.
        on_cpu: whether the model runs there.
        half: whether it computes in half precision.
    """
    if lengths is None:
        size = batch_size or (_IMAGES_ON_CPU if on_cpu else _ROWS)
        return [list(range(start, min(start + size, rows))) for start in range(0, rows, size)]
    order = longest_first(lengths).tolist()
    result: list[list[int]] = []
    start = 0
    tokens = _TOKENS_IN_HALF if half else _TOKENS_ON_CPU
    while start < rows:
        size = batch_size or (max(1, tokens // max(1, lengths[order[start]])) if on_cpu else _ROWS)
        result.append(order[start : start + size])
        start += size
    return result


def longest_first(lengths: Sequence[int]) -> np.ndarray[Any, Any]:
    """Numbers of rows by falling length: what does not fit the memory fails at once."""
    return np.argsort(-np.asarray(lengths), kind="stable")


def decoding_threads(rows: Any) -> int:
    """Threads that decode: on the cores that are left; one for pictures in memory, of which two may be the same."""
    value = next((value for name, value in rows[0].items() if name not in ("id", "label")), None) if len(rows) else None
    if not isinstance(value, str | bytes | dict):
        return 1
    return max(1, min(4, machine.cores() // compute.local_processes() - 1))


def prepared(
    dataset: Any, chosen: list[list[int]], threads: int, skip_bad_files: bool
) -> Iterator[tuple[list[int], list[dict[str, Any]]]]:
    """The groups with their examples; those to come are read and decoded while one is computed.

    In threads: decoding and resizing leave Python's lock alone, and nothing has to be copied between processes.

    Args:
        dataset: gives an example for a row number.
        chosen: row numbers, as `groups` gives them.
        threads: how many read; 0 reads in this thread, when it is asked.
        skip_bad_files: name a row that cannot be read on stderr and leave it out, instead of stopping.

    Raises:
        UsageError: a row cannot be read.
    """
    if threads == 0:
        yield from ((group, [dataset[index] for index in group]) for group in chosen)
        return
    waiting: deque[tuple[list[int], list[Future[Any]]]] = deque()
    with ThreadPoolExecutor(threads) as pool:
        try:
            for group in chosen:
                waiting.append((group, [pool.submit(dataset.__getitem__, index) for index in group]))
                if len(waiting) > _AHEAD:
                    yield _finished(*waiting.popleft(), skip_bad_files)
            while waiting:
                yield _finished(*waiting.popleft(), skip_bad_files)
        finally:
            pool.shutdown(cancel_futures=True)


def _finished(
    group: list[int], examples: list[Future[Any]], skip_bad_files: bool
) -> tuple[list[int], list[dict[str, Any]]]:
    kept, read = [], []
    for index, example in zip(group, examples, strict=True):
        try:
            read.append(example.result())
        except UsageError as error:
            if not skip_bad_files:
                raise
            print(visible(without_home(f"left out: {error}")), file=sys.stderr, flush=True)
            continue
        kept.append(index)
    return kept, read
