"""Jobs: one subprocess each, timed from its start to its end, with the most memory that it held."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent.parent
CPU_CONFIG = ROOT / "accelerate_configs" / "cpu_2_processes.yaml"
#: hftl's own, of the first repeat
SEED = 42
GPU_CONFIG = ROOT / "accelerate_configs" / "multi_gpu.yaml"


class JobError(Exception):
    """A subprocess failed; the message ends with the last lines that it printed."""


@dataclass(frozen=True)
class Job:
    """What one subprocess does.

    Attributes:
        name: how tables call it.
        peer: a key of `benchmark.peers.PEERS`.
        settings: for the peer, as JSON (so that equal jobs are equal, and run once); `{output}` stands for the folder
            that it may write into, `{before}` for that of the job before, `{seed}` for a number of each repeat's own.
        before: a job that is done once, untimed; this one goes on with its `HFTL_HOME` (a warm cache) and may read its
            output. Without it each run starts with a home that holds the built-in weights and nothing else (cold).
        processes: more than one are started by `accelerate launch`.
        python: the interpreter; empty for the one that runs the benchmark.
    """

    name: str
    peer: str
    settings: str
    before: Job | None = None
    processes: int = 1
    python: str = ""


def job(name: str, peer: str, before: Job | None = None, processes: int = 1, python: str = "", **settings: Any) -> Job:
    """A job with its settings given by name."""
    return Job(name, peer, json.dumps(settings, sort_keys=True), before, processes, python)


@dataclass
class Runner:
    """Runs jobs in folders below `work`.

    Attributes:
        work: an empty folder on a disk with a few GB.
        home: an `HFTL_HOME` that holds the built-in weights and nothing else; copied, never written to.
        gpu: let the jobs see the GPUs; otherwise they are hidden from them.
    """

    work: Path
    home: Path
    gpu: bool = False
    done: dict[Job, Path] = field(default_factory=dict)
    count: int = 0

    def run(self, wanted: Job, repeat: int = 0) -> dict[str, Any]:
        """One timed run, the how manieth of its kind; its figures, see `figures`.

        Raises:
            JobError: the subprocess failed.
        """
        before = self._run_once(wanted.before) if wanted.before else None
        place = self._place()
        home = before / "home" if before else self._fresh_home(place)
        try:
            return self._start(wanted, place, home, before, SEED + repeat)
        finally:
            shutil.rmtree(place, ignore_errors=True)

    def _run_once(self, wanted: Job) -> Path:
        """The folder of a job that others go on from."""
        if wanted not in self.done:
            before = self._run_once(wanted.before) if wanted.before else None
            place = self._place()
            self._start(wanted, place, self._fresh_home(place), before)
            self.done[wanted] = place
        return self.done[wanted]

    def _place(self) -> Path:
        self.count += 1
        place = self.work / f"job-{self.count}"
        place.mkdir(parents=True)
        return place

    def _fresh_home(self, place: Path) -> Path:
        shutil.copytree(self.home, place / "home")
        return place / "home"

    def _start(self, wanted: Job, place: Path, home: Path, before: Path | None, seed: int = SEED) -> dict[str, Any]:
        settings = wanted.settings.replace("{output}", str(place / "output")).replace("{seed}", str(seed))
        settings = settings.replace("{before}", str(before / "output") if before else "")
        result = place / "result.json"
        command = [wanted.python or sys.executable, *self._launcher(wanted.processes)]
        command += ["-m", "benchmark.peers", wanted.peer, str(result), settings]
        with (place / "printed.txt").open("w", encoding="utf-8") as printed:
            environment = self.environment(home, wanted.processes)
            started = time.monotonic()
            environment["BENCHMARK_STARTED"] = repr(started)
            process = subprocess.Popen(command, cwd=place, env=environment, stdout=printed, stderr=subprocess.STDOUT)
            # wait4 gives the most memory of the process itself and of those that it started and waited for.
            _, status, usage = os.wait4(process.pid, 0)
            seconds = time.monotonic() - started
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode or not result.is_file():
            lines = (place / "printed.txt").read_text(encoding="utf-8", errors="replace").strip().splitlines()
            raise JobError(
                f"{wanted.name}: exit code {process.returncode}. It printed last:\n" + "\n".join(lines[-15:])
            )
        unit = 1 if sys.platform == "darwin" else 1024  # bytes there, KiB elsewhere
        raw = json.loads(result.read_text(encoding="utf-8"))
        return figures(raw, seconds) | {"memory_mb": usage.ru_maxrss * unit / 1e6}

    def _launcher(self, processes: int) -> list[str]:
        if processes == 1:
            return []
        config = GPU_CONFIG if self.gpu else CPU_CONFIG
        return ["-m", "accelerate.commands.launch", "--config_file", str(config), "--num_processes", str(processes)]

    def environment(self, home: Path, processes: int) -> dict[str, str]:
        """The variables of a subprocess."""
        environment = {
            **os.environ,
            "HFTL_HOME": str(home),
            "HF_HUB_OFFLINE": "1",  # nothing here needs the Hub; a lookup would only add its waiting time
            "PYTHONPATH": os.pathsep.join([str(ROOT / "scripts"), str(ROOT)]),
        }
        if not self.gpu:
            environment["CUDA_VISIBLE_DEVICES"] = ""
        if processes > 1:
            environment["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // processes))
        return environment


def figures(raw: dict[str, Any], seconds: float) -> dict[str, Any]:
    """The figures of one run, times in seconds.

    Args:
        raw: what the peer wrote: moments since the start of the process, accuracy, rows of a step, ….
        seconds: from the start of the process to its end.

    Returns:
        `seconds`; `work_seconds` (without the imports, where they were timed); `first_step_seconds` (from the start)
        and `step_seconds` (the median) where an optimizer stepped; `examples_per_second`; what else the peer gave.
    """
    steps = raw.pop("steps", [])
    result = {**raw, "seconds": seconds}
    if raw["imported"] is not None:
        result["work_seconds"] = raw["ended"] - raw["imported"]
    if steps:
        result["first_step_seconds"] = steps[0]
        result["steps"] = len(steps)
    gaps = sorted(after - previous for previous, after in itertools.pairwise(steps))
    if gaps:
        result["step_seconds"] = gaps[len(gaps) // 2]
        if raw.get("rows_a_step"):
            result["examples_per_second"] = raw["rows_a_step"] / result["step_seconds"]
    elif raw.get("rows") and "work_seconds" in result:
        result["examples_per_second"] = raw["rows"] / result["work_seconds"]
    return result
