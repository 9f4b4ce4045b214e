"""Every task with every method, in one process and in two: it trains what it says and comes back, or is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import cells
import pytest
from forked import ROOT, run_ranks

from hftl.methods import METHODS

#: models that read texts too
DUAL_ENCODERS = ("CLIP", "SigLIP")
#: cells that cannot be, and what is said
REFUSED = {
    **{
        (name, "zero_shot"): "--method zero_shot"
        for name in (*cells.TASKS, *cells.MODELS)
        if name not in (*DUAL_ENCODERS, "likeness")
    },
    **{
        (name, method): f"--method {method} is for rows of one class each"
        for name in ("likeness", "words", "choices")
        for method in ("auto", "setfit")
    },
    **{
        (name, "setfit"): "the head is more than one linear layer"
        for name in ("sounds as waves", "videos", "images with texts")
    },
    ("GPT", "peft"): "LOKR takes layers of the kinds convolution",
    ("SlowFast", "peft"): "LOKR takes layers of the kinds convolution",
}
#: in two processes
ALONE = {"auto": "--method auto works in one process"}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return cells.write(tmp_path_factory.mktemp("table"))


def check(task: str, method: str, record: dict[str, Any], refusals: dict[Any, str]) -> None:
    said = refusals.get((task, method), refusals.get(method))
    if said is not None:
        assert said in record["refused"]
        return
    assert "refused" not in record, record
    assert record["wrong"] == []
    assert record["still"] == []
    head = record["blocks"]
    if method == "frozen":
        assert record["trained"] == [head]
    elif method == "setfit":
        assert record["trained"] == [*range(head + 1)]
    elif method == "zero_shot":
        assert record["trained"] == []
    elif method == "partial":
        assert record["trained"] == [head - 1, head]
    if "difference" in record:
        assert record["difference"] < (1e-3 if method in ("lora", "peft") else 1e-5)  # merged into the weights


@pytest.mark.slow
@pytest.mark.parametrize("task", [*cells.TASKS, *cells.MODELS])
def test_in_one_process(place: Path, task: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)
    words = {**cells.TASKS, **cells.MODELS}[task]
    for method in METHODS:
        record = cells.cell(words, method, place / f"one {task} {method}")
        check(task, method, record, REFUSED)
        assert "refused" in record or "difference" in record


@pytest.mark.slow
@pytest.mark.parametrize("task", cells.TASKS)
def test_in_two_processes(place: Path, task: str) -> None:
    for done in run_ranks([str(ROOT / "tests" / "cells.py"), task], place):
        assert done.returncode == 0, done.stdout + done.stderr
    first, second = (json.loads((place / f"{task} {rank}.json").read_text()) for rank in (0, 1))
    assert [*first] == [*METHODS]
    for method, record in first.items():
        check(task, method, record, {**REFUSED, **ALONE})
        assert record.get("weights") == second[method].get("weights")  # the two have the same model
        assert ("difference" in record, "difference" in second[method]) == ("refused" not in record, False)
