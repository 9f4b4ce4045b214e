"""Copies of a process that work beside it: what they change and leave, how they end, and when there are none."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch

from hftl.side_by_side import SideBySide, most_at_once, side_by_side

pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="processes with threads are copied on Linux alone"),
    pytest.mark.usefixtures("two_threads"),
]


def test_work_changes_its_own_copy_and_has_one_thread(tmp_path: Path) -> None:
    weight = torch.ones(600, 600)
    (weight @ weight).sum()  # threads are running when the process is copied

    def work() -> None:
        weight.add_((weight @ weight)[0, 0])
        (tmp_path / "left").write_text(f"{os.getpid()} {torch.get_num_threads()} {weight[0, 0]:.0f}")

    with side_by_side(2) as others:
        others.begin(7, work)
        assert torch.get_num_threads() == 1
        assert others.wait() == {7: 0}
    assert torch.get_num_threads() == 2
    process, threads, entry = (tmp_path / "left").read_text().split()
    assert int(process) != os.getpid()
    assert (threads, entry) == ("1", "601")
    assert bool((weight == 1).all())


def test_gradients_are_computed_in_a_copy(tmp_path: Path) -> None:
    model = torch.nn.Linear(512, 512)
    rows = torch.randn(256, 512)

    def work() -> None:
        model(rows).square().sum().backward()
        torch.save(model.weight.grad, tmp_path / "gradient")

    work()
    expected = torch.load(tmp_path / "gradient")
    model.zero_grad()
    with side_by_side(2) as others:
        others.begin(0, work)
        assert others.wait() == {0: 0}
    torch.testing.assert_close(torch.load(tmp_path / "gradient"), expected)


def test_how_work_ended_is_told(capfd: pytest.CaptureFixture[str]) -> None:
    def failing() -> None:
        raise ValueError("no such row")

    with side_by_side(4) as others:
        others.begin(1, failing)
        others.begin(2, lambda: os.kill(os.getpid(), signal.SIGKILL))
        others.begin(3, lambda: None)
        assert others.wait() == {1: 1, 2: -signal.SIGKILL, 3: 0}
    assert "ValueError: no such row" in capfd.readouterr().err


def test_what_is_not_waited_for_ends_with_the_block() -> None:
    with side_by_side(2) as others:
        others.begin(0, lambda: time.sleep(600))
        (process,) = others._processes.values()
        assert psutil.pid_exists(process)
    assert not psutil.pid_exists(process)
    assert torch.get_num_threads() == 2


def test_work_ends_when_the_process_that_began_it_does(tmp_path: Path) -> None:
    """Also where that one is killed and can do nothing about it."""
    script = (
        "import os, signal, time\n"
        "from hftl.side_by_side import SideBySide\n"
        "others = SideBySide()\n"
        "others.begin(0, lambda: time.sleep(600))\n"
        "print(*others._processes.values(), flush=True)\n"
        "time.sleep(600)\n"
    )
    began = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    assert began.stdout is not None
    other = psutil.Process(int(began.stdout.readline()))
    began.kill()
    began.wait()
    began.stdout.close()
    psutil.wait_procs([other], timeout=30)
    assert not other.is_running() or other.status() == psutil.STATUS_ZOMBIE


def test_what_takes_too_long_is_killed() -> None:
    def work() -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        time.sleep(600)

    with side_by_side(2) as others:
        others.begin(5, work)
        assert others.wait(time.time() + 1) == {5: -signal.SIGKILL}


def test_nowhere_to_print() -> None:
    """Neither here nor there is anything but the exit code known of it."""
    script = (
        "from hftl.side_by_side import side_by_side\n"
        "with side_by_side(2) as others:\n"
        "    others.begin(0, lambda: 1 / 0)\n"
        "    codes = others.wait()\n"
        "raise SystemExit(10 + codes[0])\n"
    )
    for where in (">&- 2>&-", ">/dev/full 2>/dev/full"):
        done = subprocess.run(["sh", "-c", f"exec '{sys.executable}' -c '{script}' {where}"], check=False)
        assert done.returncode == 11


def test_one_alone_keeps_its_threads() -> None:
    with side_by_side(1) as others:
        assert torch.get_num_threads() == 2
        assert isinstance(others, SideBySide)
        assert others.wait() == {}


def test_as_many_as_there_are_threads_where_a_process_can_be_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    assert most_at_once() == 2
    with monkeypatch.context() as patched:
        patched.setattr(torch.accelerator, "is_available", lambda: True)
        assert most_at_once() == 1
    with monkeypatch.context() as patched:
        patched.setattr(sys, "platform", "darwin")
        assert most_at_once() == 1
    with monkeypatch.context() as patched:
        patched.setattr("threading.current_thread", lambda: None)
        assert most_at_once() == 1
