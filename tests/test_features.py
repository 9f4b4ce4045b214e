"""Kept activations: the same training as without, whatever the architecture; a cache that survives what may happen."""

from __future__ import annotations

import dataclasses
import errno
import json
import multiprocessing
import os
import shutil
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import small_data
import tiny_models
import torch
from forked import ROOT, run_ranks
from safetensors.torch import load_file
from tiny_models import TINY, tiny_inputs
from tiny_training import tiny_arguments

import hftl
from hftl import batches, cli, features, methods, shards, sources
from hftl.cut import Cut, NoCut
from hftl.losses import CrossEntropyLoss
from hftl.methods.plan import prepare_modules
from hftl.shards import NotKept, Shards


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HFTL_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


# --- the cut ---------------------------------------------------------------------------------------------------------

#: architecture and method that cannot be cut, and why
UNCUT = {
    ("timm_densenet121", "partial"): "no single tensor",  # a dense layer reads a list of all before it
    ("timm_deit_tiny_distilled", "frozen"): "need more",  # two heads
    ("albert", "partial"): "more than once",  # one layer, shared
}


def two_batches(model: Any) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    one, other = tiny_inputs(model, batch=2), tiny_inputs(model, batch=3)
    if "input_ids" in other:
        other = {name: torch.cat([value, value[:, :8]], dim=1) for name, value in other.items()}
    return one, other


@pytest.mark.parametrize("method", ["frozen", "partial"])
@pytest.mark.parametrize("name", TINY)
def test_the_rest_of_the_model_gives_the_same_outputs_and_gradients(name: str, method: str) -> None:
    torch.manual_seed(0)
    model = TINY[name]()
    flags = ["--method=partial", "--unfreeze_blocks=1"] if method == "partial" else ["--method=frozen"]
    stage = methods.build_plan(model, tiny_arguments(model, *flags)).stages[0]
    frozen = prepare_modules(model, stage)
    both = two_batches(model)
    if (name, method) in UNCUT:
        with pytest.raises(NoCut, match=UNCUT[name, method]):
            Cut(model, stage, frozen, both)
        assert not any("forward" in vars(module) for module in model.modules())
        return
    cut = Cut(model, stage, frozen, both)
    prepare_modules(model, stage)

    def gradients(run: Any) -> dict[str, torch.Tensor]:
        model.zero_grad()
        torch.manual_seed(1)
        run()["logits"].square().sum().backward()
        return {key: value.grad.clone() for key, value in model.named_parameters() if value.grad is not None}

    expected = gradients(lambda: model(**both[1]))
    kept = cut.capture(model, both[1])
    with cut.installed():
        found = gradients(lambda: model(**cut.inputs(kept, {key: both[1][key] for key in cut.carried})))
    assert expected.keys() == found.keys() == stage.trainable & expected.keys() != set()
    for key, value in expected.items():
        assert torch.allclose(found[key], value, rtol=1e-4, atol=1e-6), key
    assert not any("forward" in vars(module) for module in model.modules())  # an ordinary model again


# --- training on it --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = small_data.write_both(tmp_path_factory.mktemp("features"))
    tiny_models.write_tiny_cnn(folder / "cnn")
    tiny_models.write_tiny_image_model(folder / "vit", kind="vit")
    tiny_models.write_tiny_text_model(folder / "bert", kind="bert")
    tiny_models.write_tiny_text_model(folder / "gpt2", kind="gpt2")
    return folder


def train(place: Path, model: str, run: Path, *flags: str) -> hftl.Run:
    images = model in ("cnn", "vit")
    task = "image" if images else "text"
    common = [f"--dataset={place / f'{task}s'}", f"--model={place / model}", f"--output_dir={run}", "--overwrite"]
    common += ["--logging_steps=1", "--per_device_train_batch_size=8", "--report_to=none"]
    return cli.run_recipe(ROOT / "recipes" / f"{task}_classification.py", [*common, *flags])


def log(run: Path, name: str) -> list[float]:
    lines = [json.loads(line) for line in (run / "logs" / "log.jsonl").read_text().splitlines()]
    return [line[name] for line in lines if name in line]


