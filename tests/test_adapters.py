"""Every type of adapter on text, ViT and CNN: what trains, what is saved, and what plain libraries make of it."""

from __future__ import annotations

import copy
import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import small_data
import tiny_models
import torch
from peft import PEFT_TYPE_TO_CONFIG_MAPPING, PeftModel
from tiny_models import TINY, tiny_inputs, write_tiny_text_model
from tiny_training import every_tensor, logits_of, task_of, tiny_arguments, tiny_trainer
from torch import nn
from transformers import AutoConfig, PreTrainedModel

import hftl
from hftl import backbones, cli, compute, merging, saving
from hftl.errors import UsageError
from hftl.methods import Plan, build_plan
from hftl.methods.adapters import LEFT_OUT, QUANTISED, SHORT_NAMES, TYPES, _sizes_that_fit
from hftl.tasks.image_classification import ImageClassification

#: the types that take the convolutions or the norms of a ResNet (OFT the pointwise ones of a larger one)
ON_CONVOLUTIONS = {"ADALORA", "BOFT", "HIRA", "HRA", "IA3", "LN_TUNING", "LOHA", "LOKR", "LORA"}
VARIANTS = [name for name, (_, settings) in SHORT_NAMES.items() if settings]
CASES = [
    *((f"peft --peft_type {name}", base) for name in TYPES for base in ("bert", "timm_vit_tiny")),
    *((f"peft --peft_type {name}", "timm_resnet18") for name in sorted(ON_CONVOLUTIONS)),
    *((name, base) for name in ("lora", *VARIANTS) for base in ("bert", "timm_vit_tiny")),
    *((name, "timm_resnet18") for name in ("lora", "dora", "rslora")),
    ("lora --init_lora_weights olora", "bert"),
    ("oft", "timm_resnet50"),
    ("ia3", "timm_efficientnet_lite0"),
    ("lokr", "timm_efficientnet_lite0"),
    ("loha", "timm_efficientnet_lite0"),
    ("ln_tuning", "timm_convnext_tiny"),
    *((name, "gpt2") for name in ("lora", "dora", "adalora", "ia3", "vera", "fourierft")),
]


@cache
def _built(name: str) -> PreTrainedModel:
    """A tiny model whose attention is not uniform, and whose BatchNorm layers know real activations."""
    model = TINY[name]()
    batch_norms = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2 and not batch_norms:
                parameter.mul_(4)
        for module in batch_norms:
            module.momentum = 1.0
        model.train()(**tiny_inputs(model, batch=8))
    return model.eval()


def fresh(name: str) -> PreTrainedModel:
    return copy.deepcopy(_built(name))


def plan_of(model: PreTrainedModel, method: str, *flags: str) -> Plan:
    return build_plan(model, tiny_arguments(model, "--method", *method.split(), *flags))


def train(plan: Plan, folder: Path, steps: int = 3) -> None:
    """A few steps, after which exactly what should train has moved."""
    (stage,) = plan.stages
    trainer = tiny_trainer(plan.model, stage, folder, f"--max_steps={steps}", callbacks=list(plan.callbacks))
    before = every_tensor(plan.model)
    trainer.train()
    after = every_tensor(plan.model)
    moved = {key for key in before if not torch.equal(before[key], after[key])}
    assert moved <= stage.trainable  # neither the backbone, nor the statistics of BatchNorm
    adapters = {key for key in stage.trainable if ".modules_to_save." not in key}
    assert adapters
    assert stage.trainable - adapters
    assert stage.trainable - adapters <= moved
    assert len(adapters & moved) > len(adapters) / 2


#: quick enough for every run: each type once, on text, and one of each kind of base
QUICK = [case for case in CASES if case[1] == "bert" and not case[0].endswith("ADAMSS")]
QUICK += [("adalora", "gpt2"), ("oft", "timm_resnet50")]
QUICK += [(f"peft --peft_type {name}", "timm_resnet18") for name in ("LN_TUNING", "LOKR")]


