"""What a command imports before it starts to work."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest
import small_data
import tiny_models

ROOT = Path(__file__).resolve().parent.parent

#: a method whose loss says what is imported when the first step reaches it, and ends the run there
FIRST_STEP = """
import dataclasses, gc, os, sys
from hftl.methods import METHODS

def loss(outputs, labels, num_items_in_batch=None):
    print("IMPORTED", *sorted({name.partition(".")[0] for name in sys.modules}))
    print("HFTL", *sorted(name for name in sys.modules if name.startswith("hftl.")))
    print("COLLECTOR", gc.isenabled(), gc.get_freeze_count() > 100_000)
    sys.stdout.flush()
    os._exit(0)

def stop(model, arguments):
    plan = METHODS["full"](model, arguments)
    return dataclasses.replace(plan, stages=(dataclasses.replace(plan.stages[0], loss=loss),))
"""


@pytest.fixture(scope="module")
def first_step(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    place = tmp_path_factory.mktemp("start")
    small_data.write_texts(place / "texts", {"train": 16, "dev": 8})
    tiny_models.write_tiny_text_model(place / "bert", kind="bert")
    (place / "first_step.py").write_text(FIRST_STEP)
    command = [sys.executable, "-m", "hftl", "train", "text-classification", "--model=bert", "--dataset=texts"]
    command += ["--method=first_step.py:stop", "--output_dir=run"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, env=environment, cwd=place, capture_output=True, text=True, timeout=120)
    lines = [line.split() for line in result.stdout.splitlines() if line.startswith(("IMPORTED", "HFTL", "COLLECTOR"))]
    assert len(lines) == 3, result.stdout + result.stderr
    return {line[0]: line[1:] for line in lines}


def test_texts_train_without_what_other_tasks_and_later_steps_use(first_step: dict[str, list[str]]) -> None:
    """scipy, pandas, torchvision and peft are not among these: transformers imports them wherever they are."""
    unwanted = {"timm", "sklearn", "evaluate", "tensorflow", "matplotlib"}
    assert "transformers" in first_step["IMPORTED"]
    assert unwanted & set(first_step["IMPORTED"]) == set()
    modules = {"hftl.tasks.image_classification", "hftl.card"}
    assert "hftl.tasks.text_classification" in first_step["HFTL"]
    assert modules & set(first_step["HFTL"]) == set()


def test_garbage_is_collected_again_once_everything_is_imported(first_step: dict[str, list[str]]) -> None:
    assert first_step["COLLECTOR"] == ["True", "True"]


def test_hftl_in_another_program_leaves_its_collector_alone() -> None:
    code = "import gc, hftl; hftl.Stage; print(gc.isenabled(), gc.get_freeze_count()); gc.disable(); hftl.fit"
    command = [sys.executable, "-c", f"{code}; print(gc.isenabled(), hftl.launch.__name__, callable(hftl.launch))"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=True)
    assert result.stdout.split() == ["True", "0", "False", "launch", "True"]


def imported_by(path: Path) -> set[str]:
    """The modules of hftl that a module imports at any time, but for the sake of a type."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for block in [node for node in ast.walk(tree) if isinstance(node, ast.If)]:
        if ast.unparse(block.test) == "TYPE_CHECKING":
            block.body.clear()
    imports = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.module]
    names = {f"{node.module}.{entry.name}" for node in imports for entry in node.names if "hftl" in str(node.module)}
    places = {name: ROOT.joinpath(*name.split(".")) for name in names}
    return {
        name if place.is_dir() or place.with_suffix(".py").is_file() else name.rpartition(".")[0]
        for name, place in places.items()
    }


def test_imports_run_one_way() -> None:
    graph = {}
    for path in (ROOT / "hftl").rglob("*.py"):
        name = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        graph[name] = imported_by(path) - {name}
    del graph["hftl"]  # which gives everything by name
    assert {"hftl.cli", "hftl.fitting"} <= graph["hftl.tuning"] | graph["hftl.__main__"]
    TopologicalSorter(graph).prepare()  # raises CycleError, which names the circle


def test_bitsandbytes_is_read_when_it_is_used() -> None:
    code = """
import sys
from hftl.launch import quick_imports
with quick_imports():
    import peft
print("bitsandbytes" in sys.modules, "bitsandbytes.nn" in sys.modules)
from peft.import_utils import is_bnb_4bit_available
print(is_bnb_4bit_available(), "bitsandbytes.nn" in sys.modules)
"""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120)
    assert done.stdout.split() == ["True", "False", "True", "True"], done.stdout + done.stderr
