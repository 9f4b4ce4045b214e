"""A modality that the package does not know, in a recipe of one's own: everything else comes with hftl."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

import hftl
from hftl import cli

RECIPE = Path(__file__).resolve().parent.parent / "recipes" / "custom_modality.py"
QUICK = ["--report_to=none", "--dataloader_num_workers=0"]


@pytest.fixture(scope="module")
def recipe() -> ModuleType:
    spec = importlib.util.spec_from_file_location("custom_modality", RECIPE)
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules["custom_modality"] = importlib.util.module_from_spec(spec)  # as pickling wants it
    spec.loader.exec_module(module)
    return module


def test_it_trains_and_gets_features_heads_a_report_and_predictions(
    recipe: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HFTL_HOME", str(tmp_path / "home"))
    run = recipe.main([f"--output_dir={tmp_path / 'run'}", "--num_train_epochs=30", *QUICK])
    assert run.metrics["test"]["accuracy"] > 0.8
    clouds = tmp_path / "home" / "clouds" / "test"
    loaded = hftl.load_run(tmp_path / "run", recipe.CloudClassification)
    predictions = loaded.predict(clouds)
    rows = [f"{path},{path.parent.name}" for path in sorted(clouds.rglob("*.npy"))]
    (tmp_path / "named.csv").write_text(
        "\n".join(["other,kind,where", *(f"x,{row.split(',')[1]},{row.split(',')[0]}" for row in rows)])
    )
    scores = loaded.evaluate(str(tmp_path / "named.csv"), label="kind", cloud="where")
    assert scores["accuracy"] == run.metrics["test"]["accuracy"]
    assert np.mean([entry.id.startswith(entry.label) for entry in predictions]) == run.metrics["test"]["accuracy"]
    plain = recipe.CloudModel.from_pretrained(tmp_path / "run").eval()
    rows = loaded.task.dataset(loaded.task.read_inputs(clouds / "box"), training=False)
    with torch.no_grad():
        logits = plain(**loaded.task.collate([rows[index] for index in range(len(rows))])).logits
    loaded.precision = "fp32"  # whatever a measurement chose for the training
    np.testing.assert_allclose(loaded.logits(loaded.task.read_inputs(clouds / "box")), logits, atol=1e-5)
    capsys.readouterr()

    data = [f"--dataset={tmp_path / 'home' / 'clouds'}", f"--model={tmp_path / 'run'}"]
    again = recipe.main([*data, f"--output_dir={tmp_path / 'knn'}", "--method=frozen", "--head=knn", *QUICK])
    assert "runs once for each of 180 examples" in capsys.readouterr().out
    assert again.metrics["test"]["accuracy"] > 0.8
    page = (tmp_path / "knn" / "report.html").read_text()
    assert "Confusion matrix" in page
    assert '<section aria-labelledby="map">' in page
    assert json.loads((tmp_path / "knn" / "logs" / "data.json").read_text())["rows"]["test"] == {
        "ball": 20, "box": 20, "rod": 20,
    }  # fmt: skip


def test_bad_files_end_it_in_one_line(
    recipe: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HFTL_HOME", str(tmp_path / "home"))
    data = Path(recipe.make_clouds(tmp_path / "clouds"))
    np.save(data / "train" / "box" / "flat.npy", np.zeros((7, 2)))
    with pytest.raises(hftl.UsageError, match=r"1 of 181 clouds of points cannot be read: train/box/flat.npy"):
        recipe.main([f"--dataset={data}", f"--output_dir={tmp_path / 'run'}", *QUICK])
    with pytest.raises(SystemExit):
        cli.main(["train", str(RECIPE), f"--dataset={data}", f"--output_dir={tmp_path / 'run'}", *QUICK])
    assert capsys.readouterr().err.count("\n") == 1