@pytest.mark.parametrize("method", ["frozen", "partial"])
@pytest.mark.parametrize("model", ["cnn", "vit", "bert", "gpt2"])
def test_kept_activations_train_as_the_whole_model(
    place: Path, tmp_path: Path, model: str, method: str, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = [f"--method={method}", "--num_train_epochs=2", "--feature_cache_dtype=float32"]
    flags += ["--unfreeze_blocks=1"] if method == "partial" else []
    flags += ["--augmentation=none"] if model in ("cnn", "vit") else []
    train(place, model, tmp_path / "kept", "--feature_cache=on", *flags)
    assert "the frozen part runs once" in capsys.readouterr().out
    train(place, model, tmp_path / "whole", "--feature_cache=off", *flags)
    assert "the frozen part runs once" not in capsys.readouterr().out
    for name in ("loss", "eval_loss"):
        whole = log(tmp_path / "whole", name)
        assert whole
        assert log(tmp_path / "kept", name) == pytest.approx(whole, rel=1e-4)
    one, other = (load_file(tmp_path / run / "model.safetensors") for run in ("kept", "whole"))
    assert all(torch.allclose(one[name].float(), value.float(), atol=1e-4) for name, value in other.items())


def test_only_what_is_new_is_computed(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    computed = counted_rows(monkeypatch)

    def missing(*flags: str, model: str = "cnn", data: Path = place) -> str:
        train(data, model, tmp_path / "run", *flags)
        line = next(line for line in capsys.readouterr().out.splitlines() if "runs once" in line)
        return line.partition("(")[2].partition(")")[0]

    grown = tmp_path / "grown"
    shutil.copytree(place / "images", grown / "images")
    for name in ("cnn", "vit"):
        os.symlink(place / name, grown / name)
    first = missing("--method=frozen")
    count = int(first.split()[0])
    assert first == f"{count} to compute"
    assert count == sum(1 for _ in (place / "images").rglob("*.png"))
    assert missing("--method=frozen", "--seed=7", "--validation_fraction=0.2") == "all in the cache"
    assert missing("--method=lp_ft", "--max_train_samples=10", "--num_train_epochs=1") == "all in the cache"
    assert missing("--method=frozen", model="vit") == f"{count} to compute"  # other weights
    assert missing("--method=frozen", "--image_size=48") == f"{count} to compute"
    # Another place and another name of a class are no other content.
    label = next(path for path in sorted((grown / "images" / "train").iterdir()))
    for split in ("train", "val", "test"):
        (grown / "images" / split / label.name).rename(grown / "images" / split / "renamed")
    assert missing("--method=frozen", data=grown) == "all in the cache"
    small_data.write_images(tmp_path / "more", {"train": 9, "val": 3, "test": 5}, size=44)
    for path in (tmp_path / "more" / "train").rglob("*.png"):
        shutil.copy(path, grown / "images" / "train" / "renamed" / f"new-{path.parent.name}-{path.name}")
    new = sum(1 for _ in (grown / "images").rglob("new-*"))
    computed.clear()
    assert missing("--method=frozen", data=grown) == f"{new} to compute"
    assert sum(computed) == new  # those beside them in the list are not computed again
    for path in [*(grown / "images").rglob("new-*")]:
        shutil.copy2(path, path.with_name(f"again-{path.name}"))  # with its time
    shutil.rmtree(tmp_path / "home")
    computed.clear()
    missing("--method=frozen", data=grown)
    assert sum(computed) == count + new + min(32, count)  # equal ones once, and the first batch to see how to keep it


def counted_rows(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Rows of every batch that goes through the frozen part."""
    counted: list[int] = []
    capture = features._Extraction.capture

    def counts(extraction: Any, batch: Any) -> torch.Tensor:
        kept = capture(extraction, batch)
        counted.append(len(kept))
        return kept

    monkeypatch.setattr(features._Extraction, "capture", counts)
    return counted


def extraction(model: torch.nn.Module, source: Any, precision: str = "fp32") -> Any:
    arguments = SimpleNamespace(precision=precision, device=torch.device("cpu"))
    made = features._Extraction(SimpleNamespace(arguments=arguments), model, source, None)
    vars(made)["batch"] = {"pixel_values": torch.randn(4, 3, 8, 8)}
    return made


def test_a_norm_behind_the_boundary_is_not_folded_into_what_is_before_it() -> None:
    class Net(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm, self.head = torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4), torch.nn.Linear(4, 2)
            self.norm.running_mean.fill_(0.5)

        def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
            return self.head(self.norm(self.conv(pixel_values)).mean(dim=(2, 3)))

    def entering(name: str) -> Any:
        def capture(model: Any, batch: Any) -> torch.Tensor:
            seen: list[torch.Tensor] = []
            hook = model.get_submodule(name).register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
            with torch.no_grad():
                model(**batch)
            hook.remove()
            return seen[0]

        return SimpleNamespace(capture=capture)

    net = Net().eval()
    assert not any(isinstance(part, torch.nn.BatchNorm2d) for part in extraction(net, entering("head")).fast.modules())
    assert extraction(net, entering("norm")).fast is net


def test_activations_in_float16_are_compared_in_float16() -> None:
    layer = torch.nn.Linear(6, 2)
    source = SimpleNamespace(is_solvable=False, carried=(), outputs=lambda kept, carried: layer(kept))
    half = extraction(layer, source, "fp16")
    vars(half)["first"] = torch.randn(4, 6).half()
    assert half.smallest_type == "float16"


def test_flags_of_a_recipe_of_ones_own_make_other_features() -> None:
    @dataclasses.dataclass
    class Own(hftl.ImageArguments):
        cutoff: int = 0
        method: str = "frozen"  # one of hftl's, with another default

    assert features._own_flags(hftl.parse(Own, ["--model=random:vit", "--cutoff=5"])) == {"cutoff": 5}
    assert features._own_flags(hftl.parse(hftl.ImageArguments, ["--model=random:vit"])) == {}


def test_what_was_read_does_not_stay_in_memory(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_rows(str(home), 0)
    rows = Shards(home / "both", dict)
    released: list[int] = []
    monkeypatch.setattr(shards, "_UNRELEASED", 10 * 3 * 4)  # ten rows
    monkeypatch.setattr(shards._Shard, "release", lambda shard: released.append(1))
    for place in rows.find(np.arange(100, dtype=np.uint64)):
        rows.read(place)
    assert len(released) == 9 * 10  # of ten shards, nine times


def test_views_are_augmented_and_kept(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--method=frozen", "--feature_views=3", "--augmentation=light"]
    train(place, "cnn", tmp_path / "one", *flags)
    rows = sum(1 for _ in (place / "images" / "train").rglob("*.png"))
    others = sum(1 for _ in (place / "images").rglob("*.png")) - rows
    assert f"{3 * rows + others} to compute" in capsys.readouterr().out
    train(place, "cnn", tmp_path / "two", *flags, "--seed=3")
    assert "all in the cache" in capsys.readouterr().out
    train(place, "cnn", tmp_path / "trained", *flags, "--num_train_epochs=3")
    assert len(set(log(tmp_path / "trained", "loss"))) > 3


def test_a_solved_head_takes_every_view(home: Path) -> None:
    write_rows(str(home), 0)
    rows = Shards(home / "both", dict)
    places = np.stack([rows.find(np.arange(first, first + 3, dtype=np.uint64)) for first in (0, 50)])
    values, labels = features.KeptDataset(rows, places, SimpleNamespace(labels=[0, 1, 1]), ()).matrix()
    assert values[:, 0].tolist() == [0.0, 1.0, 2.0, 50.0, 51.0, 52.0]
    assert values.equal(torch.stack([rows.read(place) for place in places.reshape(-1, 3)]))
    assert labels.tolist() == [0, 1, 1, 0, 1, 1]


@pytest.mark.parametrize("method", ["--method=frozen --head_solver=sgd --num_train_epochs=2", "--method=partial"])
def test_the_default_augmentation_does_not_depend_on_the_cache(place: Path, tmp_path: Path, method: str) -> None:
    flags = [*method.split(), "--precision=fp32", "--feature_cache_dtype=float32"]
    train(place, "cnn", tmp_path / "kept", *flags)
    train(place, "cnn", tmp_path / "off", *flags, "--feature_cache=off")
    train(place, "cnn", tmp_path / "again", f"--config={tmp_path / 'off' / 'recipe.yaml'}")
    train(place, "cnn", tmp_path / "anew", *flags, "--feature_views=0")
    train(place, "cnn", tmp_path / "asked", *flags, "--augmentation=light")
    assert log(tmp_path / "off", "loss") == pytest.approx(log(tmp_path / "kept", "loss"), rel=1e-4)
    assert log(tmp_path / "again", "loss") == log(tmp_path / "off", "loss")
    assert log(tmp_path / "anew", "loss") == log(tmp_path / "asked", "loss")
    assert log(tmp_path / "anew", "loss") != log(tmp_path / "off", "loss")


@pytest.mark.parametrize("flags", [[], ["--augmentation=strong"], ["--random_erasing=0.5"], ["--feature_cache=off"]])
def test_a_recipe_augments_as_the_run_that_wrote_it(place: Path, tmp_path: Path, flags: list[str]) -> None:
    train(place, "cnn", tmp_path / "one", "--method=partial", "--unfreeze_blocks=1", "--max_steps=4", *flags)
    train(place, "cnn", tmp_path / "two", f"--config={tmp_path / 'one' / 'recipe.yaml'}")
    assert log(tmp_path / "one", "loss") == log(tmp_path / "two", "loss")


def test_flags_beside_a_recipe_change_what_followed_from_others(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train(place, "cnn", tmp_path / "one", "--method=frozen")
    recipe = f"--config={tmp_path / 'one' / 'recipe.yaml'}"
    capsys.readouterr()
    train(place, "cnn", tmp_path / "two", recipe, "--augmentation=strong", "--max_steps=2")
    assert "--augmentation strong changes the images every epoch" in capsys.readouterr().out
    train(place, "cnn", tmp_path / "three", recipe, "--method=partial", "--unfreeze_blocks=1", "--max_steps=2")
    assert "last 1 blocks" in capsys.readouterr().out
    with pytest.raises(hftl.UsageError, match="fits no head alone"):
        train(place, "cnn", tmp_path / "four", recipe, "--method=full", "--head_solver=lbfgs")
    train(place, "cnn", tmp_path / "five", recipe, "--method=frozen")  # the same method: solved again
    assert "head: solved" in capsys.readouterr().out
    train(place, "cnn", tmp_path / "six", recipe, "--num_train_epochs=2")
    assert "head: solved" not in (said := capsys.readouterr().out)
    assert "2 epochs" in said
    train(place, "cnn", tmp_path / "seven", recipe, "--horizontal_flip=true", "--max_steps=2")
    assert "--horizontal_flip true changes the images every epoch" in capsys.readouterr().out


@pytest.mark.parametrize(
    "flags",
    [
        ["--method=frozen"], ["--method=full", "--num_train_epochs=1"], ["--loss=focal"], ["--sampler=balanced"],
        ["--word_dropout=0.1"], ["--reinit_blocks=1"], ["--max_steps=2"], ["--feature_cache=off"],
    ],
)  # fmt: skip
def test_flags_go_with_the_recipe_of_the_default_method(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: list[str]
) -> None:
    train(place, "bert", tmp_path / "one", "--num_train_epochs=1")
    assert "stage 1 of 2: head" in (said := capsys.readouterr().out)
    assert "head: solved" in said
    run = train(place, "bert", tmp_path / "two", f"--config={tmp_path / 'one' / 'recipe.yaml'}", *flags)
    assert "penalty" not in run.metrics["train"]["stages"][0]  # not solved any more
    said = capsys.readouterr().out
    assert "--head_epochs asks" not in said
    assert ("from the configuration of --method lp_ft: learning_rate " in said) == ("--method" in flags[0])


@pytest.mark.parametrize(
    ("model", "flags"),
    [("bert", ["--penalty=l2_sp"]), ("bert", ["--average=ema"]), ("cnn", ["--augmentation=trivial", "--mixup=0.2"])],
)
def test_a_head_is_solved_beside_other_flags_too(place: Path, tmp_path: Path, model: str, flags: list[str]) -> None:
    train(place, model, tmp_path / "one", "--num_train_epochs=1")
    run = train(place, model, tmp_path / "two", f"--config={tmp_path / 'one' / 'recipe.yaml'}", *flags)
    assert "penalty" in run.metrics["train"]["stages"][0]


def test_augmentation_that_was_asked_for_stays_beside_other_flags(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train(place, "cnn", tmp_path / "one", "--method=frozen", "--augmentation=strong", "--max_steps=2")
    recipe = f"--config={tmp_path / 'one' / 'recipe.yaml'}"
    capsys.readouterr()
    train(place, "cnn", tmp_path / "two", recipe, "--max_steps=3")
    assert "--augmentation strong changes the images every epoch" in capsys.readouterr().out
    train(place, "cnn", tmp_path / "three", recipe, "--augmentation=none")  # of which there is nothing to keep anew
    assert "the frozen part runs once" in capsys.readouterr().out
    train(place, "cnn", tmp_path / "four", recipe, "--method=full")
    assert "stage: all" in capsys.readouterr().out


def test_epochs_of_the_head_beside_a_recipe_train_it(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train(place, "bert", tmp_path / "one", "--method=lp_ft", "--num_train_epochs=1")
    assert "head: solved" in capsys.readouterr().out
    train(place, "bert", tmp_path / "two", f"--config={tmp_path / 'one' / 'recipe.yaml'}", "--head_epochs=2")
    assert "head: trained by SGD, as --head_epochs asks" in capsys.readouterr().out


def test_little_that_is_frozen_is_not_kept_and_that_is_said(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--method=partial", "--unfreeze_blocks=3", "--max_steps=1"]
    train(place, "bert", tmp_path / "one", *flags)
    assert "features: not kept, since less than half of the blocks is frozen" in capsys.readouterr().out
    train(place, "bert", tmp_path / "two", *flags, "--feature_cache=on")
    assert "runs once for each of" in capsys.readouterr().out


@pytest.mark.parametrize("asked", ["--augmentation strong", "--horizontal_flip true"])
def test_explicit_augmentation_is_not_dropped(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], asked: str
) -> None:
    train(place, "cnn", tmp_path / "run", "--method=frozen", asked.replace(" ", "="), "--max_steps=2")
    assert f"{asked} changes the images every epoch" in capsys.readouterr().out


# --- the solved head -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", ["cnn", "bert", "gpt2"])
def test_a_solved_head_is_the_models_ordinary_one(place: Path, tmp_path: Path, model: str) -> None:
    run = train(place, model, tmp_path / "run", "--method=frozen")
    before = load_file(place / model / "model.safetensors")
    after = load_file(run.folder / "model.safetensors")
    short = {name.split(".", 1)[-1]: value for name, value in after.items()} | after  # or a body alone
    same = [name for name, value in before.items() if name in short and short[name].shape == value.shape]
    assert len(same) >= len(after) - 2
    assert [name for name in same if not before[name].equal(short[name])] == []  # the backbone and its statistics
    stage = run.metrics["train"]["stages"][0]
    assert stage["penalty"] > 0
    scores = run.evaluate(str(place / ("images" if model == "cnn" else "texts")), "test")
    assert scores["log_loss"] == pytest.approx(run.metrics["test"]["log_loss"], abs=2e-3)
    recipe = (run.folder / "recipe.yaml").read_text()
    again = cli.run_recipe(
        ROOT / "recipes" / f"{run.task.modality.name}_classification.py",
        [f"--config={run.folder / 'recipe.yaml'}", f"--output_dir={tmp_path / 'again'}"],
    )
    assert "head_solver" in recipe
    assert load_file(again.folder / "model.safetensors").keys() == after.keys()
    assert all(value.equal(after[name]) for name, value in load_file(again.folder / "model.safetensors").items())


def test_lp_ft_starts_from_a_solved_head(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = train(place, "cnn", tmp_path / "run", "--method=lp_ft", "--num_train_epochs=1")
    first, second = run.metrics["train"]["stages"]
    assert "penalty" in first
    assert second["trainable_parameters"] == second["total_parameters"]
    out = capsys.readouterr().out
    assert "stage 1 of 2: head" in out
    assert "solved on the features" in out


@pytest.mark.parametrize("method", ["lp_ft", "gradual"])
def test_a_head_before_other_stages_is_solved_on_plain_images(place: Path, tmp_path: Path, method: str) -> None:
    """What changes the images is for the stages behind it."""
    flags = [f"--method={method}", "--num_train_epochs=1", "--logging_steps=1", "--precision=fp32"]
    runs = {"plain": [], "changed": ["--augmentation=strong", "--mixup=0.5"]}
    stages = {
        name: train(place, "cnn", tmp_path / name, *flags, *asked).metrics["train"]["stages"]
        for name, asked in runs.items()
    }
    assert stages["plain"][0]["penalty"] == stages["changed"][0]["penalty"]
    assert log(tmp_path / "plain", "loss") != log(tmp_path / "changed", "loss")
    repeated = train(place, "cnn", tmp_path / "two", f"--config={tmp_path / 'changed' / 'recipe.yaml'}")
    assert log(tmp_path / "two", "loss") == log(tmp_path / "changed", "loss")
    assert "penalty" in repeated.metrics["train"]["stages"][0]
    train(place, "cnn", tmp_path / "anew", *flags, "--feature_views=0")
    assert "penalty" not in json.loads((tmp_path / "anew" / "metrics.json").read_text())["train"]["stages"][0]


@pytest.mark.parametrize("flags", [[], ["--soup_runs=2"], ["--wise_ft=true"]])
def test_lp_ft_scales_a_solved_head_down(place: Path, tmp_path: Path, flags: list[str]) -> None:
    train(place, "vit", tmp_path / "head", "--method=frozen", "--precision=fp32")
    still = ["--learning_rate=1e-12", "--num_train_epochs=1", "--precision=fp32"]
    train(place, "vit", tmp_path / "both", "--method=lp_ft", *still, *flags)
    solved, found = (load_file(tmp_path / name / "model.safetensors") for name in ("head", "both"))
    assert solved["classifier.weight"].abs().max() > 1e-3
    for name in ("classifier.weight", "classifier.bias"):
        assert torch.allclose(0.1 * solved[name], found[name], atol=1e-6)


def test_lp_ft_does_not_start_from_a_head_that_blows_every_step_up(place: Path, tmp_path: Path) -> None:
    """The features of a random BERT hardly differ from row to row: what tells them apart has weights of thousands."""
    run = train(place, "bert", tmp_path / "run", "--method=lp_ft", "--num_train_epochs=2")
    head, _ = run.metrics["train"]["stages"]
    assert head["gain"] > 1000
    losses = log(run.folder, "loss")
    assert losses
    assert max(losses) < 10  # with a tenth of the head hundreds


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_head_is_the_same_as_before_where_all_that_it_follows_from_is(dtype: torch.dtype) -> None:
    wanted, loss = ("logistic", ["a", "b"], True, "accuracy"), CrossEntropyLoss()
    rows, labels = torch.randn(9, 4, generator=torch.Generator().manual_seed(0)).to(dtype), torch.arange(9) % 2
    layer = (torch.ones(2, 4), None)

    train, held_out = (rows, labels), (rows[:6] + 1, labels[:6])

    def key(
        settings: Any = wanted, loss: Any = loss, one: Any = train, two: Any = held_out, start: Any = None
    ) -> bytes:
        return features._key_of_solution(settings, loss, one, two, start)

    moved = torch.nextafter(rows[:1], torch.full_like(rows[:1], 9.0))
    changed = [
        key(("svm", *wanted[1:])),
        key((*wanted[:3], "f1_macro")),
        key(loss=CrossEntropyLoss(torch.tensor([0.5, 1.5]))),
        key(loss=CrossEntropyLoss(label_smoothing=0.1)),
        key(one=(torch.cat([moved, rows[1:]]), labels)),
        key(one=(rows, 1 - labels)),
        key(two=(rows[:6], labels[:6])),
        key(two=(held_out[0], 1 - labels[:6])),
        key(start=layer),
        key(start=(torch.ones(2, 4), torch.ones(2))),
    ]
    assert key() == key(loss=CrossEntropyLoss(), one=(rows.clone(), labels))
    assert len({key(), *changed}) == 1 + len(changed)


def test_settings_of_training_train_the_head(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = train(place, "cnn", tmp_path / "run", "--method=frozen", "--head_learning_rate=0.01", "--num_train_epochs=1")
    assert "trained by SGD, as --head_learning_rate asks" in capsys.readouterr().out
    assert "penalty" not in run.metrics["train"]["stages"][0]


# --- what can happen to the cache ------------------------------------------------------------------------------------


def shards_folder(home: Path) -> Path:
    return next((home / "features").iterdir())


def test_a_damaged_shard_is_made_again(
    place: Path, tmp_path: Path, home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train(place, "cnn", tmp_path / "one", "--method=frozen")
    expected = load_file(tmp_path / "one" / "model.safetensors")
    for damage in ("flip", "cut", "index", "encrypted"):
        capsys.readouterr()
        shard = next(shards_folder(home).glob("*.bin" if damage in ("flip", "cut") else "*.npz"))
        content = bytearray(shard.read_bytes())
        if damage == "encrypted":  # says the zip's directory: one bit
            content[content.index(b"PK\x01\x02") + 8] |= 1
        else:
            content[len(content) // 2] ^= 0xFF
        shard.write_bytes(content[: len(content) // 3] if damage == "cut" else content)
        train(place, "cnn", tmp_path / "two", "--method=frozen")
        out = capsys.readouterr().out
        assert "is damaged" in out, damage
        assert "to compute" in out, damage
        found = load_file(tmp_path / "two" / "model.safetensors")
        assert all(found[name].equal(value) for name, value in expected.items())


def test_an_interrupted_extraction_goes_on(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(batches, "_TOKENS_ON_CPU", 1)  # one row at a time
    monkeypatch.setattr(features, "_SHARD_BYTES", 1)
    train(place, "bert", tmp_path / "whole", "--method=partial", "--num_train_epochs=1")
    shutil.rmtree(tmp_path / "home")
    write = Shards.write
    calls = 0

    def stop(*arguments: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise KeyboardInterrupt
        write(*arguments)

    monkeypatch.setattr(Shards, "write", stop)
    with pytest.raises(KeyboardInterrupt):
        train(place, "bert", tmp_path / "run", "--method=partial", "--num_train_epochs=1")
    monkeypatch.setattr(Shards, "write", write)
    capsys.readouterr()
    train(place, "bert", tmp_path / "run", "--method=partial", "--num_train_epochs=1")
    line = next(line for line in capsys.readouterr().out.splitlines() if "runs once" in line)
    rows, missing = int(line.split("each of ")[1].split()[0]), int(line.split("(")[1].split()[0])
    assert missing == rows - 3
    one, other = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "run"))
    assert all(other[name].equal(value) for name, value in one.items())


@pytest.mark.parametrize("full", [False, True])
def test_an_interruption_loses_nothing_that_was_computed(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], full: bool
) -> None:
    monkeypatch.setattr(batches, "_TOKENS_ON_CPU", 1)  # one row at a time
    prepared, write = batches.prepared, Shards.write
    flags = ["--method=frozen", "--precision=fp32"]

    def stop_later(*arguments: Any) -> Any:
        for number, batch in enumerate(prepared(*arguments)):
            if number == 5:
                raise KeyboardInterrupt
            yield batch

    def no_space(*_: Any) -> None:
        raise NotKept("the disk is full")

    monkeypatch.setattr(batches, "prepared", stop_later)
    monkeypatch.setattr(Shards, "write", no_space if full else write)
    with pytest.raises(KeyboardInterrupt):
        train(place, "bert", tmp_path / "run", *flags)
    monkeypatch.setattr(batches, "prepared", prepared)
    monkeypatch.setattr(Shards, "write", write)
    capsys.readouterr()
    train(place, "bert", tmp_path / "run", *flags)
    line = next(line for line in capsys.readouterr().out.splitlines() if "runs once" in line)
    rows, missing = int(line.split("each of ")[1].split()[0]), int(line.split("(")[1].split()[0])
    assert missing == rows - (0 if full else 5)


def test_trained_and_solved_heads_share_what_the_output_layer_reads(
    place: Path, tmp_path: Path, home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("cnn", "vit"):
        train(place, name, tmp_path / "sgd", "--method=frozen", "--head_solver=sgd", "--max_steps=2")
        assert "to compute" in capsys.readouterr().out
        train(place, name, tmp_path / name, "--method=frozen")
        assert "all in the cache" in capsys.readouterr().out
    shutil.rmtree(home / "features")
    cold = train(place, "cnn", tmp_path / "cold", "--method=frozen")
    train(place, "cnn", tmp_path / "sgd", "--method=frozen", "--head_solver=sgd", "--max_steps=2")
    assert "all in the cache" in capsys.readouterr().out
    one, other = (load_file(folder / "model.safetensors") for folder in (cold.folder, tmp_path / "cnn"))
    assert all(torch.allclose(other[name], value, atol=1e-5) for name, value in one.items())
    for solver in ("sgd", "lbfgs"):  # the pooler trains in one of them
        train(place, "bert", tmp_path / solver, "--method=frozen", f"--head_solver={solver}")
        assert "to compute" in capsys.readouterr().out


def test_a_head_that_cannot_be_solved_without_the_cache_is_told(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train(place, "cnn", tmp_path / "run", "--method=frozen", "--feature_cache=off")
    assert "head: trained by SGD, since --feature_cache off keeps nothing" in capsys.readouterr().out
    train(place, "cnn", tmp_path / "run", "--method=frozen", "--feature_cache=off", "--max_steps=1")
    assert "head: trained by SGD, as --max_steps asks\n" in capsys.readouterr().out


@pytest.mark.parametrize("flags", [["--method=frozen", "--head_solver=sgd"], ["--method=partial"], ["--method=frozen"]])
def test_the_time_of_features_counts_as_training(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flags: list[str]
) -> None:
    made = features.KeptFeatures.__init__

    def slow(self: Any, *arguments: Any) -> None:
        made(self, *arguments)
        self.seconds += 1000

    monkeypatch.setattr(features.KeptFeatures, "__init__", slow)
    trained = train(place, "cnn", tmp_path / "run", *flags).metrics["train"]
    assert trained["seconds"] > 1000
    assert trained["samples_per_second"] < 10


def test_a_cache_that_cannot_be_written_is_said(
    place: Path, tmp_path: Path, home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    home.mkdir()
    (home / "features").write_text("in the way")
    train(place, "cnn", tmp_path / "run", "--method=frozen", "--num_train_epochs=1")
    assert "features: not kept, since" in capsys.readouterr().out
    (home / "features").unlink()
    train(place, "cnn", tmp_path / "run", "--method=frozen", "--num_train_epochs=1", "--feature_cache_gb=0.000001")
    out = capsys.readouterr().out
    assert "more than --feature_cache_gb 1e-06" in out
    assert "hftl cache rm" in out


def test_features_that_do_not_fit_into_memory_are_not_solved_on(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(available=1_000))
    train(place, "cnn", tmp_path / "run", "--method=frozen")
    said = capsys.readouterr().out
    assert "features: not kept, since solving a head holds them in memory" in said
    assert "and the head is trained by SGD" in said


@pytest.mark.parametrize("method", ["frozen", "partial"])
def test_a_disk_that_is_full_ends_the_keeping_not_the_run(
    place: Path, tmp_path: Path, home: Path, monkeypatch: pytest.MonkeyPatch, method: str, capsys: Any
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    flags = [f"--method={method}", "--num_train_epochs=2", "--augmentation=none"]
    train(place, "cnn", tmp_path / "without", *flags, "--feature_cache=off")
    monkeypatch.setattr("hftl.shards.np.savez", full)
    capsys.readouterr()
    train(place, "cnn", tmp_path / "run", *flags)
    assert "features: not kept, since the cache cannot be written: No space left" in capsys.readouterr().out
    assert log(tmp_path / "run", "loss") == log(tmp_path / "without", "loss")
    assert not [*home.glob("features/*/*.bin")]


def test_another_run_may_remove_the_cache(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    reload = Shards.reload

    def remove(shards: Shards) -> None:
        reload(shards)
        shutil.rmtree(shards.folder)

    monkeypatch.setattr(Shards, "reload", remove)
    train(place, "cnn", tmp_path / "run", "--method=frozen", "--num_train_epochs=1")
    assert "cannot be written: its folder was removed meanwhile" in capsys.readouterr().out


def test_another_run_may_empty_the_cache(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    reload, emptied = Shards.reload, []

    def empty_once(shards: Shards) -> None:
        if not emptied and any(shards.folder.glob("*.npz")):
            emptied.append(True)
            for path in [*shards.folder.glob("*.npz"), *shards.folder.glob("*.bin")]:
                path.unlink()
        reload(shards)

    monkeypatch.setattr(Shards, "reload", empty_once)
    run = train(place, "cnn", tmp_path / "run", "--method=frozen")
    assert emptied
    assert "penalty" in run.metrics["train"]["stages"][0]


def test_two_processes_fill_one_cache(home: Path) -> None:
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=write_rows, args=(str(home), start)) for start in (0, 50)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
        assert process.exitcode == 0
    rows = Shards(home / "both", dict)
    places = rows.find(np.arange(150, dtype=np.uint64))
    assert (places[:, 0] >= 0).all()
    assert [float(rows.read(place)[0]) for place in places] == list(range(150))
    assert (rows.find(np.array([999], dtype=np.uint64))[:, 0] == -1).all()


def test_a_shard_that_is_being_written_is_left_alone(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (home / "busy").mkdir(parents=True)
    (home / "busy" / ".half.npz").touch()
    Shards(home / "busy", lambda: {"dtype": "float32", "shape": [3], "ragged": False})
    assert (home / "busy" / ".half.npz").is_file()
    assert capsys.readouterr().out == ""


def write_rows(home: str, start: int) -> None:
    """A hundred rows, in shards of ten; half of them another process writes too."""
    settings = {"dtype": "float32", "shape": [3], "ragged": False}
    shards = Shards(Path(home) / "both", lambda: settings)
    for first in range(start, start + 100, 10):
        keys = np.arange(first, first + 10, dtype=np.uint64)
        shards.write(keys, [torch.full((3,), float(key)) for key in keys])


def test_what_suits_one_data_set_is_asked_anew_for_another(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    half, other = tmp_path / "half", tmp_path / "other"
    shutil.copytree(place / "images", other)
    for path in other.rglob("*.png"):
        path.write_bytes(path.read_bytes() + b"another file")
    train(place, "cnn", half, "--method=frozen")
    assert "MB as float16" in capsys.readouterr().out
    monkeypatch.setattr(features, "_LARGEST", 0)  # no activation of the other data is small enough
    for state in ("to compute", "all in the cache"):
        train(place, "cnn", tmp_path / "run", "--method=frozen", f"--dataset={other}")
        out = capsys.readouterr().out
        assert "MB as float32" in out
        assert state in out
    train(place, "cnn", half, "--method=frozen")  # what is there needs no second look
    assert "MB as float16" in capsys.readouterr().out


def test_values_too_large_for_half_precision_are_refused(home: Path) -> None:
    shards = Shards(home / "half", lambda: {"dtype": "float16", "shape": [1], "ragged": False})
    with pytest.raises(NotKept, match="float32"):
        shards.write(np.array([1], dtype=np.uint64), [torch.tensor([1e6])])
    assert list((home / "half").glob("*.bin")) == []


# --- bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "flags", "message"),
    [
        ("cnn", ["--method=full", "--feature_cache=on"], "--method full trains the whole model"),
        ("cnn", ["--method=full", "--head_solver=lbfgs"], "--method full fits no head alone"),
        ("cnn", ["--method=frozen", "--head_solver=lbfgs", "--feature_cache=off"], "needs kept features"),
        (
            "bert",
            ["--method=frozen", "--head_solver=lbfgs", "--num_train_epochs=2"],
            "--num_train_epochs is for a head",
        ),
        ("bert", ["--method=lp_ft", "--head_solver=lbfgs", "--head_epochs=2"], "--head_epochs is for a head"),
        ("bert", ["--method=frozen", "--head_solver=lbfgs", "--learning_rate=auto"], "--learning_rate is for a head"),
        ("bert", ["--method=frozen", "--feature_views=2"], "has no augmentation"),
        ("cnn", ["--method=frozen", "--feature_views=2", "--augmentation=none"], "needs an augmentation"),
        ("cnn", ["--method=frozen", "--feature_views=-1"], "must be 0 or more"),
        ("cnn", ["--method=frozen", "--feature_views=0", "--feature_cache=on"], "changes the images every epoch"),
        (
            "cnn",
            ["--method=frozen", "--head=mlp", "--head_solver=lbfgs"],
            "solves a linear head, which --head mlp is not",
        ),
        ("cnn", ["--method=frozen", "--feature_views=2", "--feature_cache=off"], "leave out --feature_cache off"),
        ("cnn", ["--method=frozen", "--feature_cache=on", "--augmentation=light"], "changes the images every epoch"),
        ("cnn", ["--method=frozen", "--feature_cache=on", "--horizontal_flip=true"], "changes the images every epoch"),
        ("cnn", ["--method=frozen", "--feature_cache=yes"], "invalid choice"),
        ("bert", ["--method=lora", "--lora_blocks=99"], "--lora_blocks must lie between 1 and"),
        ("bert", ["--method=full", "--lora_blocks=1"], "does not use --lora_blocks"),
    ],
)
def test_wishes_that_cannot_be_met(place: Path, tmp_path: Path, model: str, flags: list[str], message: str) -> None:
    with pytest.raises(hftl.UsageError, match=message):
        train(place, model, tmp_path / "run", *flags)
    assert not (tmp_path / "run").exists()


def test_a_head_that_is_not_linear_cannot_be_solved(place: Path, tmp_path: Path) -> None:
    tiny_models.write_tiny_text_model(tmp_path / "roberta", kind="roberta")
    with pytest.raises(hftl.UsageError, match="--head_solver lbfgs cannot be: the head is more than one linear layer"):
        train(place, str(tmp_path / "roberta"), tmp_path / "run", "--method=frozen", "--head_solver=lbfgs")


# --- adapters, processes, the command line ---------------------------------------------------------------------------


def test_adapters_in_the_last_blocks_train_on_kept_activations(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--method=lora", "--lora_blocks=1", "--num_train_epochs=1", "--feature_cache_dtype=float32"]
    train(place, "bert", tmp_path / "kept", *flags)
    assert "the frozen part runs once" in capsys.readouterr().out
    train(place, "bert", tmp_path / "whole", *flags, "--feature_cache=off")
    assert log(tmp_path / "kept", "loss") == pytest.approx(log(tmp_path / "whole", "loss"), rel=1e-4)
    adapter = load_file(tmp_path / "kept" / "adapter" / "adapter_model.safetensors")
    blocks = {name.split(".layer.")[1].split(".")[0] for name in adapter if ".layer." in name}
    assert len(blocks) == 1


@pytest.mark.parametrize("slow", [0.0, float("inf")])
def test_files_that_come_slowly_are_read_by_threads(slow: float, monkeypatch: pytest.MonkeyPatch) -> None:
    readers = []

    class Rows:
        def __len__(self) -> int:
            return 9

        def key(self, index: int, full: bool) -> int:
            readers.append(threading.current_thread() is threading.main_thread())
            return 2**63 + index * (2 if full else 1)

    monkeypatch.setattr(sources, "_TRIED", 4)
    monkeypatch.setattr(sources, "_SLOW", slow)
    keys = features._keys(Rows(), SimpleNamespace(feature_cache_hash="full"))
    assert keys.tolist() == [2**63 + 2 * index for index in range(9)]
    assert readers[:4] == [True] * 4
    assert readers[4:] == [slow > 0] * 5


@pytest.mark.slow
def test_two_processes_share_the_extraction(place: Path, tmp_path: Path, home: Path) -> None:
    flags = [f"--dataset={place / 'texts'}", f"--model={place / 'bert'}", "--method=partial", "--unfreeze_blocks=1"]
    flags += ["--num_train_epochs=1", "--logging_steps=1", "--feature_cache_dtype=float32"]
    recipe = str(ROOT / "recipes" / "text_classification.py")
    words = [recipe, *flags, f"--output_dir={tmp_path / 'two'}", "--per_device_train_batch_size=4"]
    two, other = run_ranks(words, tmp_path, HFTL_HOME=str(home))
    assert (two.returncode, other.returncode) == (0, 0), two.stdout + two.stderr + other.stderr
    assert (two.stdout + other.stdout).count("the frozen part runs once") == 1
    words = [recipe, *flags[:2], "--method=frozen", f"--output_dir={tmp_path / 'solved'}"]
    for solved in run_ranks(words, tmp_path, HFTL_HOME=str(home)):
        assert solved.returncode == 0, solved.stdout + solved.stderr
    train(place, "bert", tmp_path / "one", "--method=partial", "--unfreeze_blocks=1", "--num_train_epochs=1")
    train(place, "bert", tmp_path / "alone", "--method=frozen")
    one, other = (json.loads((tmp_path / name / "metrics.json").read_text()) for name in ("alone", "solved"))
    assert other["test"]["log_loss"] == pytest.approx(one["test"]["log_loss"], rel=1e-2)
    assert other["test"]["accuracy"] == one["test"]["accuracy"]
    assert log(tmp_path / "two", "eval_loss") == pytest.approx(log(tmp_path / "one", "eval_loss"), rel=1e-2)


@pytest.mark.slow
def test_two_processes_keep_features_behind_a_first_stage(place: Path, tmp_path: Path, home: Path) -> None:
    """The checkpoint is of another class than the model with its head, whose name only the first process saves."""
    assert json.loads((place / "bert" / "config.json").read_text())["architectures"] == ["BertModel"]
    words = [str(ROOT / "recipes" / "text_classification.py"), f"--dataset={place / 'texts'}", "--method=gradual"]
    words += [f"--model={place / 'bert'}", f"--output_dir={tmp_path / 'two'}", "--feature_cache=on"]
    two, other = run_ranks(words, tmp_path, HFTL_HOME=str(home))
    assert (two.returncode, other.returncode) == (0, 0), two.stdout + two.stderr + other.stderr
    assert (two.stdout + other.stdout).count("the frozen part runs once") > 1
    assert "not kept" not in two.stdout + other.stdout


def test_the_cache_command(
    place: Path, tmp_path: Path, home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def read_only(*_: Any) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    train(place, "cnn", tmp_path / "run", "--method=frozen")
    capsys.readouterr()
    cli._run(["cache", "ls"])
    out = capsys.readouterr().out
    assert "cnn" in out
    assert "output layer" in out
    name = shards_folder(home).name
    cli._run(["cache", "size"])
    assert "MB" in capsys.readouterr().out
    with pytest.raises(hftl.UsageError, match="there is no"):
        cli._run(["cache", "rm", "nothing"])
    with monkeypatch.context() as patched:
        patched.setattr(Path, "rename", read_only)
        with pytest.raises(hftl.UsageError, match="cannot be removed: Read-only file system"):
            cli._run(["cache", "rm", "--all"])
    cli._run(["cache", "rm", name[:8]])
    assert not (home / "features" / name).exists()
    train(place, "cnn", tmp_path / "run", "--method=frozen")
    cli._run(["cache", "rm", "--all"])
    assert list((home / "features").iterdir()) == []


def test_checkpointed_activations_give_the_same_losses(place: Path, tmp_path: Path) -> None:
    flags = ["--method=partial", "--unfreeze_blocks=1", "--num_train_epochs=1", "--feature_cache=on"]
    train(place, "bert", tmp_path / "plain", *flags)
    train(place, "bert", tmp_path / "checkpointed", *flags, "--activation_checkpointing")
    assert log(tmp_path / "checkpointed", "loss") == pytest.approx(log(tmp_path / "plain", "loss"), rel=1e-5)


def test_a_failed_stage_leaves_an_ordinary_model(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Or the same plan, fitted again, would keep what the stubs give."""
    from hftl import training

    models: list[Any] = []

    def fail(trainer: Any, *others: Any) -> None:
        models.append(trainer.model)
        assert any("forward" in vars(module) for module in trainer.model.modules())
        raise hftl.UsageError("the loss is nan")

    monkeypatch.setattr(training, "_train_stage", fail)
    with pytest.raises(hftl.UsageError, match="nan"):
        train(place, "bert", tmp_path / "run", "--method=partial", "--unfreeze_blocks=1")
    assert not any("forward" in vars(module) for module in models[0].modules())
    assert not any(module._forward_pre_hooks for module in models[0].modules())


def test_a_cached_run_needs_no_room(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train(place, "cnn", tmp_path / "run", "--method=frozen")
    train(place, "cnn", tmp_path / "run", "--method=frozen", "--feature_cache_gb=0.000001", "--feature_cache=on")
    assert "all in the cache" in capsys.readouterr().out


def test_what_a_killed_process_left_is_removed_after_a_day(home: Path) -> None:
    settings = {"dtype": "float32", "shape": [1], "ragged": False}
    shards = Shards(home / "one", lambda: settings)
    shards.write(np.array([1], dtype=np.uint64), [torch.ones(1)])
    for name in (".a.bin", ".a.npz", "b.bin", "new.bin"):
        (home / "one" / name).write_bytes(b"half")
        os.utime(home / "one" / name, (0, 0) if name != "new.bin" else None)
    shards = Shards(home / "one", lambda: settings)
    assert (shards.find(np.array([1], dtype=np.uint64))[:, 0] == 0).all()
    assert {path.name for path in (home / "one").iterdir()} & {".a.bin", ".a.npz", "b.bin", "new.bin"} == {"new.bin"}
