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
import transformers
from refusal import refused
from safetensors.torch import load_file
from sklearn.linear_model import LogisticRegression, RidgeClassifier
from sklearn.neighbors import KNeighborsClassifier, NearestCentroid
from sklearn.svm import LinearSVC

import hftl
from hftl import backbones, cli, pooling, training
from hftl.cut import NoCut
from hftl.features import PooledFeatures
from hftl.joined import Joined, find_joined
from hftl.losses import CrossEntropyLoss, balanced_class_weights
from hftl.probes import (
    beside,
    fit_linear_head,
    fit_probe,
    linear,
    linear_probe,
    load_probe,
    logistic,
    solve_linear_head,
)


def clusters(rows: int, classes: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Overlapping clouds on axes of very different scale, far from zero."""
    random = np.random.default_rng(seed)
    labels = random.integers(classes, size=rows)
    centres = np.random.default_rng(99).normal(size=(classes, 6))
    features = (centres[labels] + random.normal(size=(rows, 6)) * 1.5) * [1, 10, 0.1, 1, 1, 1] + [0, 50, 3, 0, 0, 0]
    return torch.tensor(features, dtype=torch.float32), torch.tensor(labels)


def spread(features: torch.Tensor) -> torch.Tensor:
    """The deviation of each axis, of one that hardly varies a part of the mean one."""
    deviation = features.std(0, correction=0)
    return deviation.clamp(min=logistic._LEAST_DEVIATION * float(deviation.mean()))


def accuracy(logits: torch.Tensor, labels: torch.Tensor) -> float:
    return float((logits.argmax(dim=1) == labels).double().mean())


@pytest.mark.parametrize("classes", [2, 5])
def test_every_penalty_is_solved_as_scikit_learn_does(classes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    features, labels = clusters(300, classes)
    mean, deviation = features.mean(0), spread(features)
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


def test_what_hardly_shows_in_training_is_not_blown_up() -> None:
    """A channel that is all but dead in train, and alive in a few rows that come later."""
    train, validation = clusters(100, 2), clusters(100, 2, seed=1)
    for features, values in ((train[0], 1e-4 * torch.randn(100)), (validation[0], torch.zeros(100))):
        features[:, 5] = values
    head = solve_linear_head(train, validation, 2, CrossEntropyLoss(), accuracy)
    assert float(head.weight[:, 5].abs().max()) < 100 * float(head.weight[:, 0].abs().max())


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
    mean, deviation = train[0].mean(0), spread(train[0])
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


# --- features of several blocks ---------------------------------------------------------------------------------------

#: architecture → the modules that give the outputs of its last three blocks, from the last one back
BLOCKS = {
    "timm_resnet18": ["timm_model.layer4.1", "timm_model.layer4.0", "timm_model.layer3.1"],
    "timm_efficientnet_lite0": ["timm_model.bn2", "timm_model.blocks.5.3", "timm_model.blocks.5.2"],
    "timm_mobilenetv3_small_100": ["timm_model.blocks.5.0", "timm_model.blocks.4.2", "timm_model.blocks.4.1"],
    "timm_vit_tiny": ["timm_model.norm", "timm_model.blocks.1", "timm_model.blocks.0"],
    "vit": ["vit.layernorm", "vit.layers.1", "vit.layers.0"],
    "bert": ["bert.encoder.layer.2", "bert.encoder.layer.1", "bert.encoder.layer.0"],
    "gpt2": ["transformer.ln_f", "transformer.h.1", "transformer.h.0"],
    "qwen2": ["model.norm", "model.layers.1", "model.layers.0"],
}


def vector(values: torch.Tensor, mask: torch.Tensor | None, kind: str) -> torch.Tensor:
    """One row's output of a block as one vector, position by position."""
    if values.ndim == 3:
        positions = [values[:, high, wide] for high in range(values.shape[1]) for wide in range(values.shape[2])]
    else:
        positions = [token for index, token in enumerate(values) if mask is None or mask[index]]
    stacked = torch.stack(positions)
    return stacked.mean(dim=0) if kind == "mean" else stacked.max(dim=0).values


@torch.no_grad()
def by_hand(model: Any, batch: dict[str, torch.Tensor], modules: list[str], kinds: list[str]) -> torch.Tensor:
    found: dict[str, torch.Tensor] = {}

    def keeps(name: str) -> Any:
        def hook(module: Any, arguments: Any, output: Any) -> None:
            found[name] = (output[0] if isinstance(output, tuple) else output).clone()

        return hook

    for name in modules:
        model.get_submodule(name).register_forward_hook(keeps(name))
    model(**batch)
    masks = batch.get("attention_mask", [None] * len(next(iter(batch.values()))))
    parts = [
        torch.stack([vector(values, mask, kind) for values, mask in zip(found[name], masks, strict=True)])
        for name in modules
        for kind in kinds
    ]
    return torch.cat(parts, dim=1)


@pytest.mark.parametrize("flag", ["model", "mean", "max", "mean_max"])
@pytest.mark.parametrize("name", BLOCKS)
def test_joined_features_are_the_pooled_outputs_of_the_last_blocks(name: str, flag: str) -> None:
    model: Any = tiny_models.TINY[name]()
    batch = tiny_models.tiny_inputs(model, batch=3)
    if name in ("timm_efficientnet_lite0", "timm_mobilenetv3_small_100"):
        batch = {"pixel_values": torch.rand(3, 3, 96, 96)}  # several positions are left at the end
    head = backbones.structure(model).head[0]
    joined = find_joined(model, batch, 3, flag)
    found = joined.features(model, head, batch)
    ordinary = backbones.head_input(model, head, batch)
    modules = BLOCKS[name][:0:-1] if flag == "model" else BLOCKS[name][::-1]  # in depth order
    kinds = {"model": ["mean"], "mean_max": ["mean", "max"]}.get(flag, [flag])
    assert found[:, : ordinary.shape[1]].equal(ordinary)
    assert torch.allclose(found[:, ordinary.shape[1] :], by_hand(model, batch, modules, kinds), rtol=1e-4, atol=1e-5)


def test_all_blocks_can_be_joined() -> None:
    model: Any = tiny_models.TINY["gpt2"]()
    batch = tiny_models.tiny_inputs(model)
    embedded = model.transformer.wte(batch["input_ids"]) + model.transformer.wpe(torch.arange(8))  # no module's output
    found = find_joined(model, batch, 4, "model").features(model, "score", batch)
    expected = torch.stack([vector(*row, "mean") for row in zip(embedded, batch["attention_mask"], strict=True)])
    assert torch.allclose(found[:, 16:32], expected, atol=1e-6)
    assert found.shape == (2, 4 * 16)


def test_the_last_round_of_a_shared_layer_counts() -> None:
    model: Any = tiny_models.TINY["albert"]()
    batch = tiny_models.tiny_inputs(model, batch=3)
    found = find_joined(model, batch, 1, "max").features(model, "classifier", batch)
    layer = "albert.encoder.albert_layer_groups.0"
    assert torch.allclose(found[:, 16:], by_hand(model, batch, [layer], ["max"]), atol=1e-5)


def test_a_model_of_one_layer_is_joined_too() -> None:
    config = transformers.BertConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, vocab_size=64)
    model = transformers.BertForSequenceClassification(config).eval()  # the encoder is the whole block
    batch = tiny_models.tiny_inputs(model)
    found = find_joined(model, batch, 1, "mean").features(model, "classifier", batch)
    assert torch.allclose(found[:, 16:], by_hand(model, batch, ["bert.encoder.layer.0"], ["mean"]), atol=1e-5)


