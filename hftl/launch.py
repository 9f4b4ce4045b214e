"""How a command ends: one clear line and an exit code, never a traceback for what the person can mend."""

from __future__ import annotations

import contextlib
import gc
import importlib.abc
import importlib.machinery
import importlib.util
import io
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

from hftl.errors import UsageError
from hftl.inert import visible, without_home

#: when hftl was first imported: in a command of its own, when the process began
_imported = time.time()
#: whether this process is a command of hftl's own, rather than somebody's notebook
_is_command = False


class _Lazily(importlib.abc.MetaPathFinder):
    """Reads bitsandbytes when it is first used: PEFT imports it for weights in 8 bits alone, and it takes a second."""

    def find_spec(self, fullname: str, path: Any, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        """Where it is, with a loader that waits; nothing of other modules."""
        spec = importlib.machinery.PathFinder.find_spec(fullname, path) if fullname == "bitsandbytes" else None
        if spec is not None and spec.loader is not None:
            spec.loader = importlib.util.LazyLoader(spec.loader)
        return spec


@contextlib.contextmanager
def quick_imports() -> Iterator[None]:
    """Import without the cyclic garbage collector, which finds nothing there and walks over everything meanwhile.

    torch and transformers make many objects that stay. In a command of hftl's own they are also taken out of later
    collections (Trainer asks for one before it trains); somebody else's process may have garbage of its own among them.
    Both together: 3.2 instead of 4.1 seconds to the first step of MiniLM (least of 3, one thread).
    """
    collects, lazily = gc.isenabled(), _Lazily()
    gc.disable()
    sys.meta_path.insert(0, lazily)
    try:
        yield
    finally:
        sys.meta_path.remove(lazily)
        if _is_command:
            gc.freeze()
        if collects:
            gc.enable()


def started() -> float:
    """When the work of this process began, as `time.time()` counts: in somebody's notebook, now."""
    return _imported if _is_command else time.time()


class _Terminated(BaseException):
    """SIGTERM, where nothing was begun that could be gone on with."""


def _stop(number: int, frame: Any) -> NoReturn:
    raise _Terminated


#: how gloo says that a process at the other end has ended
_PEER_IS_GONE = ("Connection closed by peer", "Connection reset by peer")


def launch(main: Callable[..., Any], *arguments: Any) -> None:
    """Run a command's `main`; on bad input print one error line and exit with 2, on a signal with 130 or 143."""
    global _is_command
    _is_command = True
    for stream in (sys.stdout, sys.stderr):  # a terminal of another encoding shows ? for what it does not have
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    # A training has its own way to stop, and gives the signal back after it.
    previous = signal.signal(signal.SIGTERM, _stop)
    try:
        main(*arguments)
    except UsageError as error:
        _end(f"error: {_in_one_line(str(error))}", 2)
    except _Terminated:
        _end("Stopped by SIGTERM.", 143)
    except KeyboardInterrupt:
        _end("Stopped by Ctrl-C.", 130)
    except BrokenPipeError:  # `hftl ls | head`: the reader has what it wanted, and a training has not been done
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(128 + signal.SIGPIPE)
    except RuntimeError as error:
        if not any(sign in str(error) for sign in _PEER_IS_GONE):
            raise
        print("Another process of this run has ended: see what it said, if it could.", file=sys.stderr, flush=True)
        os._exit(1)  # leaving the group in order would wait for the other
    except BaseException as error:
        # Compared by name: importing the class would cost `hftl --help` the import of torch.
        if type(error).__name__ != "Interrupted":
            raise
        _end(
            f"Stopped by {error}. Go on with the same command and --resume (instead of --overwrite).",
            128 + error.number,  # type: ignore[attr-defined]
            shared=True,
        )
    else:
        _leave_group()
    finally:
        _is_command = False
        signal.signal(signal.SIGTERM, previous or signal.SIG_DFL)


def _in_one_line(text: str) -> str:
    """File names may have line breaks, what a terminal obeys, and what is half a character."""
    shown = visible(without_home(text).replace("\n", "\\n"))
    return shown.encode("utf-8", "backslashreplace").decode("utf-8")


def _end(message: str, code: int, shared: bool = False) -> None:
    """Print the message once: other processes give the first one time to say the same, and are then ended with it.

    Args:
        message: one line.
        code: of the exit.
        shared: whether all processes end with it, so that the first one says it for all.
    """
    is_first = int(os.environ.get("RANK", "0")) == 0
    if not is_first:
        signal.signal(signal.SIGTERM, lambda *_: os._exit(code))  # the launcher's, once the first one has ended
        time.sleep(3)
    if is_first or not shared:
        print(message, file=sys.stderr, flush=True)
    _leave_group()
    if sys.stdout is not None:  # `>&-`
        sys.stdout.flush()
    sys.exit(code)


def _leave_group() -> None:
    """Leave the process group, or torch complains at exit."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
