"""Methods that select what trains, blocks that start anew, statistics taken anew: by the real commands."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import small_data
import torch
from safetensors.torch import load_file
from test_methods import FEW, RATES, fresh, plan_of, train
from tiny_models import tiny_inputs, write_timm_folder, write_tiny_text_model
from tiny_training import every_tensor, tiny_arguments, tiny_trainer
from torch import nn

import hftl
from hftl import backbones, cli
from hftl.arguments import TextArguments, parse
from hftl.losses import CrossEntropyLoss
from hftl.methods.reinit import reinitialise
from hftl.methods.selected import largest_relative_gradient


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("selected")
    torch.manual_seed(0)
    small_data.write_images(folder / "images", {"train": 12, "val": 4})
    small_data.write_texts(folder / "texts", {"train": 24, "dev": 8})
    write_timm_folder(folder / "cnn", "resnet18", channels=[8, 16, 16, 32], stem_width=8, zero_init_last=False)
    write_tiny_text_model(folder / "bert", kind="bert")
    return folder


def command(place: Path, model: str, run: str, *flags: str) -> list[str]:
    task, data = ("image", "images") if model == "cnn" else ("text", "texts")
    shared = ["--per_device_train_batch_size=8", "--num_train_epochs=1", "--dataloader_num_workers=0"]
    shared += ["--report_to=none", *(["--image_size=64"] if model == "cnn" else [])]
    paths = [f"--model={place / model}", f"--dataset={place / data}", f"--output_dir={place / run}"]
    return ["train", f"{task}-classification", *paths, *shared, *flags]


@pytest.mark.parametrize("method", ["bitfit", "norm"])
@pytest.mark.parametrize("name", [*FEW, "timm_efficientnet_lite0"])
def test_what_was_selected_moves_and_nothing_else(name: str, method: str, tmp_path: Path) -> None:
    plan, _ = train(fresh(name), method, tmp_path)
    backbone = plan.stages[0].trainable - set(backbones.head_parameters(plan.model))
    assert all(dict(plan.model.named_parameters())[key].ndim == 1 for key in backbone)


def test_gradual_trains_from_the_top(tmp_path: Path) -> None:
    plan, _ = train(fresh("bert"), "gradual", tmp_path, "--layer_decay=0.5", "--num_train_epochs=2")
    assert [stage.epochs for stage in plan.stages] == [2, 2, 2, 2, 2]
    assert {stage.layer_decay for stage in plan.stages[1:]} == {0.5}
    assert [stage.least_steps for stage in plan.stages] == [40, 0, 0, 0, 0]


def test_blocks_of_partial_are_not_the_steps_of_gradual(place: Path) -> None:
    cli._run(command(place, "bert", "blocks", "--method=partial", "--max_steps=1"))
    recipe = place / "blocks" / "recipe.yaml"
    assert parse(TextArguments, [f"--config={recipe}"]).unfreeze_blocks == 2
    for method in ("gradual", "full"):
        arguments = parse(TextArguments, [f"--config={recipe}", f"--method={method}"])
        assert arguments.unfreeze_blocks is None
        assert "unfreeze_blocks" not in arguments.given
    assert parse(TextArguments, [f"--config={recipe}", "--method=gradual", "--unfreeze_blocks=2"]).unfreeze_blocks == 2


@pytest.mark.parametrize(("size", "unfrozen"), [(1, [1, 2, 3, 4]), (2, [2, 4]), (3, [2, 4]), (4, [4])])
def test_gradual_unfreezes_as_many_blocks_at_a_time_as_are_wanted(size: int, unfrozen: list[int]) -> None:
    model = fresh("bert")
    blocks = backbones.parameter_blocks(model)
    stages = plan_of("gradual", model, f"--unfreeze_blocks={size}").stages[1:]
    assert [stage.trainable for stage in stages] == [{k for k, b in blocks.items() if b >= 4 - n} for n in unfrozen]


def test_the_block_with_the_largest_relative_gradient_is_chosen() -> None:
    model = fresh("bert").eval()
    blocks = backbones.parameter_blocks(model)
    batch = tiny_inputs(model, batch=4) | {"labels": torch.tensor([0, 1, 2, 0])}
    before = every_tensor(model)
    CrossEntropyLoss()(model(**{k: v for k, v in batch.items() if k != "labels"}), batch["labels"]).backward()
    ratios = []
    for block in range(max(blocks.values())):
        inside = [parameter for key, parameter in model.named_parameters() if blocks[key] == block]
        gradient = torch.cat([parameter.grad.flatten() for parameter in inside if parameter.grad is not None])
        ratios.append(float(gradient.norm() / torch.cat([parameter.detach().flatten() for parameter in inside]).norm()))
    best = int(np.argmax(ratios))
    model.zero_grad()
    everything = frozenset(blocks)
    name, trainable = largest_relative_gradient(model, CrossEntropyLoss(), [batch], everything)
    assert name == f"block {best + 1} of 4 and head"
    assert trainable == {key for key, block in blocks.items() if block in (best, 4)}
    assert all(torch.equal(before[key], tensor) for key, tensor in every_tensor(model).items())
    # Weights a thousand times as large, whose output a norm makes as small again: a relatively small gradient.
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if blocks[key] == best and "LayerNorm" not in key:
                parameter.mul_(1e3)
    assert largest_relative_gradient(model, CrossEntropyLoss(), [batch], everything)[0] != name


def test_a_block_that_is_to_stay_frozen_is_not_chosen() -> None:
    model = fresh("bert").eval()
    blocks = backbones.parameter_blocks(model)
    batch = tiny_inputs(model, batch=4) | {"labels": torch.tensor([0, 1, 2, 0])}
    for allowed in range(3):
        names = frozenset(name for name, block in blocks.items() if block in (allowed, 4))
        name, trainable = largest_relative_gradient(model, CrossEntropyLoss(), [batch], names)
        assert name == f"block {allowed + 1} of 4 and head"
        assert trainable == names


@pytest.mark.parametrize("model", ["cnn", pytest.param("bert", marks=pytest.mark.slow)])
def test_surgical_trains_one_block_and_the_head(place: Path, model: str) -> None:
    cli._run(command(place, model, f"surgical-{model}", "--method=surgical", "--head_epochs=1", "--seed=3"))
    run = hftl.load_run(place / f"surgical-{model}")
    head, second = run.metrics["train"]["stages"]
    assert head["name"] == "head"
    start, end = load_file(place / model / "model.safetensors"), load_file(run.folder / "model.safetensors")
    blocks = backbones.parameter_blocks(run.model)
    prefix = {"cnn": "timm_model.", "bert": "bert."}[model]  # timm's own checkpoints have none, nor a body by itself
    saved = prefix if model == "bert" else ""
    same = {f"{prefix}{key}" for key in start if torch.equal(start[key], end.get(f"{saved}{key}", torch.empty(0)))}
    moved = {block for key, block in blocks.items() if key not in same} - {max(blocks.values())}
    assert [f"block {block + 1} of {max(blocks.values())} and head" for block in moved] == [second["name"]]
    cli._run(["train", f"--config={run.folder / 'recipe.yaml'}", f"--output_dir={place / 'again'}", "--overwrite"])
    again = load_file(place / "again" / "model.safetensors")
    assert all(torch.equal(end[key], again[key]) for key in end)


@pytest.mark.parametrize("name", [*FEW, "timm_efficientnet_lite0", "roberta", "bert_mean", "swin"])
def test_the_last_blocks_start_anew_and_nothing_else(name: str) -> None:
    model = fresh(name)
    blocks = backbones.parameter_blocks(model)
    before = every_tensor(model)
    arguments = tiny_arguments(model, "--reinit_blocks=2")
    torch.manual_seed(5)
    reinitialise(model, arguments)
    drawn = torch.rand(1)
    after = every_tensor(model)
    changed = {key for key in before if not torch.equal(before[key], after[key])}
    head = max(blocks.values())
    pooler = backbones.structure(model).pooler if not name.endswith("_mean") else ()
    fixed = backbones.pooling_layer(model)
    for key, block in blocks.items():
        anew = (block in (head - 1, head - 2) or backbones.is_below_any(key, pooler)) and not backbones.is_below_any(
            key, fixed
        )
        matrix = before[key].ndim > 1 and "relative_position" not in key  # Swin's tables start at zero here and there
        assert (key in changed) <= anew, key
        assert key in changed or not (anew and matrix), key
    for module_name, module in model.named_modules():  # statistics of re-initialised norms are those of a new model
        if isinstance(module, nn.BatchNorm2d):
            anew = blocks[f"{module_name}.weight"] in (head - 1, head - 2)
            assert bool(module.running_mean.abs().max() == 0) == anew
    again = fresh(name)
    reinitialise(again, arguments)
    assert all(torch.equal(after[key], tensor) for key, tensor in every_tensor(again).items())  # seeded
    torch.manual_seed(5)
    assert torch.equal(drawn, torch.rand(1))  # and nobody else's random numbers are used


def test_what_starts_anew_trains_from_the_first_stage_on() -> None:
    model = fresh("timm_resnet18")
    blocks = backbones.parameter_blocks(model)
    head = max(blocks.values())
    first, second = plan_of("lp_ft", model, "--reinit_blocks=2").stages
    assert first.trainable == {key for key, block in blocks.items() if block >= head - 2}
    assert (first.batch_norm, second.batch_norm) == ("train", "train")
    assert first.learning_rate == second.learning_rate


@pytest.mark.parametrize(
    "method", ["full", "partial", *(pytest.param(name, marks=pytest.mark.slow) for name in ("lp_ft", "gradual"))]
)
def test_blocks_start_anew_in_a_run(place: Path, method: str) -> None:
    flags = ["--unfreeze_blocks=2"] if method == "partial" else []
    flags += [f"--method={method}", "--reinit_blocks=1", "--learning_rate=1e-9"]
    cli._run(command(place, "bert", f"anew-{method}", *flags))
    start, end = load_file(place / "bert" / "model.safetensors"), load_file(place / f"anew-{method}/model.safetensors")
    key = "encoder.layer.{}.output.dense.weight"
    assert (start[key.format(1)] - end[f"bert.{key.format(1)}"]).abs().max() < 1e-5
    assert (start[key.format(2)] - end[f"bert.{key.format(2)}"]).abs().max() > 1e-2


@pytest.mark.parametrize("method", [["--method=partial", "--unfreeze_blocks=1"], ["--method=frozen"]])
def test_adapted_statistics_are_those_of_the_training_images(place: Path, method: list[str]) -> None:
    name = f"adapted-{len(method)}"
    cli._run(command(place, "cnn", name, *method, "--batch_norm=adapt", "--augmentation=none", "--seed=3"))
    run = hftl.load_run(place / name)
    stem = run.model.get_submodule("timm_model.bn1")
    start = load_file(place / "cnn" / "model.safetensors")
    assert torch.equal(run.model.state_dict()["timm_model.conv1.weight"], start["conv1.weight"])
    assert torch.equal(stem.weight, start["bn1.weight"])
    assert not torch.allclose(stem.running_mean, start["bn1.running_mean"], atol=1e-3)
    rows = run.task.dataset(run.task.read_inputs(place / "images" / "train"), training=False)
    batch = run.task.collate([rows[index] for index in range(len(rows))])
    with torch.no_grad():
        values = run.model.timm_model.conv1(batch["pixel_values"])
    torch.testing.assert_close(stem.running_mean, values.mean(dim=(0, 2, 3)), rtol=1e-3, atol=1e-4)
    # A mean of the variances within batches, here two: what is between them is missing.
    halves = values[np.random.default_rng(3).permutation(len(rows))].tensor_split(2)
    within = torch.stack([half.var(dim=(0, 2, 3)) for half in halves]).mean(dim=0)
    torch.testing.assert_close(stem.running_var, within, rtol=1e-3, atol=1e-4)


def test_what_a_penalty_compares_with_has_adapted_statistics_and_no_blocks_that_start_anew(place: Path) -> None:
    (place / "own.py").write_text(
        "import torch\n"
        "def kept(stage, model, batch, outputs):\n"
        f"    torch.save(stage.reference.state_dict(), {str(place / 'reference.pt')!r})\n"
        "    return outputs['logits'].sum() * 0\n"
    )
    flags = [f"--penalty={place / 'own.py'}:kept", "--method=full", "--reinit_blocks=1", "--num_train_epochs=1"]
    cli._run(command(place, "cnn", "compared", *flags, "--batch_norm=adapt", "--augmentation=none"))
    reference = torch.load(place / "reference.pt")
    start = load_file(place / "cnn" / "model.safetensors")
    values = {name.removeprefix("timm_model."): value for name, value in reference.items()}
    changed = {name for name, value in values.items() if name in start and not torch.equal(value, start[name])}
    assert "bn1.running_mean" in changed
    assert all(name.endswith(("running_mean", "running_var", "num_batches_tracked")) for name in changed)


def test_adapted_statistics_stay_in_training(tmp_path: Path) -> None:
    model = fresh("timm_resnet18")
    (stage,) = plan_of("full", model, "--batch_norm=adapt", *RATES).stages
    before = {key: tensor for key, tensor in every_tensor(model).items() if "running" in key}
    tiny_trainer(model, stage, tmp_path, "--max_steps=2").train()
    after = every_tensor(model)
    assert all(torch.equal(before[key], after[key]) for key in before)
