"""Pushing to a Hub and loading from it, through the real client, against a server on 127.0.0.1."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import hub_server
import pytest
import small_data
import tiny_models

ROOT = Path(__file__).resolve().parent.parent


def hftl(place: Path, url: str, *words: str) -> subprocess.CompletedProcess:
    """The real command, in a process of its own: the client reads the address of the Hub when it is imported."""
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "HF_ENDPOINT": url,
        "HF_HOME": str(place / "hf"),
        "HF_TOKEN": "hf_test",
    }
    environment |= {"OMP_NUM_THREADS": "1", "HF_HUB_DISABLE_XET": "1"}
    command = [sys.executable, "-m", "hftl", *words]
    return subprocess.run(command, cwd=place, env=environment, capture_output=True, text=True, timeout=240)


@pytest.mark.slow
def test_push_and_load(tmp_path: Path) -> None:
    small_data.write_texts(tmp_path / "texts", {"train": 16, "dev": 8})
    tiny_models.write_tiny_text_model(tmp_path / "bert", kind="bert")
    train = [
        "train",
        "text-classification",
        "--dataset=texts",
        "--num_train_epochs=1",
        "--report_to=none",
        "--method=lora",
    ]
    with hub_server.serve() as hub:
        hub.status = 500
        failed = hftl(
            tmp_path,
            hub.url,
            *train,
            "--model=bert",
            "--output_dir=run",
            "--keep_checkpoints",
            "--push_to_hub",
            "--hub_model_id=tester/mine",
        )
        assert failed.returncode == 2
        assert "hftl push run tester/mine" in failed.stderr.splitlines()[-1]
        assert "Traceback" not in failed.stderr
        assert (tmp_path / "run" / "metrics.json").is_file()  # the run is whole

        hub.status = 401
        refused = hftl(tmp_path, hub.url, "push", "run", "tester/mine")
        assert refused.returncode == 2
        assert "hf auth login" in refused.stderr

        hub.status = None
        pushed = hftl(tmp_path, hub.url, "push", "run", "tester/mine", "--private")
        assert pushed.returncode == 0, pushed.stderr
        assert pushed.stdout.strip() == f"{hub.url}/tester/mine"
        names = {str(path.relative_to(tmp_path / "run")) for path in (tmp_path / "run").rglob("*") if path.is_file()}
        data = ("logs/", "checkpoints/", "predictions.csv", "report.html")  # what holds rows of it
        left = {name for name in names if name.startswith(data)}
        assert len(hub.commits) == 1
        assert set(hub.commits[0]) == names - left

        second = ["--push_to_hub", "--hub_model_id=tester/second"]
        again = hftl(tmp_path, hub.url, *train, "--model=tester/mine", "--output_dir=again", *second)
        assert again.returncode == 0, again.stderr
        assert f"{hub.url}/tester/second" in again.stdout
        assert "README.md" in hub.commits[1]
        missing = hftl(tmp_path, hub.url, *train, "--model=tester/nothing", "--output_dir=none")
        assert missing.returncode == 2
        assert "tester/nothing" in missing.stderr
        assert not (tmp_path / "none").exists()