def test_what_is_pooled_lies_before_the_layer_that_takes_the_mean() -> None:
    model: Any = pooling.pool_by_mean(tiny_models.TINY["bert"]())
    batch = tiny_models.tiny_inputs(model.eval(), batch=3)
    found = find_joined(model, batch, 2, "max").features(model, "classifier", batch)[:, 16:]
    modules = ["bert.encoder.layer.1", "bert.encoder.layer.2"]
    assert torch.allclose(found, by_hand(model, batch, modules, ["max"]), atol=1e-5)


def test_a_text_without_tokens_has_features_too() -> None:
    model: Any = tiny_models.TINY["gpt2"]()
    batch = tiny_models.tiny_inputs(model, batch=3)
    joined = find_joined(model, batch, 1, "mean_max")
    batch["attention_mask"][1] = 0
    found = joined.features(model, "score", batch)
    assert found[1, 16:].equal(torch.zeros(32))
    assert found[0, 16:].abs().min() > 0


@pytest.mark.parametrize(
    ("name", "layers", "flag", "message"),
    [
        ("timm_swin_tiny", 2, "model", "values of shape .*, not .rows, tokens, channels"),  # channels come last
        ("timm_swin_tiny", 1, "mean", "values of shape .*, not .rows, tokens, channels"),
        ("timm_densenet121", 3, "model", "no single tensor"),  # a list of all before
        ("albert", 2, "model", "more than once"),  # one layer, shared
        ("timm_resnet18", 1, "max", "no more than one position a row"),  # at 32 pixels
    ],
)
def test_blocks_that_cannot_be_joined(name: str, layers: int, flag: str, message: str) -> None:
    model: Any = tiny_models.TINY[name]()
    batch = tiny_models.tiny_inputs(model)
    if name == "timm_resnet18":
        batch = {"pixel_values": torch.rand(2, 3, 32, 32)}
    source = PooledFeatures(model, batch)
    with pytest.raises(NoCut, match=message):
        source.join(model, batch, layers, flag)


