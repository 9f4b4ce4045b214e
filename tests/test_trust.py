"""Code and pickles that come with a model or a configuration do nothing before a person has said so."""

from __future__ import annotations

import json
import os
import pty
import re
import subprocess
import sys
from pathlib import Path

import hub_server
import pytest
import small_data
import tiny_models
import torch
from forked import ROOT, run_command
from safetensors.torch import load_file

TRAIN = ["train", "text-classification", "--dataset=texts", "--max_steps=1", "--report_to=none"]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trust")
    small_data.write_texts(folder / "texts", {"train": 32, "dev": 11})
    tiny_models.write_tiny_text_model(folder / "pickled", kind="bert")
    weights = folder / "pickled" / "model.safetensors"
    torch.save(load_file(weights), folder / "pickled" / "pytorch_model.bin")
    weights.unlink()
    return folder


@pytest.mark.slow
def test_a_pickle_is_read_only_when_it_may_be(place: Path) -> None:
    refused = run_command([*TRAIN, "--model=pickled", "--output_dir=refused"], place)
    assert refused.returncode == 2
    assert "--allow_pickle" in refused.stderr
    assert not (place / "refused").exists()
    done = run_command([*TRAIN, "--model=pickled", "--output_dir=read", "--allow_pickle"], place)
    assert done.returncode == 0, done.stderr
    assert {path.suffix for path in (place / "read").rglob("*model*")} <= {".safetensors"}


class Evil:
    """A pickle of it makes a file when it is loaded."""

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, ("pickle_has_run",)


@pytest.mark.slow
def test_even_then_a_pickle_runs_nothing(place: Path) -> None:
    tiny_models.write_tiny_text_model(place / "evil", kind="bert")
    (place / "evil" / "model.safetensors").unlink()
    torch.save({"weights": Evil()}, place / "evil" / "pytorch_model.bin")
    done = run_command([*TRAIN, "--model=evil", "--output_dir=evil_run", "--allow_pickle"], place)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert not (place / "pickle_has_run").exists()
    assert "its pickle holds more than tensors" in done.stderr
    assert "weights_only" not in done.stderr  # torch's advice is to switch that off


@pytest.mark.slow
def test_code_of_a_model_runs_only_when_it_may_and_that_is_said(place: Path) -> None:
    tiny_models.write_tiny_text_model(place / "coded", kind="bert")
    path = place / "coded" / "config.json"
    config = json.loads(path.read_text())
    config["auto_map"] = {
        "AutoModelForSequenceClassification": "modeling_mine.Mine",
        "AutoConfig": "modeling_mine.Config",
    }
    config["model_type"] = "mine"
    path.write_text(json.dumps(config))
    (place / "coded" / "modeling_mine.py").write_text(
        "import os\n"
        "from transformers import BertConfig, BertForSequenceClassification\n"
        "os.makedirs('code_has_run', exist_ok=True)\n"
        "class Config(BertConfig):\n    model_type = 'mine'\n"
        "class Mine(BertForSequenceClassification):\n    config_class = Config\n"
    )
    refused = run_command([*TRAIN, "--model=coded", "--output_dir=refused"], place)
    assert refused.returncode == 2
    assert "--trust_remote_code" in refused.stderr
    assert not (place / "code_has_run").exists()
    home = {"HF_HOME": str(place / "hf"), "HF_MODULES_CACHE": str(place / "modules")}
    done = run_command([*TRAIN, "--model=coded", "--output_dir=coded_run", "--trust_remote_code"], place, **home)
    assert "Python code that comes with 'coded' may run" in done.stdout
    assert (place / "code_has_run").exists()


@pytest.mark.slow
def test_code_in_a_run_runs_only_when_the_one_who_uses_it_says_so(place: Path) -> None:
    tiny_models.write_tiny_text_model(place / "plain", kind="bert")
    done = run_command([*TRAIN, "--model=plain", "--output_dir=foreign"], place)
    assert done.returncode == 0, done.stderr
    folder = place / "foreign"
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"] = {
        "AutoModelForSequenceClassification": "foreign_code.Mine",
        "AutoConfig": "foreign_code.Config",
    }
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "foreign"}))
    recipe = (folder / "recipe.yaml").read_text()
    (folder / "recipe.yaml").write_text(re.sub("trust_remote_code: .*\n", "", recipe) + "trust_remote_code: true\n")
    (folder / "foreign_code.py").write_text(
        "import os\n"
        "from transformers import BertConfig, BertForSequenceClassification\n"
        "os.makedirs('foreign_has_run', exist_ok=True)\n"
        "class Config(BertConfig):\n    model_type = 'foreign'\n"
        "class Mine(BertForSequenceClassification):\n    config_class = Config\n"
    )
    modules = {"HF_MODULES_CACHE": str(place / "modules")}
    refused = run_command(["predict", "foreign", "a film"], place, **modules)
    assert refused.returncode == 2
    assert "--trust_remote_code" in refused.stderr
    assert not (place / "foreign_has_run").exists()
    done = run_command(["predict", "foreign", "a film", "--trust_remote_code"], place, **modules)
    assert done.returncode == 0, done.stderr
    assert "Python code in 'foreign' may run" in done.stdout
    assert (place / "foreign_has_run").exists()


@pytest.mark.slow
@pytest.mark.parametrize(("answer", "code"), [("y", 0), ("n", 2), (None, 2)])
def test_a_configuration_from_the_hub_is_shown_and_asked_about(place: Path, answer: str | None, code: int) -> None:
    tiny_models.write_tiny_text_model(place / "bert", kind="bert")
    settings = (
        "task: text-classification\nmodel_name_or_path: bert\ndataset_name: texts\nmethod: own.py:mine\nmax_steps: 1\n"
    )
    (place / "own.py").write_text("from hftl.methods import METHODS\n\nmine = METHODS['full']\n")
    with hub_server.serve() as hub:
        hub.files["tester/shared"] = {"recipe.yaml": settings.encode()}
        environment = {
            **os.environ,
            "HF_ENDPOINT": hub.url,
            "HF_HOME": str(place / f"hf-{answer}"),
            "PYTHONPATH": str(ROOT),
        }
        command = [sys.executable, "-m", "hftl", "train", "--config=hf://tester/shared/recipe.yaml"]
        command += [f"--output_dir=from-{answer}", "--report_to=none"]
        mine, theirs = pty.openpty() if answer else (None, subprocess.DEVNULL)
        if mine is not None:
            os.write(mine, f"{answer}\n".encode())
        done = subprocess.run(
            command, cwd=place, env=environment | {"OMP_NUM_THREADS": "1"}, stdin=theirs, capture_output=True, text=True
        )
    assert done.returncode == code, done.stderr
    assert "method: 'own.py:mine'" in done.stdout
    assert "this names code or files that may run code: method: 'own.py:mine'" in done.stdout
    assert (place / f"from-{answer}" / "metrics.json").is_file() == (code == 0)
    if answer is None:
        assert "hf download tester/shared recipe.yaml" in done.stderr
