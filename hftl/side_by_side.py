"""Work side by side on the cores of a CPU: copies of this process, a thread each.

A step of a small model on a few rows is too short to share: two threads take 0.7 to 0.8 of the time of one for it
(MiniLM, 16 movie reviews), so that two trainings with a thread each are done in that part of the time that they take
one after the other.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

#: of prctl: the signal that a process gets when the one that began it ends
_PR_SET_PDEATHSIG = 1
#: seconds that a process has to leave a checkpoint when it is asked to end, and between two looks at it
_TO_END, _BETWEEN_LOOKS = 10.0, 0.05

_is_copy = False


def is_copy() -> bool:
    """Whether this process is one that another began for work beside it."""
    return _is_copy


def most_at_once() -> int:
    """How many copies of this process may compute: one for each of its threads, where it can be copied.

    Linux alone copies a process that has threads; libraries of accelerators do not survive it, and of those for CPUs
    just a single thread does (https://pytorch.org/docs/stable/notes/multiprocessing.html). Handlers of signals, and
    with them an orderly end, belong to the main thread.
    """
    in_main = threading.current_thread() is threading.main_thread()
    copies = sys.platform == "linux" and in_main and not torch.accelerator.is_available()
    return torch.get_num_threads() if copies else 1


class SideBySide:
    """Processes beside this one; each does one piece of work, as this process stands when it begins.

    What they change they change for themselves: files are what they leave. They end when this process does.
    """

    def __init__(self) -> None:
        """None yet."""
        self._processes: dict[int, int] = {}

    def begin(self, key: int, work: Callable[[], None]) -> None:
        """Do the work in a copy of this process; an error in it is printed there, and its exit code is 1.

        Args:
            key: a number for it.
            work: what to do.
        """
        for stream in filter(None, (sys.stdout, sys.stderr)):
            stream.flush()
        parent = os.getpid()
        process = os.fork()
        if process:
            self._processes[key] = process
            return
        code = 1
        try:
            _become_copy(parent)
            work()
            code = 0
        except SystemExit as end:
            code = int(end.code or 0)
        except BaseException:
            # Raised further it would be handled as the first process' own, which would remove files that this one still
            # writes to. It is told instead: here the error, there the exit code.
            traceback.print_exc()
        finally:
            os._exit(code)  # nor may anything else come back into what this process was a copy of

    def wait(self, until: float = float("inf")) -> dict[int, int]:
        """Wait for all; exit codes by their keys, of those that a signal ended its negative number.

        Args:
            until: when those that still work are killed, as `time.time()` counts.
        """
        codes = {}
        while self._processes:
            for key, process in list(self._processes.items()):
                if time.time() > until:
                    os.kill(process, signal.SIGKILL)
                ended, status = os.waitpid(process, os.WNOHANG)
                if ended:
                    codes[key] = os.waitstatus_to_exitcode(status)
                    del self._processes[key]
            if self._processes:
                time.sleep(_BETWEEN_LOOKS)
        return codes

    def end(self) -> None:
        """Ask those that have not been waited for to end, and kill what does not."""
        for process in self._processes.values():
            os.kill(process, signal.SIGTERM)
        self.wait(time.time() + _TO_END)


def _become_copy(parent: int) -> None:
    """End when the parent does, and where memory is wanting before it."""
    global _is_copy
    _is_copy = True
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it ended before it could be watched
        raise SystemExit(1)
    Path("/proc/self/oom_score_adj").write_text("1000")


@contextlib.contextmanager
def side_by_side(count: int) -> Iterator[SideBySide]:
    """One thread for this process while others compute beside it, which end with the block at the latest.

    Args:
        count: processes that will compute, with this one; 1 leaves the threads as they are.
    """
    threads = torch.get_num_threads()
    others = SideBySide()
    torch.set_num_threads(1 if count > 1 else threads)
    try:
        yield others
    finally:
        others.end()
        torch.set_num_threads(threads)