# --- whole runs ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = small_data.write_both(tmp_path_factory.mktemp("probes"))
    tiny_models.write_tiny_cnn(folder / "cnn", zero_init_last=False)  # or a block would hand on what enters it
    tiny_models.write_tiny_image_model(folder / "vit", kind="vit")
    tiny_models.write_tiny_text_model(folder / "bert", kind="bert")
    tiny_models.write_tiny_text_model(folder / "gpt2", kind="gpt2")
    tiny_models.write_tiny_text_model(folder / "roberta", kind="roberta")
    return folder


def command(place: Path, model: str, run: Path, *flags: str) -> list[str]:
    task = "image" if model in ("cnn", "vit") else "text"
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


def test_a_kept_head_is_what_a_solved_one_starts_from(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def weight(run: str) -> torch.Tensor:
        return load_file(tmp_path / run / "model.safetensors")["fc.weight"]

    first = command(place, "cnn", tmp_path / "first")
    cli._run(first)
    again = [f"--model={tmp_path / 'first'}", "--max_train_samples=6"]
    cli._run([*command(place, "cnn", tmp_path / "fresh"), *again])
    monkeypatch.setattr(logistic, "STRENGTHS", (10.0,))
    monkeypatch.setattr(logistic, "_NEAR_START", ())
    cli._run([*command(place, "cnn", tmp_path / "kept"), *again, "--keep_head"])
    assert (weight("kept") - weight("first")).norm() < 0.5 * (weight("fresh") - weight("first")).norm()
    kept = hftl.load_run(tmp_path / "kept").metrics["train"]["stages"][0]
    assert kept["head"] == "as it was" or kept["penalty"] == 10.0
    words = [*command(place, "cnn", tmp_path / "svm"), *again, "--keep_head", "--head=svm"]
    assert "--head svm is fitted to the training rows alone: leave out --keep_head" in refused(words, capsys)


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


#: model, flags, the kind of the head that answers, and what its features are: numbers of the parts that are joined
JOINED = [
    ("cnn", ["--feature_layers=3"], "linear", [32, 16, 32]),
    ("vit", ["--feature_layers=2", "--feature_pooling=mean_max", "--head=svm"], "linear", [16, 32, 32]),
    ("bert", ["--feature_pooling=max", "--head=knn"], "knn", [16, 16]),
    ("gpt2", ["--feature_layers=4", "--head=tip"], "tip", [16, 16, 16, 16]),
]


@pytest.mark.parametrize(("model", "flags", "kind", "parts"), JOINED)
def test_a_head_on_joined_features_answers_beside_an_ordinary_one(
    place: Path, tmp_path: Path, model: str, flags: list[str], kind: str, parts: list[int], monkeypatch: Any
) -> None:
    flags = [*flags, "--feature_cache_dtype=float32"]
    monkeypatch.setattr(beside, "_BLENDS", (3.0,))  # not 0, which would be the linear head
    write, kept = training.write_run, {}

    def stops(task: Any, trainer: Any, splits: Any, *others: Any) -> None:
        raise KeyboardInterrupt

    def remembers(task: Any, trainer: Any, splits: Any, data: Any, records: Any, results: Any) -> None:
        kept.update(rows=splits.test, answers=results["test"][0], ordinary=results["ordinary_head_test"][0])
        write(task, trainer, splits, data, records, results)

    monkeypatch.setattr(training, "write_run", stops)  # the head is fitted, the run is not written
    with pytest.raises(KeyboardInterrupt):
        cli._run(command(place, model, tmp_path / "run", *flags))
    monkeypatch.setattr(training, "write_run", remembers)
    cli._run(command(place, model, tmp_path / "run", *flags, "--resume"))
    monkeypatch.setattr(training, "write_run", write)
    run = hftl.load_run(tmp_path / "run")
    assert run.probe is not None
    assert run.probe.kind == kind
    assert run.probe.arrays["weight" if kind == "linear" else "keys"].shape[1] == sum(parts)
    assert run.metrics["train"]["stages"][0]["probe"] == run.probe.settings
    # The saved run answers as the training did, and the model alone as its ordinary head.
    logits = run.logits(kept["rows"])
    assert logits == pytest.approx(kept["answers"], rel=1e-3, abs=1e-3)
    assert logits != pytest.approx(kept["ordinary"], rel=0.1, abs=0.1)
    plain = run.task.auto_class.from_pretrained(run.folder).eval()
    dataset = run.task.dataset(kept["rows"], training=False)
    batch = run.task.collate([dataset[index] for index in range(len(dataset))])
    with torch.no_grad():
        alone = plain(**{name: value for name, value in batch.items() if name != "labels"}).logits
    assert alone.numpy() == pytest.approx(kept["ordinary"], rel=1e-3, abs=1e-3)
    # That is the head of a run without the flags.
    cli._run(command(place, model, tmp_path / "plain", "--feature_cache_dtype=float32"))
    expected = hftl.load_run(tmp_path / "plain").metrics["test"]["log_loss"]
    assert run.metrics["ordinary_head_test"]["log_loss"] == pytest.approx(expected, rel=1e-4)
    assert run.metrics["test"]["log_loss"] != pytest.approx(expected, rel=1e-3)
    # It says so.
    asked = " ".join(flag.replace("=", " ") for flag in flags if flag.startswith(("--feature_l", "--feature_p")))
    head = next((flag.removeprefix("--head=") for flag in flags if flag.startswith("--head=")), "logistic")
    assert f"`{head}` head in `probe/` (`{asked}`)" in (run.folder / "README.md").read_text()
    assert f"these are answers of {head} ({asked})" in run.summary()
    # The recipe repeats it.
    cli._run(["train", f"--config={run.folder / 'recipe.yaml'}", f"--output_dir={tmp_path / 'again'}"])
    again = load_probe(tmp_path / "again" / "probe")
    assert again is not None
    assert again.joined == run.probe.joined != Joined()
    assert all(value.equal(run.probe.arrays[name]) for name, value in again.arrays.items())


def test_a_linear_probe_comes_back(tmp_path: Path) -> None:
    train, test = clusters(200, 3), clusters(50, 3, seed=1)
    head = fit_linear_head("ridge", train, train, list("abc"), CrossEntropyLoss(), accuracy)
    assert head.bias is not None
    joined = Joined(("one", "two"), ("three",), "mean_max", True)
    probe = linear_probe(head, joined)
    probe.save(tmp_path / "probe")
    loaded = load_probe(tmp_path / "probe")
    assert loaded is not None
    assert loaded.joined == joined
    assert loaded.settings == probe.settings == {"penalty": head.strength, "temperature": head.temperature}
    expected = test[0] @ head.weight.T + head.bias
    assert torch.allclose(loaded.logits(test[0], torch.zeros(50, 3)), expected, atol=1e-4)


def test_joined_features_are_kept(place: Path, tmp_path: Path, capsys: Any, monkeypatch: Any) -> None:
    monkeypatch.setenv("HFTL_HOME", str(tmp_path / "home"))

    def missing(*flags: str) -> str:
        cli._run(command(place, "cnn", tmp_path / "run", "--overwrite", *flags))
        line = next(line for line in capsys.readouterr().out.splitlines() if "runs once" in line)
        return line.partition("(")[2].partition(")")[0]

    count = f"{sum(1 for _ in (place / 'images').rglob('*.png'))} to compute"
    assert missing("--feature_layers=2") == count
    assert missing("--feature_layers=2", "--head=ridge") == "all in the cache"
    assert missing("--feature_layers=2", "--feature_pooling=model", "--head=knn") == "all in the cache"
    assert missing("--feature_layers=3") == count
    assert missing("--feature_layers=2", "--feature_pooling=mean") == count
    assert missing("--feature_layers=2", "--feature_pooling=max") == count
    assert missing("--feature_layers=1") == count
    assert missing("--feature_pooling=model") == "all in the cache"  # as without the flag
    assert not (tmp_path / "run" / "probe").exists()


def test_class_weights_reach_a_head_on_joined_features(place: Path, tmp_path: Path) -> None:
    found = []
    for weights in ("none", "balanced"):
        flags = ("--feature_layers=2", "--max_train_samples=23", f"--class_weights={weights}")
        cli._run(command(place, "bert", tmp_path / weights, *flags))
        probe = load_probe(tmp_path / weights / "probe")
        assert probe is not None
        found.append(probe.arrays["weight"])
    assert not found[0].equal(found[1])


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
        ("roberta", ["--feature_layers=2"], "--feature_layers 2 cannot be: the head is more than one linear layer"),
        (
            "roberta",
            ["--feature_pooling=max"],
            "--feature_pooling max cannot be: the head is more than one linear layer",
        ),
        ("cnn", ["--feature_layers=2", "--augmentation=light"], "--feature_layers 2 cannot be: --augmentation light"),
        ("bert", ["--feature_layers=2", "--num_train_epochs=2"], "--feature_layers 2: the head is fitted, not trained"),
        ("bert", ["--feature_layers=2", "--loss=focal"], "--feature_layers 2: .* leave out --loss focal"),
        ("bert", ["--feature_layers=2", "--head=knn", "--class_weights=balanced"], "--head knn weighs no classes"),
    ],
)
def test_heads_that_cannot_be(place: Path, tmp_path: Path, model: str, flags: list[str], message: str) -> None:
    with pytest.raises(hftl.UsageError, match=message):
        cli._run(command(place, model, tmp_path / "run", *flags))
    assert not (tmp_path / "run").exists()
