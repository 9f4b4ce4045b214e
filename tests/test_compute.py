"""Half precision where it pays, folded BatchNorm, threads, and what saves memory or compiles: equal to without it."""

from __future__ import annotations

import dataclasses
import json
import os
import platform
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import small_data
import tiny_models
import torch
import yaml
from accelerate.state import AcceleratorState
from safetensors.torch import load_file
from tiny_models import TINY, tiny_inputs
from tiny_training import every_tensor, tiny_arguments, tiny_trainer
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from transformers import TrainerCallback
from transformers.utils import ModelOutput

import hftl
from hftl import compute
from hftl.callbacks import Interrupted
from hftl.errors import UsageError
from hftl.losses import CrossEntropyLoss
from hftl.methods import METHODS, Plan, build_plan


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache folder of the test's own."""
    monkeypatch.setenv("HFTL_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


# --- folding ---------------------------------------------------------------------------------------------------------


def norms(model: nn.Module) -> list[_BatchNorm]:
    return [module for module in model.modules() if isinstance(module, _BatchNorm)]


def with_statistics(model: Any) -> Any:
    """As after training: a fresh BatchNorm is nearly the identity, and forgetting it would not show."""
    torch.manual_seed(1)
    for norm in norms(model):
        for tensor in (norm.running_var, norm.weight.data):
            tensor.uniform_(0.5, 2.0)
        for tensor in (norm.running_mean, norm.bias.data):
            tensor.normal_(0.0, 0.3)
    return model


@torch.no_grad()
def logits(model: Any, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    return model(**inputs).logits


#: the model, and how many BatchNorm layers remain: before a convolution rather than behind one there is nothing to fold
FOLDED = {
    "timm_resnet18": 0,
    "timm_efficientnet_lite0": 0,
    "timm_mobilenetv3_small_100": 0,
    "timm_vgg11_bn": 0,
    "timm_inception_v3": 0,
    "timm_densenet121": None,
    "resnet": 0,
    "vit": 0,
    "timm_vit_tiny": 0,
    "timm_convnext_tiny": 0,
    "bert": 0,
}


@pytest.mark.parametrize("name", FOLDED)
def test_a_folded_copy_gives_equal_logits(name: str) -> None:
    model = with_statistics(TINY[name]()).train()
    before, count = every_tensor(model), len(norms(model))
    inputs = tiny_inputs(model, batch=4)
    folded = compute.folded(model, {**inputs, "labels": torch.zeros(4)})
    left = len(norms(folded))
    assert left == FOLDED[name] if FOLDED[name] is not None else 0 < left < count
    assert not any(module.training for module in folded.modules())
    assert all(module.training for module in model.modules())
    torch.testing.assert_close(every_tensor(model), before, rtol=0, atol=0)
    expected = logits(model.eval(), inputs)
    assert (logits(folded, inputs) - expected).abs().max() <= 1e-4 * expected.abs().max()


def test_adapters_are_merged_and_then_folded() -> None:
    model = with_statistics(TINY["timm_resnet18"]())
    adapted = build_plan(model, tiny_arguments(model, "--method=lora")).model
    for key, parameter in adapted.named_parameters():
        if "lora_B" in key:
            nn.init.normal_(parameter, std=0.1)
    before, inputs = every_tensor(adapted), tiny_inputs(model, batch=4)
    folded = compute.folded(adapted, inputs)
    assert norms(folded) == []
    assert not any("lora" in key for key, _ in folded.named_parameters())
    torch.testing.assert_close(every_tensor(adapted), before, rtol=0, atol=0)
    expected = logits(adapted.eval(), inputs)
    torch.testing.assert_close(logits(folded, inputs), expected, rtol=0, atol=1e-4 * float(expected.abs().max()))


class Branches(nn.Module):
    """A convolution whose output BatchNorm and something else read, or that is changed in place before BatchNorm."""

    def __init__(self, in_place: bool) -> None:
        super().__init__()
        self.convolution, self.norm, self.head = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Linear(4, 3)
        self.in_place = in_place

    def forward(self, pixel_values: torch.Tensor) -> ModelOutput:
        features = self.convolution(pixel_values)
        if self.in_place:
            features = features.relu_()
        result = self.norm(features) + (0 if self.in_place else features)
        return ModelOutput(logits=self.head(result.mean((2, 3))))


@pytest.mark.parametrize("in_place", [False, True])
def test_what_is_not_followed_by_batch_norm_alone_is_not_folded(in_place: bool) -> None:
    model = with_statistics(Branches(in_place)).eval()
    inputs = {"pixel_values": torch.randn(2, 3, 8, 8)}
    folded = compute.folded(model, inputs)
    assert len(norms(folded)) == 1
    torch.testing.assert_close(logits(folded, inputs), logits(model, inputs))


# --- precision -------------------------------------------------------------------------------------------------------


def choose(model: Any, rows: float = 1e9, training: bool = True, **changes: Any) -> str:
    inputs = tiny_inputs(model, batch=8)
    batch = {**inputs, "labels": torch.arange(8) % 3, **changes}
    return compute.choose_precision(
        model, batch, CrossEntropyLoss(), training=training, rows=rows, arguments=tiny_arguments(model)
    )


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> dict[str, float]:
    """The seconds that a pass takes in each precision."""
    now, seconds = [0.0], {"fp32": 0.39, "bf16": 0.21}

    def one_pass(model: Any, inputs: Any, labels: Any, loss: Any, precision: str, training: bool) -> None:
        now[0] += seconds[precision]

    monkeypatch.setattr(compute, "_pass", one_pass)
    monkeypatch.setattr(compute.time, "perf_counter", lambda: now[0])
    return seconds


def test_a_row_takes_what_it_takes_in_the_fastest_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    now, passes = [0.0], [9.0, 2.0, 4.0]
    monkeypatch.setattr(compute, "_pass", lambda *_: now.append(now.pop() + passes.pop(0)))
    monkeypatch.setattr(compute.time, "perf_counter", lambda: now[0])
    model = TINY["bert"]()
    batch = {**tiny_inputs(model, batch=8), "labels": torch.arange(8) % 3}
    assert compute.seconds_a_row(model, batch, CrossEntropyLoss(), True, "fp32") == 2.0 / 8
    assert passes == []


@pytest.mark.parametrize(("bf16", "chosen"), [(0.21, "bf16"), (0.38, "fp32"), (0.5, "fp32")])
def test_the_faster_precision_is_chosen_and_remembered(
    clock: dict[str, float], cache: Path, capsys: pytest.CaptureFixture, bf16: float, chosen: str
) -> None:
    clock["bf16"] = bf16
    model = TINY["bert"]()
    assert choose(model) == chosen
    line = capsys.readouterr().out
    assert line.startswith(f"precision: {chosen} (8 rows trained in ")
    assert all(f"{seconds:.2g} s" in line for seconds in clock.values())
    clock.update(fp32=9.0, bf16=1.0 if chosen == "fp32" else 90.0)
    assert choose(model, rows=1) == chosen  # remembered: nothing is measured
    assert capsys.readouterr().out == line
    assert choose(model, training=False) != chosen  # another question
    assert len(json.loads((cache / "precision.json").read_text())) == 2
    model.config._name_or_path = "another/checkpoint"
    assert choose(model) != chosen  # whose weights are others


def test_nothing_is_measured_that_does_not_pay(
    clock: dict[str, float], cache: Path, capsys: pytest.CaptureFixture
) -> None:
    rows = 10 * 2 * 3 * 8  # ten times three passes of eight rows each way
    assert choose(TINY["bert"](), rows=rows - 1) == "fp32"
    assert capsys.readouterr().out == ""
    assert not cache.exists()
    assert choose(TINY["bert"](), rows=rows) == "bf16"


@pytest.mark.parametrize("content", ["{", "[]", '{"a": 3}', '{"a": {"precision": "int8", "reason": ""}}'])
def test_a_damaged_file_is_said_and_made_again(
    clock: dict[str, float], cache: Path, capsys: pytest.CaptureFixture, content: str
) -> None:
    cache.mkdir()
    (cache / "precision.json").write_text(content)
    assert choose(TINY["bert"]()) == "bf16"
    assert "precision.json' is damaged and is made again" in capsys.readouterr().out
    (entry,) = json.loads((cache / "precision.json").read_text()).values()
    assert entry["precision"] == "bf16"


def test_a_cache_that_cannot_be_written_is_said(
    clock: dict[str, float], cache: Path, capsys: pytest.CaptureFixture
) -> None:
    cache.write_text("a file")
    assert choose(TINY["bert"]()) == "bf16"
    assert "cannot be kept" in capsys.readouterr().out


class Scaled(nn.Module):
    """A model whose loss is a small difference of large numbers, which bf16 does not hold."""

    config = type("Config", (), {})()

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.head = nn.Linear(8, 3)

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> ModelOutput:
        return ModelOutput(logits=1e4 * (self.head(input_ids.float()) - self.head(input_ids.float().round()) + 1e-3))


class Failing(nn.Module):
    """A model with an operation that is not there in bf16."""

    config = type("Config", (), {})()

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(8, 3)

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> ModelOutput:
        logits = self.head(input_ids.float())
        if logits.dtype == torch.bfloat16:
            raise RuntimeError("\"fancy\" not implemented for 'BFloat16'")
        return ModelOutput(logits=logits)


def test_a_model_that_bf16_changes_or_breaks_stays_in_fp32(
    clock: dict[str, float], capsys: pytest.CaptureFixture
) -> None:
    inputs = {"input_ids": torch.randn(8, 8) * 100, "attention_mask": torch.ones(8, 8), "labels": torch.arange(8) % 3}
    arguments = hftl.parse(hftl.TextArguments, [])
    for model, reason in ((Scaled(), "bf16 moves the loss from"), (Failing(), '"fancy" not implemented for')):
        assert (
            compute.choose_precision(model, inputs, CrossEntropyLoss(), training=True, rows=1e9, arguments=arguments)
            == "fp32"
        )
        assert reason in capsys.readouterr().out


@pytest.mark.parametrize("name", ["bert", "timm_resnet18"])
def test_a_real_measurement_leaves_no_trace(name: str, capsys: pytest.CaptureFixture) -> None:
    model = TINY[name]().train()
    before, state = every_tensor(model), torch.random.get_rng_state()
    assert choose(model) in ("fp32", "bf16")
    assert "rows trained in" in capsys.readouterr().out
    torch.testing.assert_close(every_tensor(model), before, rtol=0, atol=0)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(parameter.grad is None for parameter in model.parameters())
    assert model.training


def test_texts_are_measured_at_their_mean_length() -> None:
    class Rows(list):
        lengths = [1, 1, 1, 1, 30, 11, 10, 9, 100] * 8

    data = Rows([0] * length for length in Rows.lengths)
    batch = compute.typical_batch(data, lambda examples: {"lengths": torch.tensor([len(row) for row in examples])})
    assert len(batch["lengths"]) == 16
    assert set(batch["lengths"].tolist()) == {10, 11}


# --- the flag --------------------------------------------------------------------------------------------------------

#: flags, the launcher's wish, and precision, bf16, fp16 and what Accelerate is given
FLAGS = [
    ([], "no", ("auto", False, False, "no")),
    (["--precision=bf16"], "no", ("bf16", True, False, "bf16")),
    (["--bf16"], "no", ("bf16", True, False, "bf16")),
    (["--precision=bf16", "--bf16"], "no", ("bf16", True, False, "bf16")),
    ([], "bf16", ("bf16", True, False, "bf16")),
    (["--precision=auto"], "bf16", ("bf16", True, False, "bf16")),
    (["--precision=fp32"], "bf16", ("fp32", False, False, "no")),
]


@pytest.mark.parametrize(("flags", "launcher", "expected"), FLAGS)
def test_the_flag_and_the_launcher(
    monkeypatch: pytest.MonkeyPatch, flags: list[str], launcher: str, expected: tuple
) -> None:
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", launcher)
    found = hftl.parse(hftl.TextArguments, ["--use_cpu=true", *flags])
    assert (found.precision, found.bf16, found.fp16, found.mixed_precision) == expected


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("compute")
    small_data.write_texts(folder / "texts", {"train": 24, "dev": 8})
    tiny_models.write_tiny_text_model(folder / "bert", kind="bert")
    small_data.write_images(folder / "images", {"train": 8, "val": 4})
    tiny_models.write_timm_folder(folder / "convnet", "resnet18", channels=[8, 16, 16, 32], stem_width=8)
    return folder


def train(place: Path, name: str, task: str = "text-classification", **settings: Any) -> hftl.Run:
    data, model = ("texts", "bert") if task == "text-classification" else ("images", "convnet")
    common = {"model": place / model, "dataset": place / data, "num_train_epochs": 2, "logging_steps": 1}
    return hftl.finetune(task, **common, output_dir=place / name, **settings)


def test_a_chosen_precision_is_in_the_recipe_and_stays_when_a_run_goes_on(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compute, "choose_precision", lambda *_, **__: "bf16")
    whole = train(place, "whole")
    assert yaml.safe_load((whole.folder / "recipe.yaml").read_text())["precision"] == "bf16"

    class Stopping(CrossEntropyLoss):
        calls = 0

        def __call__(self, *values: Any, **others: Any) -> torch.Tensor:
            Stopping.calls += torch.is_grad_enabled()
            if Stopping.calls == 4:  # in the second epoch, behind the checkpoint of the first
                raise Interrupted(15)
            return super().__call__(*values, **others)

    with monkeypatch.context() as patch:
        patch.setattr("hftl.losses.CrossEntropyLoss", Stopping)
        with pytest.raises(Interrupted):
            train(place, "stopped")
    monkeypatch.setattr(compute, "choose_precision", lambda *_, **__: pytest.fail("measured anew"))
    resumed = train(place, "stopped", resume=True)
    assert yaml.safe_load((resumed.folder / "recipe.yaml").read_text())["precision"] == "bf16"
    first, second = (load_file(run.folder / "model.safetensors") for run in (whole, resumed))
    assert [name for name in first if not first[name].equal(second[name])] == []
    assert "bf16" not in yaml.safe_load((resumed.folder / "recipe.yaml").read_text())  # would contradict --precision


@pytest.mark.parametrize(("tolerance", "expected"), [(0.01, "bf16"), (0.0, "fp32")])
def test_a_gpu_that_is_made_for_bf16_does_without_where_the_loss_moves(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, tolerance: float, expected: str
) -> None:
    def as_on_a_gpu(arguments: Any) -> None:
        arguments.precision, arguments.bf16 = "bf16", True
        object.__setattr__(arguments, "bf16_is_unasked", True)

    monkeypatch.setattr("hftl.arguments._match_precision", as_on_a_gpu)
    monkeypatch.setattr(compute, "_LOSS_TOLERANCE", tolerance)
    run = train(place, f"gpu-{expected}", overwrite=True)
    assert ("precision: fp32 (bf16 moves the loss" in capsys.readouterr().out) == (expected == "fp32")
    assert yaml.safe_load((run.folder / "recipe.yaml").read_text())["precision"] == expected
    assert run.metrics["train"]["precision"] == expected


@pytest.mark.parametrize("compiled", [False, True])
def test_every_stage_runs_in_half_precision(place: Path, monkeypatch: pytest.MonkeyPatch, compiled: bool) -> None:
    """Accelerate takes a model that it has seen before for prepared, and gives it neither autocast nor compilation."""
    half: list[bool] = []
    steps: set[tuple[str, str, bool]] = set()

    def twice(model: Any, arguments: Any) -> Plan:
        plan = METHODS["full"](model, arguments)
        model.classifier.register_forward_hook(lambda *_: half.append(torch.is_autocast_enabled("cpu")))
        stages = [dataclasses.replace(plan.stages[0], name=name) for name in ("first", "second")]
        return dataclasses.replace(plan, stages=tuple(stages))

    step = hftl.trainer.TransferTrainer.training_step

    def noted(self: Any, model: Any, *others: Any) -> Any:
        half.clear()
        loss = step(self, model, *others)
        steps.add((self.stage.name, type(model).__name__, half[0]))
        return loss

    monkeypatch.setattr("hftl.trainer.TransferTrainer.training_step", noted)
    monkeypatch.setattr("hftl.methods.METHODS", {**METHODS, "twice": twice})
    monkeypatch.setitem(hftl.methods.METHOD_ARGUMENTS, "twice", set())
    flags = {"torch_compile_backend": "aot_eager"} if compiled else {}
    train(place, f"stages-{compiled}", method="twice", precision="bf16", **flags)
    kind = "OptimizedModule" if compiled else "BertForSequenceClassification"
    assert steps == {("first", kind, True), ("second", kind, True)}


def watch_graphs(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """The kinds of model that training steps get."""
    kinds: set[str] = set()
    step = hftl.trainer.TransferTrainer.training_step

    def noted(self: Any, model: Any, *others: Any) -> Any:
        kinds.add(type(model).__name__)
        return step(self, model, *others)

    monkeypatch.setattr("hftl.trainer.TransferTrainer.training_step", noted)
    return kinds


# --- threads ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def _threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("_threads")
@pytest.mark.parametrize(
    ("processes", "wanted", "expected"),
    [("2", None, 2), ("4", None, 1), ("8", None, 1), ("2", "3", 3), (None, None, 3)],
)
def test_processes_share_the_cores(
    monkeypatch: pytest.MonkeyPatch, processes: str | None, wanted: str | None, expected: int
) -> None:
    torch.set_num_threads(3)
    monkeypatch.setattr(compute, "cores", lambda: 4)
    for name, value in (("LOCAL_WORLD_SIZE", processes), ("OMP_NUM_THREADS", wanted)):
        monkeypatch.delenv(name, raising=False)
        if value is not None:
            monkeypatch.setenv(name, value)
    compute.share_threads(on_cpu=True)
    assert torch.get_num_threads() == expected


def test_cores_that_a_launcher_leaves_unused_are_said(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(compute, "cores", lambda: 4)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    compute.share_threads(on_cpu=True)
    assert capsys.readouterr().out == ""
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    compute.share_threads(on_cpu=False)
    assert capsys.readouterr().out == ""
    compute.share_threads(on_cpu=True)
    assert capsys.readouterr().out.startswith("1 of 4 cores computes")


# Without huge pages, of which the system gives as many as it has: a fault is then a page of its own.
_FAULTS = """
import ctypes, resource, sys
import numpy
ctypes.CDLL(None).prctl(41, 1, 0, 0, 0)
if sys.argv[1] == "keep":
    from hftl import compute
    compute.keep_freed_memory()
for step in range(9):
    if step == 1:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    numpy.ones(2**24, numpy.float32)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


# What is set is a number of glibc's own malloc: with another C library (musl, macOS) the function does nothing, and
# there is nothing to see. CI runs on glibc, where the test is never left out.
@pytest.mark.skipif(
    platform.libc_ver()[0] != "glibc", reason="mallopt is of glibc: with another C library nothing is set"
)
def test_freed_memory_is_used_again() -> None:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}

    def faults(mode: str, **settings: str) -> int:
        command = [sys.executable, "-c", _FAULTS, mode]
        done = subprocess.run(command, env=environment | settings, capture_output=True, text=True, check=True)
        return int(done.stdout)

    given_back = faults("give back")
    assert faults("keep") * 5 < given_back
    # What the person says stays; here it is glibc's own number.
    assert faults("keep", MALLOC_MMAP_MAX_="65536") * 5 > given_back


# --- memory and compilation ------------------------------------------------------------------------------------------


class Watch(TrainerCallback):
    """Notes whether a frozen module is ever in training mode after a step."""

    awake = False

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.awake |= any(module.training for module in self.frozen)


def stage_losses(name: str, method: str, folder: Path, *flags: str, loss: Any = None) -> tuple[list[float], Any]:
    """The losses of all steps of all stages, and the model."""
    model = TINY[name]()
    plan = build_plan(model, tiny_arguments(model, f"--method={method}", "--learning_rate=1e-3"))
    losses = []
    for stage in plan.stages:
        AcceleratorState._reset_state()
        watch = Watch()
        trainer = tiny_trainer(plan.model, stage, folder, "--max_steps=3", *flags, rows=8, callbacks=[watch], loss=loss)
        watch.frozen = trainer.frozen_modules
        trainer.train()
        assert not watch.awake
        losses += [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        trainer.bare_model()
    return losses, plan.model


ALL_METHODS = ("full", "frozen", "partial", "lora", "lp_ft")


@pytest.mark.parametrize(
    ("name", "method", "flag"),
    [
        *((name, method, "activation") for name in ("bert", "timm_resnet18") for method in ALL_METHODS),
        ("vit", "full", "activation"),
        ("timm_vit_tiny", "full", "activation"),
        ("bert", "full", "gradient"),  # the deprecated name
    ],
)
def test_activation_checkpointing_gives_equal_losses(name: str, method: str, flag: str, tmp_path: Path) -> None:
    runs = 0

    def counted(*_: Any) -> None:
        nonlocal runs
        runs += 1

    plain, _ = stage_losses(name, method, tmp_path)
    with torch.nn.modules.module.register_module_forward_hook(counted):
        stage_losses(name, method, tmp_path)
        without, runs = runs, 0
        saving, _ = stage_losses(name, method, tmp_path, f"--{flag}_checkpointing")
    assert saving == plain
    assert runs > without or method == "frozen"  # blocks ran again; in a frozen backbone nothing is kept anyway


def test_activation_checkpointing_is_refused_with_the_reason(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="ResNetForImageClassification does not have it"):
        stage_losses("resnet", "full", tmp_path, "--activation_checkpointing")
    model = TINY["timm_resnet18"]()
    (stage,) = build_plan(model, tiny_arguments(model, "--batch_norm=train")).stages
    with pytest.raises(UsageError, match="into its statistics twice: use --batch_norm frozen"):
        tiny_trainer(model, stage, tmp_path, "--activation_checkpointing")


class LittleMemory(CrossEntropyLoss):
    """Runs out of memory in the second step when a batch has more rows than fit."""

    def __init__(self, rows: int) -> None:
        super().__init__()
        self.rows, self.calls = rows, 0

    def __call__(self, outputs: Any, labels: torch.Tensor, *others: Any, **settings: Any) -> torch.Tensor:
        self.calls += 1
        if len(labels) > self.rows and self.calls % 3 == 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return super().__call__(outputs, labels, *others, **settings)


@pytest.mark.parametrize(
    ("name", "method"), [("bert", "full"), ("bert", "lora"), ("timm_resnet18", "full"), ("timm_resnet18", "lp_ft")]
)
def test_a_smaller_batch_is_made_up_for_by_accumulation(
    name: str, method: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """As if training had begun with the batch that fits, although memory ran out only in the second step."""
    small = ("--per_device_train_batch_size=2", "--gradient_accumulation_steps=4")
    expected, model = stage_losses(name, method, tmp_path, *small)
    large = ("--per_device_train_batch_size=8", "--auto_find_batch_size=true")
    found, same = stage_losses(name, method, tmp_path, *large, loss=LittleMemory(3))
    assert found == expected
    torch.testing.assert_close(every_tensor(same), every_tensor(model), rtol=0, atol=0)
    assert "batch: 2 rows, 4 times a step" in capsys.readouterr().out


def test_a_row_that_does_not_fit_is_an_error(tmp_path: Path) -> None:
    flags = ("--per_device_train_batch_size=6", "--auto_find_batch_size=true")
    with pytest.raises(UsageError, match=r"too small for a single row: try --activation_checkpointing"):
        stage_losses("bert", "full", tmp_path, *flags, loss=LittleMemory(0))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("task", "method"),
    [
        *(("text-classification", method) for method in ("full", "lora")),  # half a minute each
        *(("image-classification", method) for method in ("frozen", "partial", "lp_ft")),
    ],
)
def test_compiled_training_gives_an_ordinary_run(
    place: Path, monkeypatch: pytest.MonkeyPatch, task: str, method: str
) -> None:
    torch._dynamo.reset()
    plain = train(place, f"plain-{task}-{method}", task, method=method)
    kinds = watch_graphs(monkeypatch)
    run = train(place, f"compiled-{task}-{method}", task, method=method, torch_compile_backend="aot_eager")
    assert kinds == {"OptimizedModule"}
    first, second = (load_file(entry.folder / "model.safetensors") for entry in (plain, run))
    assert first.keys() == second.keys()  # no prefixes
    assert run.metrics["validation"]["loss"] == pytest.approx(plain.metrics["validation"]["loss"], rel=1e-3)
