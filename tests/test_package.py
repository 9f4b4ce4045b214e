"""The wheel: what it holds, and that it works with no checkout beside it."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def files_of(folder: str) -> set[str]:
    """Files below a folder of the checkout, as the wheel names them."""
    names = {
        path.relative_to(ROOT).as_posix() for path in (ROOT / folder).rglob("*") if path.suffix in (".py", ".yaml")
    }
    return names if folder == "hftl" else {f"hftl/{name}" for name in names}


@pytest.mark.slow
def test_the_wheel_works_alone(tmp_path: Path) -> None:
    build = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)]
    subprocess.run(build, cwd=ROOT, check=True, capture_output=True, timeout=120)
    with zipfile.ZipFile(next(tmp_path.glob("*.whl"))) as wheel:
        assert files_of("hftl") | files_of("recipes") | files_of("accelerate_configs") <= set(wheel.namelist())
        wheel.extractall(tmp_path / "installed")
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "installed")}

    def hftl(*words: str) -> str:
        command = [sys.executable, "-P", "-m", "hftl", *words]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr
        return done.stdout

    where = [sys.executable, "-P", "-c", "import hftl; print(hftl.__file__)"]
    place = subprocess.run(where, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True).stdout
    assert Path(place.strip()).is_relative_to(tmp_path / "installed")
    assert "image_classification" in hftl("ls")
    hftl("cp", "image_classification", "my.py")
    assert (tmp_path / "my.py").read_bytes() == (ROOT / "recipes" / "image_classification.py").read_bytes()
    hftl("cp", "configs/text_classification_lora.yaml", ".")
    hftl("cp", "accelerate_configs/cpu_2_processes.yaml", ".")
    assert (tmp_path / "text_classification_lora.yaml").is_file()