@pytest.mark.parametrize(
    ("method", "base"),
    [pytest.param(*case, marks=() if case in QUICK else pytest.mark.slow, id="-".join(case)) for case in CASES],
)
def test_round_trip(method: str, base: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = fresh(base)
    plan = plan_of(model, method, "--learning_rate=1e-2", "--head_learning_rate=1e-2")
    backbones.to_channels_last(plan.model)
    train(plan, tmp_path / "training")
    batch = tiny_inputs(model)
    expected = logits_of(plan.model, batch)
    torch.testing.assert_close(logits_of(compute.folded(plan.model, batch), batch), expected, rtol=1e-3, atol=1e-4)
    task, folder = task_of(model), tmp_path / "saved"
    folder.mkdir()
    saving.save_checked(task, plan.model, batch, folder)

    adapted = PeftModel.from_pretrained(fresh(base), folder / "adapter")
    torch.testing.assert_close(logits_of(adapted, batch), expected, rtol=1e-4, atol=1e-5)
    if method.endswith("LILY"):
        assert "not merged" in capsys.readouterr().out
        assert not (folder / "model.safetensors").exists()
        return
    loaded = task.auto_class.from_pretrained(folder)
    torch.testing.assert_close(logits_of(loaded, batch), expected, rtol=1e-3, atol=1e-4)
    assert loaded.config.id2label == {0: "a", 1: "b", 2: "c"}


def trained_layers(plan: Plan) -> set[str]:
    """The layers, by their last names, that have adapters."""
    names = {backbones.plain_name(plan.model, key) for key in plan.stages[0].trainable if ".lora_" in key}
    return {name.split(".lora_")[0] for name in names}


def test_layers_are_chosen_by_pattern_and_block() -> None:
    plan = plan_of(fresh("bert"), "dora", "--lora_layers_pattern", r"attention.*(query|value)$", "--lora_blocks=2")
    assert trained_layers(plan) == {
        f"bert.encoder.layer.{block}.attention.self.{name}" for block in (1, 2) for name in ("query", "value")
    }


@pytest.mark.parametrize(("width", "boundary"), [(8, 1), (32, 2), (384, 5), (4096, 15), (8192, 15)])
def test_delora_changes_a_layer_by_as_small_a_part_whatever_its_width(width: int, boundary: int) -> None:
    narrow = nn.Linear(2, 4)  # such as Swin v2 has beside the others
    layers = [nn.Linear(width, 4) for _ in range(3)]
    assert _sizes_that_fit("DELORA", [narrow, *layers]) == {"delora_lambda": boundary}


def test_lora_plus_gives_the_second_matrices_a_higher_rate(tmp_path: Path) -> None:
    model = fresh("bert")
    plan = plan_of(model, "lora", "--lora_plus_ratio=16", "--learning_rate=1e-4", "--head_learning_rate=1e-3")
    trainer = tiny_trainer(plan.model, plan.stages[0], tmp_path)
    rates = {id(entry): group["lr"] for group in trainer.create_optimizer().param_groups for entry in group["params"]}
    by_kind = {
        kind: {rates[id(entry)] for name, entry in plan.model.named_parameters() if kind in name and id(entry) in rates}
        for kind in (".lora_A.", ".lora_B.", ".modules_to_save.")
    }
    assert by_kind == {".lora_A.": {1e-4}, ".lora_B.": {16 * 1e-4}, ".modules_to_save.": {1e-3}}


def test_short_names_are_settings_of_a_type() -> None:
    one, other = (
        plan_of(fresh("bert"), *words)
        for words in (["dora", "--lora_r=4"], ["lora", "--use_dora=true", '--peft_config={"r": 4}'])
    )
    assert one.model.peft_config == other.model.peft_config
    assert one.settings["lora_r"] == 4
    assert json.loads(other.settings["peft_config"]) == {"r": 4}


def test_types_that_a_base_can_take_are_named() -> None:
    with pytest.raises(
        UsageError, match=r"VERA takes layers of the kinds .*linear.*Types that can: ADALORA, BOFT, .*LORA"
    ):
        plan_of(fresh("timm_resnet18"), "vera")
    grouped = nn.Sequential(nn.Sequential(nn.Conv2d(4, 4, 3, groups=4), nn.Conv2d(4, 4, 3, groups=2)), nn.Linear(4, 3))
    arguments = tiny_arguments(fresh("timm_resnet18"), "--method=lora")
    with pytest.raises(UsageError, match=r"grouped convolution\. Types that can: IA3, LOHA, LOKR\."):
        build_plan(grouped, arguments)


def test_adalora_gives_up_ranks_and_keeps_the_sizes(tmp_path: Path) -> None:
    model = fresh("bert")
    plan = plan_of(model, "adalora", "--learning_rate=1e-2", "--head_learning_rate=1e-2")
    train(plan, tmp_path, steps=10)
    ranks = [entry for name, entry in plan.model.named_parameters() if ".lora_E." in name]
    assert {len(entry) for entry in ranks} == {12}
    assert sum(int((entry != 0).sum()) for entry in ranks) == 8 * len(ranks)  # on average target_r
    assert plan.model.peft_config["default"].rank_pattern is None


@pytest.mark.parametrize("steps", [1, 2, 3, 4])
def test_adalora_takes_any_number_of_steps(steps: int, tmp_path: Path) -> None:
    plan = plan_of(fresh("bert"), "adalora", "--learning_rate=1e-2", "--head_learning_rate=1e-2")
    train(plan, tmp_path, steps)
    left = sum(int((entry != 0).sum()) for name, entry in plan.model.named_parameters() if ".lora_E." in name)
    layers = sum(".lora_E." in name for name, _ in plan.model.named_parameters())
    assert left == (12 if steps == 1 else 8) * layers


@pytest.mark.parametrize("method", ["dora", "boft", "hra"])
def test_adapters_of_convolutions_train_in_the_layout_of_a_run(method: str, tmp_path: Path) -> None:
    small_data.write_images(tmp_path / "images", {"train": 8, "val": 4})
    _built("timm_resnet18").save_pretrained(tmp_path / "model")
    hftl.finetune(
        "image-classification",
        model=tmp_path / "model",
        dataset=tmp_path / "images",
        method=method,
        image_size=32,
        num_train_epochs=1,
        output_dir=tmp_path / "run",
    )
    assert (tmp_path / "run" / "model.safetensors").is_file()  # merged, and compared


@pytest.mark.parametrize(("name", "size"), [("transformers_vit", 64), ("timm_vit_tiny", 48)])
def test_an_adapter_at_another_image_size_goes_on_its_base(name: str, size: int, tmp_path: Path) -> None:
    small_data.write_images(tmp_path / "images", {"train": 8, "val": 4})
    if name.startswith("timm"):
        small = {"depth": 2, "embed_dim": 32, "num_heads": 2, "img_size": 32}
        tiny_models.write_timm_folder(tmp_path / "model", "vit_tiny_patch16_224", **small)
    else:
        tiny_models.write_tiny_image_model(tmp_path / "model", "vit")
    run = tmp_path / "run"
    hftl.finetune(
        "image-classification",
        model=tmp_path / "model",
        dataset=tmp_path / "images",
        method="lora",
        image_size=size,
        learning_rate=1e-2,
        num_train_epochs=1,
        output_dir=run,
    )
    auto = ImageClassification.auto_class
    config = AutoConfig.from_pretrained(run / "adapter")  # as the README says
    base = auto.from_pretrained(tmp_path / "model", config=config, ignore_mismatched_sizes=True)
    batch = {"pixel_values": torch.rand(4, 3, size, size, generator=torch.Generator().manual_seed(0))}
    expected = logits_of(auto.from_pretrained(run), batch)
    torch.testing.assert_close(logits_of(PeftModel.from_pretrained(base, run / "adapter"), batch), expected)


def test_a_wrong_merge_keeps_the_adapter_with_its_base(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model = fresh("timm_resnet18")
    plan = plan_of(model, "lora", "--learning_rate=1e-2")
    train(plan, tmp_path / "training")
    batch = tiny_inputs(model)
    expected = logits_of(plan.model, batch)

    def unload(model: Any) -> None:
        """Leave out what was learned, as a merge that is wrong."""
        merging.put_back_trained_parts(model)
        model.unload()

    monkeypatch.setattr(merging, "merge", unload)
    folder = tmp_path / "saved"
    folder.mkdir()
    saving.save_checked(task_of(model), plan.model, batch, folder)
    assert "the merged model's logits differ" in capsys.readouterr().out
    loaded = merging.load_unmerged(ImageClassification.auto_class, folder)
    torch.testing.assert_close(logits_of(loaded, batch), expected, rtol=1e-5, atol=1e-5)
    with pytest.raises(OSError, match="no file named model"):
        ImageClassification.auto_class.from_pretrained(folder)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("adapters")
    small_data.write_texts(folder / "texts", {"train": 16, "dev": 4, "test": 4})
    # bitsandbytes' kernels take no fewer than 64 columns.
    write_tiny_text_model(folder / "bert", hidden_size=64, intermediate_size=128)
    return folder


@pytest.mark.parametrize("flags", [{"method": "lily"}, {"method": "dora", "load_in_4bit": True}], ids=["lily", "4bit"])
def test_a_run_that_is_not_merged_predicts_evaluates_and_repeats(
    place: Path, flags: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    folder = place / str(flags["method"])
    common = {"model": place / "bert", "dataset": place / "texts", "num_train_epochs": 1, "learning_rate": 1e-2}
    run = hftl.finetune("text-classification", **common, **flags, output_dir=folder)
    assert {"adapter", "base", "config.json"} <= {path.name for path in folder.iterdir()}
    assert not (folder / "model.safetensors").exists()
    assert "PeftModel" in (folder / "README.md").read_text()
    texts = ["the film was good", "a bad day"]
    fresh_one = hftl.load_run(folder)
    assert [entry.probability for entry in fresh_one.predict(texts)] == pytest.approx(
        [entry.probability for entry in run.predict(texts)], abs=1e-6
    )
    capsys.readouterr()
    cli._run(["evaluate", str(folder), "--dataset", str(place / "texts")])
    assert f"{run.metrics['test']['accuracy']:.4f}" in capsys.readouterr().out
    with pytest.raises(UsageError, match="adapter that is not merged"):
        hftl.finetune("text-classification", **common | {"model": folder}, output_dir=place / "next")
    bits = {name: value for name, value in flags.items() if name == "load_in_4bit"}
    onward = {**common, "model": folder / "base", "output_dir": place / f"onward-{folder.name}"}
    again = hftl.finetune("text-classification", **onward, **bits, method="lora")
    assert again.predict(texts)[0].label in ("bad", "good")
    assert any(weights.dtype == torch.uint8 for weights in again.model.parameters()) == bool(bits)
    if bits:
        with pytest.raises(UsageError, match="adapters alone train: --method lora --load_in_4bit, say"):
            hftl.finetune("text-classification", **onward, load_in_8bit=True, method="lora", overwrite=True)
        with pytest.raises(UsageError, match="adapters alone train: --method lora --load_in_4bit, say"):
            hftl.finetune("text-classification", **onward, overwrite=True)
    cli._run(["train", "--config", str(folder / "recipe.yaml"), "--output_dir", str(place / "again"), "--overwrite"])
    assert (place / "again" / "recipe.yaml").read_text() == (folder / "recipe.yaml").read_text()


@pytest.mark.parametrize("bits", ["load_in_8bit", "load_in_4bit"])
@pytest.mark.parametrize("peft_type", QUANTISED)
def test_every_type_for_few_bits_is_read_again(place: Path, tmp_path: Path, peft_type: str, bits: str) -> None:
    """Adapters train beside weights that stay as they are, and a run gives the logits that it was saved with."""
    flags: dict[str, Any] = {"method": "peft", "peft_type": peft_type, bits: True, "learning_rate": 1e-2}
    common = {"model": place / "bert", "dataset": place / "texts", "max_steps": 2, "report_to": "none"}
    run = hftl.finetune("text-classification", **common, **flags, output_dir=tmp_path / "run")
    small = [parameter for parameter in run.model.parameters() if parameter.dtype in (torch.int8, torch.uint8)]
    assert small
    assert not any(parameter.requires_grad for parameter in small)
    rows = run.task.processor(["the film was good", "a bad day"], padding=True, return_tensors="pt")
    again = hftl.load_run(tmp_path / "run")
    torch.testing.assert_close(logits_of(again.model, rows), logits_of(run.model, rows), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("bits", ["load_in_8bit", "load_in_4bit"])
def test_few_bits_go_with_mean_pooling(place: Path, tmp_path: Path, bits: str) -> None:
    """The layer that takes the mean stays in float32, of a checkpoint that gets it and of a run that has it."""
    common = {"dataset": place / "texts", "max_steps": 1, "learning_rate": 1e-2, "report_to": "none"}
    hftl.finetune("text-classification", **common, model=place / "bert", pooling="mean", output_dir=tmp_path / "base")
    for number, flags in enumerate(({"model": place / "bert", "pooling": "mean"}, {"model": tmp_path / "base"})):
        folder = tmp_path / str(number)
        run = hftl.finetune("text-classification", **common, **flags, method="lora", **{bits: True}, output_dir=folder)
        kinds = {name: parameter.dtype for name, parameter in run.model.named_parameters()}
        held = {name for name, kind in kinds.items() if kind in (torch.int8, torch.uint8)}
        assert len(held) == 3 * 6
        assert not any(".layer.3." in name for name in held)
        rows = run.task.processor(["the film was good", "a bad day"], padding=True, return_tensors="pt")
        again = hftl.load_run(folder)
        torch.testing.assert_close(logits_of(again.model, rows), logits_of(run.model, rows), rtol=1e-5, atol=1e-5)


def test_four_bits_train_on_behind_an_evaluation(place: Path, tmp_path: Path) -> None:
    """bitsandbytes would pack the weights for a CPU that predicts, which loses digits, and ends in an error."""
    flags: dict[str, Any] = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "no", "max_steps": 3}
    flags |= {"load_best_model_at_end": False, "precision": "bf16", "report_to": "none", "method": "lora"}
    common = {"model": place / "bert", "dataset": place / "texts", "load_in_4bit": True}
    run = hftl.finetune("text-classification", **common, **flags, output_dir=tmp_path / "run")
    for model in (run.model, hftl.load_run(tmp_path / "run").model):
        held = [weights for weights in model.parameters() if weights.dtype == torch.uint8]
        assert held
        assert not any(getattr(weights.quant_state, "packing_format_for_cpu", False) for weights in held)


def test_every_type_of_peft_is_offered_or_left_out_for_a_reason() -> None:
    assert {kind.value for kind in PEFT_TYPE_TO_CONFIG_MAPPING} <= set(TYPES) | set(LEFT_OUT)  # an older one has fewer
    assert not set(TYPES) & set(LEFT_OUT)


def test_frozen_weights_stay_in_eight_bits(place: Path) -> None:
    common = {"model": place / "bert", "dataset": place / "texts", "max_steps": 2, "learning_rate": 1e-2}
    run = hftl.finetune("text-classification", **common, method="lora", load_in_8bit=True, output_dir=place / "8bit")
    kinds = {name: parameter.dtype for name, parameter in run.model.named_parameters()}
    held = {name for name, kind in kinds.items() if kind == torch.int8}
    assert len(held) == 3 * 6
    assert not any(
        backbones.is_below_any(backbones.plain_name(run.model, name), ("classifier", "bert.pooler")) for name in held
    )
