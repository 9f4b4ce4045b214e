"""hftl's commands as processes of their own, forked from one that has the imports behind it: seconds less for each.

What an import itself does (its time, the environment variables that it reads) is not seen this way: `test_start.py`,
`test_hub.py` and the processes that `accelerate launch` starts begin from nothing.
"""

from __future__ import annotations

import atexit
import multiprocessing
import os
import resource
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CONFIG = ROOT / "accelerate_configs" / "cpu_2_processes.yaml"
#: begins a real `accelerate launch` on two processes
LAUNCH = ["accelerate.commands.launch", "--config_file", str(CONFIG)]
Done = subprocess.CompletedProcess[str]

_server = multiprocessing.get_context("forkserver")
_server.set_forkserver_preload(
    ["hftl.fitting", "sklearn.metrics", "hftl.card", "hftl.probes.logistic", "timm", "peft", "accelerate"]
)


class Command:
    """A command that runs.

    Attributes:
        process: its process, which leads a group of its own.
    """

    def __init__(self, words: list[str], folder: Path, *, most: int | None = None, **environment: str) -> None:
        """Start it.

        Args:
            words: of `hftl`; or a script, or a module, and its flags.
            folder: to work in.
            most: bytes beyond which no file may grow.
            environment: variables to set.
        """
        settings = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **environment}
        self.words, self.place = words, tempfile.TemporaryDirectory()
        self.streams = [Path(self.place.name) / name for name in ("output", "error")]
        self.process = _server.Process(target=_become, args=(words, folder, settings, self.streams, most))
        self.process.start()

    def wait(self, timeout: float = 240) -> Done:
        """What it printed and how it ended; nothing of it runs on."""
        self.process.join(timeout)
        if self.process.exitcode is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            raise subprocess.TimeoutExpired(self.words, timeout)
        output, error = (stream.read_text(encoding="utf-8") for stream in self.streams)
        self.place.cleanup()
        return Done(self.words, self.process.exitcode, output, error)


def run_command(words: list[str], folder: Path, *, most: int | None = None, **environment: str) -> Done:
    """Run a command to its end, see `Command`."""
    return Command(words, folder, most=most, **environment).wait()


def run_ranks(words: list[str], folder: Path, **environment: str) -> list[Done]:
    """Two processes that know each other, as a launcher starts them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    common |= {"ACCELERATE_USE_CPU": "true", **environment}
    ranks = [Command(words, folder, RANK=rank, LOCAL_RANK=rank, **common) for rank in "01"]
    return [rank.wait() for rank in ranks]


def _become(words: list[str], folder: Path, environment: dict[str, str], streams: list[Path], most: int | None) -> None:
    """Leave what belongs to the process that this one was forked from, and be the command."""
    multiprocessing.set_start_method("fork", force=True)  # for data workers: the system's, not this process's own
    os.setsid()
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    for number, stream in enumerate(streams, start=1):
        os.dup2(os.open(stream, os.O_WRONLY | os.O_CREAT), number)
    if most is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))
    try:
        if words[0].endswith(".py"):
            sys.argv = words
            sys.path.insert(0, str(Path(words[0]).parent))
            runpy.run_path(words[0], run_name="__main__")
        else:
            module = "hftl" if words[0] != LAUNCH[0] else words.pop(0)
            sys.argv = [module, *words]
            runpy.run_module(module, run_name="__main__", alter_sys=True)
    finally:
        atexit._run_exitfuncs()
