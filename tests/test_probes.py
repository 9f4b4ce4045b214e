"""Heads fitted on features: what scikit-learn finds, the settings chosen on validation; whole runs with each kind."""

from __future__ import annotations

import csv
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import small_data
import tiny_models
import torch
from safetensors.torch import load_file
from sklearn.linear_model import LogisticRegression, RidgeClassifier
from sklearn.neighbors import KNeighborsClassifier, NearestCentroid
from sklearn.svm import LinearSVC

import hftl
from hftl import cli, training
from hftl.losses import CrossEntropyLoss, balanced_class_weights
from hftl.probes import beside, fit_linear_head, fit_probe, linear, load_probe, logistic, solve_linear_head


def clusters(rows: int, classes: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Overlapping clouds on axes of very different scale, far from zero."""
    random = np.random.default_rng(seed)
    labels = random.integers(classes, size=rows)
    centres = np.random.default_rng(99).normal(size=(classes, 6))
    features = (centres[labels] + random.normal(size=(rows, 6)) * 1.5) * [1, 10, 0.1, 1, 1, 1] + [0, 50, 3, 0, 0, 0]
    return torch.tensor(features, dtype=torch.float32), torch.tensor(labels)


def accuracy(logits: torch.Tensor, labels: torch.Tensor) -> float:
    return float((logits.argmax(dim=1) == labels).double().mean())


@pytest.mark.parametrize("classes", [2, 5])
def test_every_penalty_is_solved_as_scikit_learn_does(classes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    features, labels = clusters(300, classes)
    mean, deviation = features.mean(0), features.std(0, correction=0)
    for strength in (0.1, 0.001):
        monkeypatch.setattr(logistic, "STRENGTHS", (strength,))
        head = solve_linear_head((features, labels), (features, labels), classes, CrossEntropyLoss(), accuracy)
        # Two classes have one row of weights there, for the difference, and with it half of the penalty.
        peer = LogisticRegression(C=(2 if classes == 2 else 1) / (strength * 300), max_iter=5000, tol=1e-10)
        peer.fit(((features - mean) / deviation).numpy(), labels.numpy())
        expected = peer.predict_proba(((features - mean) / deviation).numpy())
        assert head.bias is not None
        found = (features @ head.weight.T + head.bias).softmax(dim=1).numpy()
        assert np.abs(found - expected).max() < 1e-3


def test_the_penalty_is_chosen_on_validation() -> None:
    train, validation = clusters(40, 3), clusters(400, 3, seed=1)
    head = solve_linear_head(train, validation, 3, CrossEntropyLoss(), accuracy)
    best = max(head.path, key=lambda entry: (entry[1], -entry[2]))
    assert head.strength == best[0]
    assert len({score for _, score, _ in head.path}) > 1  # there was something to choose
    assert head.bias is not None
    logits = validation[0] @ head.weight.T + head.bias
    assert accuracy(logits, validation[1]) == pytest.approx(best[1])


def test_pieces_of_rows_give_the_same_head(monkeypatch: pytest.MonkeyPatch) -> None:
    train, validation = clusters(200, 4), clusters(100, 4, seed=1)
    weights = balanced_class_weights(np.bincount(train[1], minlength=4).tolist())
    loss = CrossEntropyLoss(weights, label_smoothing=0.1)
    whole = solve_linear_head(train, validation, 4, loss, accuracy)
    monkeypatch.setattr(logistic, "_LOGITS", 4 * 7)
    pieces = solve_linear_head(train, validation, 4, loss, accuracy)
    assert torch.allclose(whole.weight, pieces.weight, atol=1e-4)
    assert whole.strength == pieces.strength


def test_a_layer_without_bias_and_a_feature_that_never_changes() -> None:
    (features, labels), validation = clusters(200, 3), clusters(100, 3, seed=1)
    features[:, 3] = 7.0
    head = solve_linear_head((features, labels), validation, 3, CrossEntropyLoss(), accuracy, intercept=False)
    assert head.bias is None
    assert head.weight[:, 3].abs().max() == 0.0
    assert torch.isfinite(head.weight).all()


def test_class_weights_move_the_border() -> None:
    features, labels = clusters(2000, 2)
    keep = (labels == 0) | (torch.arange(2000) % 20 == 0)
    features, labels = features[keep], labels[keep]
    weights = balanced_class_weights(torch.bincount(labels).tolist())
    recalls = []
    for loss in (CrossEntropyLoss(), CrossEntropyLoss(weights)):
        head = solve_linear_head((features, labels), (features, labels), 2, loss, lambda logits, ids: 0.0)
        assert head.bias is not None
        rare = features[labels == 1] @ head.weight.T + head.bias
        recalls.append(float((rare.argmax(dim=1) == 1).float().mean()))
    assert recalls[1] > recalls[0] + 0.2


def test_the_logits_of_all_rows_are_never_held(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logistic, "_LOGITS", 10_000)
    monkeypatch.setattr(logistic, "STRENGTHS", (0.1,))
    classes, rows = 50, 2_000
    labels = torch.arange(rows) % classes
    features = torch.nn.functional.one_hot(labels % 16, 16).float() + torch.randn(rows, 16) * 0.1
    sizes = []

    class Counting(CrossEntropyLoss):
        def __call__(self, outputs: dict[str, torch.Tensor], *others: object) -> torch.Tensor:  # type: ignore[override]
            sizes.append(outputs["logits"].numel())
            return super().__call__(outputs, *others)  # type: ignore[arg-type]

    few = (features[:100], labels[:100])
    solve_linear_head((features, labels), few, classes, Counting(), accuracy)
    assert max(sizes) == 10_000
    assert sum(sizes) > 5 * rows * classes  # all rows, several times


# --- other linear heads ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("classes", [2, 4])
@pytest.mark.parametrize("kind", ["svm", "ridge", "nearest_mean"])
def test_a_linear_head_decides_as_scikit_learn(kind: str, classes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    train, validation = clusters(200, classes), clusters(300, classes, seed=1)
    monkeypatch.setattr(linear, "STRENGTHS", (0.01,))
    head = fit_linear_head(kind, train, validation, list("abcd")[:classes], CrossEntropyLoss(), accuracy)
    peers = {"svm": LinearSVC(C=0.5, random_state=0, max_iter=10_000), "ridge": RidgeClassifier(alpha=2.0)}
    peer = peers.get(kind, NearestCentroid())
    mean, deviation = train[0].mean(0), train[0].std(0, correction=0)
    peer.fit(((train[0] - mean) / deviation).numpy(), train[1].numpy())
    assert head.bias is not None
    found = (validation[0] @ head.weight.T + head.bias).argmax(dim=1).numpy()
    expected = peer.predict(((validation[0] - mean) / deviation).numpy())
    assert (found == expected).mean() > 0.99
    assert len(set(found)) == classes


@pytest.mark.parametrize("kind", ["svm", "ridge", "nearest_mean"])
def test_a_linear_head_without_bias(kind: str) -> None:
    train, validation = clusters(200, 3), clusters(300, 3, seed=1)
    centre = train[0].mean(0)  # there is nowhere to put it
    train, validation = (train[0] - centre, train[1]), (validation[0] - centre, validation[1])
    head = fit_linear_head(kind, train, validation, list("abc"), CrossEntropyLoss(), accuracy, intercept=False)
    assert head.bias is None
    assert accuracy(validation[0] @ head.weight.T, validation[1]) > 0.5


def test_class_weights_reach_the_ridge() -> None:
    features, labels = clusters(2000, 2)
    keep = (labels == 0) | (torch.arange(2000) % 20 == 0)
    train = features[keep], labels[keep]
    loss = CrossEntropyLoss(balanced_class_weights(torch.bincount(train[1]).tolist()))
    shares = []
    for each in (CrossEntropyLoss(), loss):
        head = fit_linear_head("ridge", train, train, ["a", "b"], each, accuracy)
        assert head.bias is not None
        shares.append(float((features @ head.weight.T + head.bias).argmax(dim=1).float().mean()))
    assert shares[0] < 0.3 < shares[1]


def test_a_temperature_makes_scores_probabilities() -> None:
    random = torch.Generator().manual_seed(0)
    logits = torch.randn(4000, 3, generator=random, dtype=torch.float64) * 2
    labels = torch.multinomial(logits.softmax(dim=1), 1, generator=random)[:, 0]
    assert linear.fit_temperature(logits * 7.0, labels) == pytest.approx(7.0, rel=0.1)
    right = torch.eye(3, dtype=torch.float64)
    assert 0.01 < linear.fit_temperature(right, torch.arange(3)) < 10  # not 0, though every row is right


def test_a_class_without_rows_is_named() -> None:
    train = clusters(50, 2)
    with pytest.raises(hftl.UsageError, match="no training row is left of the class 'c'"):
        fit_linear_head("svm", train, train, list("abc"), CrossEntropyLoss(), accuracy)


# --- heads beside the model ------------------------------------------------------------------------------------------


def rings(rows: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Four directions, opposite ones of one class: nothing that a linear head could tell apart."""
    random = np.random.default_rng(seed)
    corner = random.integers(4, size=rows)
    angles = corner * np.pi / 2 + random.normal(size=rows) * 0.2
    features = np.stack([np.cos(angles), np.sin(angles)], axis=1) * random.uniform(0.5, 2, size=(rows, 1))
    return torch.tensor(features, dtype=torch.float32), torch.tensor(corner % 2)


@pytest.mark.parametrize("kind", ["knn", "mlp", "tip"])
def test_a_probe_sees_what_a_linear_head_cannot(kind: str, tmp_path: Path) -> None:
    train, validation, test = rings(200, 0), rings(100, 1), rings(300, 2)
    head = solve_linear_head(train, validation, 2, CrossEntropyLoss(), accuracy)
    assert head.bias is not None
    assert accuracy(test[0] @ head.weight.T + head.bias, test[1]) < 0.7
    probe = fit_probe(kind, train, validation, validation[0] @ head.weight.T + head.bias, accuracy, seed=0)
    logits = probe.logits(test[0], test[0] @ head.weight.T + head.bias)
    assert accuracy(logits, test[1]) > 0.95
    probe.save(tmp_path / "probe")
    assert {path.suffix for path in (tmp_path / "probe").iterdir()} == {".safetensors", ".json"}
    loaded = load_probe(tmp_path / "probe")
    assert loaded is not None
    assert loaded.logits(test[0], test[0] @ head.weight.T + head.bias).equal(logits)


def test_neighbours_vote_as_scikit_learn_lets_them(monkeypatch: pytest.MonkeyPatch) -> None:
    train, test = clusters(150, 3), clusters(80, 3, seed=1)
    monkeypatch.setattr(beside, "_NEIGHBOURS", (7,))
    probe = fit_probe("knn", train, test, torch.zeros(80, 3), accuracy, seed=0)
    monkeypatch.setattr(beside, "_PIECE", 1000)  # in pieces, too

    def weights(distances: np.ndarray) -> np.ndarray:
        return np.exp(-(distances - distances[:, :1]) / 0.07)

    peer = KNeighborsClassifier(7, metric="cosine", weights=weights).fit(train[0].numpy(), train[1].numpy())
    found = probe.logits(test[0], torch.zeros(80, 3))
    assert found.exp().sum(dim=1) == pytest.approx(np.ones(80), abs=1e-5)
    assert (found.argmax(dim=1).numpy() == peer.predict(test[0].numpy())).mean() > 0.98


def test_the_cache_is_that_of_tip_adapter() -> None:
    train, test = clusters(12, 3), clusters(5, 3, seed=1)
    linear_logits = torch.randn(5, 3)
    values = torch.nn.functional.one_hot(train[1], 3).float()
    arrays = {"keys": torch.nn.functional.normalize(train[0], dim=1), "values": values / values.sum(dim=0)}
    found = beside.Probe("tip", arrays, {"alpha": 2.0, "beta": 5.5}).logits(test[0], linear_logits)
    for row in range(5):
        for index in range(3):
            similar = [
                np.exp(-5.5 * (1 - float(torch.cosine_similarity(test[0][row], key, dim=0))))
                for key in train[0][train[1] == index]
            ]
            assert float(found[row, index] - linear_logits[row, index]) == pytest.approx(2 * np.mean(similar), abs=1e-4)


def test_the_settings_are_chosen_on_validation() -> None:
    train, validation = clusters(40, 3), clusters(400, 3, seed=1)
    scores = []

    def score(logits: torch.Tensor, labels: torch.Tensor) -> float:
        scores.append(accuracy(logits, labels))
        return scores[-1]

    probe = fit_probe("knn", train, validation, torch.zeros(400, 3), score, seed=0)
    assert len(set(scores)) > 1
    assert accuracy(probe.logits(validation[0], torch.zeros(400, 3)), validation[1]) == max(scores)


# --- whole runs ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = small_data.write_both(tmp_path_factory.mktemp("probes"))
    tiny_models.write_tiny_cnn(folder / "cnn")
    tiny_models.write_tiny_text_model(folder / "bert", kind="bert")
    tiny_models.write_tiny_text_model(folder / "gpt2", kind="gpt2")
    tiny_models.write_tiny_text_model(folder / "roberta", kind="roberta")
    return folder


def command(place: Path, model: str, run: Path, *flags: str) -> list[str]:
    task = "image" if model == "cnn" else "text"
    data = place / f"{task}s"
    words = ["train", f"{task}-classification", f"--model={place / model}", f"--dataset={data}", "--report_to=none"]
    return [*words, "--method=frozen", "--precision=fp32", f"--output_dir={run}", *flags]


@pytest.mark.parametrize(("model", "kind"), [("cnn", "svm"), ("bert", "ridge"), ("gpt2", "nearest_mean")])
def test_a_linear_head_is_the_models_ordinary_one(place: Path, tmp_path: Path, model: str, kind: str) -> None:
    cli._run(command(place, model, tmp_path / "run", f"--head={kind}", "--feature_cache_dtype=float32"))
    run = hftl.load_run(tmp_path / "run")
    stage = run.metrics["train"]["stages"][0]
    assert stage["head"] == kind
    assert stage["temperature"] > 0
    before, after = (load_file(path / "model.safetensors") for path in (place / model, run.folder))
    short = {name.split(".", 1)[-1]: value for name, value in after.items()} | after  # or a body alone
    same = [name for name, value in before.items() if name in short and short[name].shape == value.shape]
    assert len(same) >= len(after) - 2
    assert [name for name in same if not before[name].equal(short[name])] == []  # the backbone and its statistics
    data = str(place / ("images" if model == "cnn" else "texts"))
    scores = run.evaluate(data, "test")  # by the plain model
    assert scores["accuracy"] == run.metrics["test"]["accuracy"]
    assert scores["log_loss"] == pytest.approx(run.metrics["test"]["log_loss"], abs=2e-3)
    cli._run(["train", f"--config={run.folder / 'recipe.yaml'}", f"--output_dir={tmp_path / 'again'}"])
    again = load_file(tmp_path / "again" / "model.safetensors")
    assert all(value.equal(after[name]) for name, value in again.items())


@pytest.mark.parametrize(("model", "kind"), [("cnn", "knn"), ("bert", "mlp"), ("gpt2", "tip")])
def test_a_probe_answers_beside_an_ordinary_head(
    place: Path, tmp_path: Path, model: str, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = (f"--head={kind}", "--feature_cache_dtype=float32")
    monkeypatch.setattr(beside, "_BLENDS", (3.0,))  # not 0, which would be the linear head
    write = training.write_run

    def stops(*arguments: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(training, "write_run", stops)  # the head is fitted, the run is not written
    with pytest.raises(KeyboardInterrupt):
        cli._run(command(place, model, tmp_path / "run", *flags))
    monkeypatch.setattr(training, "write_run", write)
    cli._run(command(place, model, tmp_path / "run", *flags, "--resume"))
    run = hftl.load_run(tmp_path / "run")
    assert run.probe is not None
    assert run.metrics["train"]["stages"][0]["probe"] == run.probe.settings
    data = place / ("images" if model == "cnn" else "texts")
    scores = run.evaluate(str(data), "test")
    assert scores["log_loss"] == pytest.approx(run.metrics["test"]["log_loss"], abs=1e-3)
    assert scores["log_loss"] != pytest.approx(run.metrics["ordinary_head_test"]["log_loss"], abs=1e-6)
    assert f"`{kind}` head in `probe/`" in (run.folder / "README.md").read_text()
    # predictions.csv, hftl predict and Run.predict say the same.
    with (run.folder / "predictions.csv").open() as file:
        rows = list(csv.DictReader(file))
    inputs = data / "test" if model == "cnn" else data / "test.csv"
    cli._run(["predict", str(run.folder), str(inputs), f"--output={tmp_path / 'out.csv'}"])
    with (tmp_path / "out.csv").open() as file:
        predicted = list(csv.DictReader(file))
    name = f"probability_{run.label_names[0]}"
    assert sorted(float(row[name]) for row in predicted) == pytest.approx(
        sorted(float(row[name]) for row in rows), abs=1e-3
    )
    # Without the probe it is an ordinary run with the logistic head.
    shutil.rmtree(run.folder / "probe")
    ordinary = hftl.load_run(run.folder).evaluate(str(data), "test")
    assert ordinary["log_loss"] == pytest.approx(run.metrics["ordinary_head_test"]["log_loss"], abs=1e-3)


@pytest.mark.parametrize(
    ("model", "flags", "message"),
    [
        ("bert", ["--method=full", "--head=svm"], "--method full does not use --head"),
        ("bert", ["--head=svm", "--num_train_epochs=2"], "--head svm is fitted, not trained: leave out --num_train"),
        ("bert", ["--head=svm", "--feature_cache=off"], "leave out --feature_cache off"),
        ("bert", ["--head=ridge", "--head_solver=sgd"], "leave out --head_solver sgd"),
        ("bert", ["--head=svm", "--loss=focal"], "leave out --loss focal"),
        ("bert", ["--head=knn", "--sampler=balanced"], "leave out --sampler balanced"),
        ("bert", ["--head=ridge", "--label_smoothing_factor=0.1"], "no targets to smooth"),
        ("bert", ["--head=knn", "--class_weights=balanced"], "weighs no classes"),
        ("bert", ["--head=nearest_mean", "--class_weights=balanced"], "weighs no classes"),
        ("roberta", ["--head=svm"], "--head svm cannot be: the head is more than one linear layer"),
    ],
)
def test_heads_that_cannot_be(place: Path, tmp_path: Path, model: str, flags: list[str], message: str) -> None:
    with pytest.raises(hftl.UsageError, match=message):
        cli._run(command(place, model, tmp_path / "run", *flags))
    assert not (tmp_path / "run").exists()
