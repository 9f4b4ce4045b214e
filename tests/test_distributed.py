"""Two processes: the same training as one process with the same global batch, through the real `accelerate launch`."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
import small_data
import tiny_models
from forked import LAUNCH, ROOT, Done, run_command, run_ranks
from safetensors.torch import load_file


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("distributed")
    small_data.write_images(folder / "images", {"train": 7, "val": 3, "test": 5})
    tiny_models.write_tiny_cnn(folder / "convnet")
    small_data.write_texts(folder / "texts", {"train": 29, "dev": 11, "test": 13})
    tiny_models.write_tiny_text_model(folder / "bert", kind="bert")
    small_data.write_choices(folder / "choices", {"train": 29, "dev": 11, "test": 13})
    small_data.write_tagged(folder / "tagged", {"train": 29, "dev": 11, "test": 13})
    small_data.write_sounds(folder / "sounds", {"train": 14, "val": 3, "test": 3})
    dropouts = ("hidden_dropout", "attention_dropout", "activation_dropout", "feat_proj_dropout", "final_dropout")
    tiny_models.write_tiny_waveform_model(folder / "wav2vec2", **dict.fromkeys(dropouts, 0.0))
    small_data.write_videos(folder / "videos", {"train": 14, "val": 3, "test": 3})
    tiny_models.write_tiny_video_model(folder / "videomae")
    small_data.write_pairs(folder / "both", {"train": 9, "val": 3, "test": 3})
    config = json.loads((folder / "bert" / "config.json").read_text())
    config.update(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    (folder / "bert" / "config.json").write_text(json.dumps(config))
    (folder / "mine.py").write_text(MINE)
    (folder / "numbers").mkdir()
    for path in (folder / "texts").iterdir():
        table = path.read_text().replace(",good\n", ",1.5\n").replace(",bad\n", ",-0.5\n")
        (folder / "numbers" / path.name).write_text(table)
    return folder


def launch(place: Path, recipe: str, *flags: str, **environment: str) -> Done:
    """One recipe through `accelerate launch`, from nothing to its end."""
    return run_command([*LAUNCH, str(ROOT / "recipes" / recipe), *flags], place, **environment)


def printed(done: Done) -> str:
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def logged(run: Path, name: str) -> list[float]:
    """A value of each step of a run."""
    lines = [json.loads(line) for line in (run / "logs" / "log.jsonl").read_text().splitlines()]
    return [line[name] for line in lines if name in line]


COMMON = ("--logging_steps=1", "--num_train_epochs=2", "--max_grad_norm=0.5")
# Methods, a penalty and a loss, in mine.py. `double` is `full` in float64: AdamW makes a whole step of a gradient that
# is nothing but rounding.
MINE = """
import dataclasses, os, signal
import torch
from transformers import TrainerCallback
from hftl.losses import CrossEntropyLoss
from hftl.methods import METHODS

def loss_of_doubles(outputs, labels, num_items_in_batch=None):
    total = torch.nn.functional.cross_entropy(outputs["logits"].double(), labels, reduction="sum")
    return total / (labels.numel() if num_items_in_batch is None else num_items_in_batch)

def as_double(module, args, inputs):
    return args, {k: v.double() if v.is_floating_point() else v for k, v in inputs.items()}

def double(model, arguments):
    model.double().register_forward_pre_hook(as_double, with_kwargs=True)
    plan = METHODS["full"](model, arguments)
    return dataclasses.replace(plan, stages=(dataclasses.replace(plan.stages[0], loss=loss_of_doubles),))

def twice(stage, model, batch, outputs):
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    return (model(**inputs)["logits"] * outputs["logits"]).sum(dim=1).mean()

def shares(outputs, labels, num_items_in_batch=None):
    if labels.ndim == 2:
        with open(f"shares-{os.environ.get('RANK', '0')}", "a") as file:
            share = float(labels[(labels > 0) & (labels < 1)].min())
            file.write(f"{share:.4e} {labels.shape} {int(num_items_in_batch)}\\n")
    return CrossEntropyLoss()(outputs, labels, num_items_in_batch)

def gone(model, arguments):
    if os.environ["RANK"] == os.environ["CHOSEN_RANK"]:
        os._exit(143)
    return METHODS["full"](model, arguments)

class Late(TrainerCallback):
    def on_step_begin(self, args, state, control, **others):
        if state.global_step == 2 and os.environ["RANK"] != os.environ["CHOSEN_RANK"]:
            os.kill(os.getpid(), signal.SIGTERM)

    def on_step_end(self, args, state, control, **others):
        if state.global_step == 3 and os.environ["RANK"] == os.environ["CHOSEN_RANK"]:
            os.kill(os.getpid(), signal.SIGTERM)

def late(model, arguments):
    return dataclasses.replace(METHODS["full"](model, arguments), callbacks=(Late(),))

class Words(TrainerCallback):
    def write(self, model):
        embedding = model.get_input_embeddings()
        with open(f"gradients-{os.environ.get('RANK', 'alone')}", "a") as file:
            file.write(f"{embedding.sparse} {embedding.weight.grad.is_sparse}\\n")

    def on_substep_end(self, args, state, control, model, **others):
        self.write(model)

    def on_pre_optimizer_step(self, args, state, control, model, **others):
        self.write(model)

def words(model, arguments):
    return dataclasses.replace(METHODS["full"](model, arguments), callbacks=(Words(),))

class Stopping(CrossEntropyLoss):
    calls = 0

    def __call__(self, *values, **others):
        self.calls += torch.is_grad_enabled()
        if self.calls == 3 and os.environ.get("RANK") == os.environ.get("CHOSEN_RANK"):
            os.kill(os.getpid(), signal.SIGTERM)
        return super().__call__(*values, **others)

def stopping(model, arguments):
    plan = METHODS["full"](model, arguments)
    return dataclasses.replace(plan, stages=(dataclasses.replace(plan.stages[0], loss=Stopping()),))
"""


#: recipe and flags
TRAININGS = {
    "untrained images": (
        "image_classification.py --dataset=images --model=convnet --augmentation=none --method=mine.py:double"
    ),
    "pretrained images": (
        "image_classification.py --dataset=builtin:digits --model=builtin:efficientnet_lite0 --augmentation=none "
        "--image_size=64 --max_train_samples=64 --max_eval_samples=20"
    ),
    "texts": "text_classification.py --dataset=texts --model=bert --method=full",
    "texts with adapters": "text_classification.py --dataset=texts --model=bert --method=lora --lora_dropout=0",
    "sounds": "audio_classification.py --dataset=sounds --model=wav2vec2 --augmentation=none",
    "videos": "video_classification.py --dataset=videos --model=videomae --augmentation=none",
    "images with texts": (
        "image_text_classification.py --dataset=both --model=convnet --text_model=bert --augmentation=none "
        "--modality_dropout=0 --fusion_dropout=0 --learning_rate=1e-4"
    ),
    "texts of several labels": (
        "text_classification.py --dataset=texts --model=bert --problem_type=multi_label_classification"
    ),
    "tags of words": "token_classification.py --dataset=tagged --model=bert --ddp_static_graph=true",
    "choices": "multiple_choice.py --dataset=choices --model=bert",
    "texts with numbers": "text_classification.py --dataset=numbers --model=bert --problem_type=regression",
    "texts, head first": "text_classification.py --dataset=texts --model=bert --method=lp_ft --head_solver=sgd",
    "averaged texts, near to the start": (
        "text_classification.py --dataset=texts --model=bert --average=soup --wise_ft --sampler=balanced "
        "--loss=focal --word_dropout=0.2 --penalty=delta"
    ),
    "moving average of texts, passed twice": (
        "text_classification.py --dataset=texts --model=bert --method=full --average=ema --penalty=mine.py:twice"
    ),
}


#: those that begin with the real launcher; the others begin as it would begin them
LAUNCHED = {"untrained images", "texts"}
#: Those where the one process sees the rows of a step in two portions too. In float32 a convolutional network at the
#: default rates multiplies a difference in rounding by five with each step: equal sums stay equal, bit for bit.
IN_PORTIONS = {"pretrained images"}


@pytest.mark.slow
@pytest.mark.parametrize("kind", TRAININGS)
def test_two_processes_train_as_one(place: Path, kind: str) -> None:
    recipe, *flags = [*TRAININGS[kind].split(), *COMMON]
    script = str(ROOT / "recipes" / recipe)
    size = ["--per_device_train_batch_size=8"]
    if kind in IN_PORTIONS:
        size = ["--per_device_train_batch_size=4", "--gradient_accumulation_steps=2"]
    alone = printed(run_command([script, *flags, f"--output_dir={kind}-1", *size], place))
    flags += [f"--output_dir={kind}-2", "--per_device_train_batch_size=4"]
    if kind in LAUNCHED:
        output = printed(launch(place, recipe, *flags))
    else:
        output, other = map(printed, run_ranks([script, *flags], place))
        assert other == ""
    one, two = place / f"{kind}-1", place / f"{kind}-2"
    for name in ("loss", "grad_norm"):
        # AdamW hides a gradient that is off by a factor; of rounding a norm has more than a loss.
        assert logged(two, name) == pytest.approx(logged(one, name), rel=1e-5 if name == "loss" else 1e-3)
    weights, same = load_file(one / "model.safetensors"), load_file(two / "model.safetensors")
    if kind == "choices":  # a number that is added to each choice changes nothing: its gradient is rounding alone
        del weights["classifier.bias"]
    for name, weight in weights.items():
        assert same[name].float().sub(weight.float()).abs().max() < 1e-4, name
    assert (two / "config.json").read_text() == (one / "config.json").read_text()  # with the label map
    first, second = (json.loads((run / "metrics.json").read_text()) for run in (one, two))
    for split in ("validation", "test"):
        counted = {"accuracy", "subset_accuracy", "mae"} & set(first[split])
        for name in counted:  # every row once
            assert second[split][name] == pytest.approx(first[split][name], rel=1e-5)
        assert counted
        assert second[split]["loss"] == pytest.approx(first[split]["loss"], rel=1e-4)
    for row, expected in zip(predictions(two), predictions(one), strict=True):
        names = 2 if kind == "texts with numbers" else 3
        assert row[:names] == expected[:names]
        numbers = slice(names, 4 if kind == "tags of words" else None)
        wanted = [float(value) for value in expected[numbers]]
        assert [float(value) for value in row[numbers]] == pytest.approx(wanted, abs=1e-4)
    # One set of messages: those of one process, apart from times, the folder and the number of processes.
    assert output.count("saved in:") == alone.count("saved in:") == 1
    assert output.count("stage") == alone.count("stage")
    assert len(output.splitlines()) <= len(alone.splitlines()) + 1


def predictions(run: Path) -> list[list[str]]:
    with (run / "predictions.csv").open(newline="") as file:
        return list(csv.reader(file))[1:]


@pytest.mark.slow
@pytest.mark.parametrize("most", ["0.5", "0"])
def test_two_processes_exchange_the_rows_of_their_words(place: Path, most: str) -> None:
    """Also behind parts of a step, which each process adds up alone, and where no norm is limited."""
    flags = ["--model=bert", "--dataset=texts", "--method=mine.py:words", "--max_train_samples=28", *COMMON]
    flags += ["--gradient_accumulation_steps=2", f"--max_grad_norm={most}", "--overwrite"]
    recipe = str(ROOT / "recipes" / "text_classification.py")
    printed(run_command([recipe, *flags, "--per_device_train_batch_size=4", "--output_dir=words-1"], place))
    for done in run_ranks([recipe, *flags, "--per_device_train_batch_size=2", "--output_dir=words-2"], place):
        printed(done)
    seen = {name: place / f"gradients-{name}" for name in ("alone", "0", "1")}
    parts = {name: file.read_text().splitlines() for name, file in seen.items()}
    for file in seen.values():
        file.unlink()
    for lines in parts.values():
        assert lines[:2] == ["True True", "True False"]  # the part of a step; the whole, for the optimizer
        assert len(lines) == len(parts["alone"])
    one, two = (load_file(place / run / "model.safetensors") for run in ("words-1", "words-2"))
    for name, weight in one.items():
        assert two[name].sub(weight).abs().max() < 1e-4, name


@pytest.mark.slow
def test_two_processes_mix_their_own_rows(place: Path) -> None:
    flags = ["--dataset=images", "--model=convnet", "--mixup=1", "--max_steps=2", "--loss=mine.py:shares"]
    flags += ["--per_device_train_batch_size=4", "--logging_steps=1", "--test_time_flip"]
    recipe = str(ROOT / "recipes" / "image_classification.py")
    for done in run_ranks([recipe, *flags, "--output_dir=mixed-1"], place):
        printed(done)
    first, second = ((place / f"shares-{rank}").read_text().splitlines() for rank in (0, 1))
    assert len(first) == len(second) == 2
    assert all(line.endswith("torch.Size([4, 3]) 8") for line in first + second)
    assert len({line.split()[0] for line in first + second}) == 4  # another weight in each step and process
    for done in run_ranks([recipe, *flags, "--output_dir=mixed-2"], place):
        printed(done)
    one, two = (load_file(place / name / "model.safetensors") for name in ("mixed-1", "mixed-2"))
    assert [name for name in one if not one[name].equal(two[name])] == []


@pytest.mark.slow
def test_ranks_that_do_not_see_each_other_are_an_error(place: Path) -> None:
    words = [str(ROOT / "recipes" / "text_classification.py"), "--model=bert", "--dataset=texts", "--output_dir=alone"]
    result = run_command(words, place, WORLD_SIZE="2", RANK="0")  # as MPI or Slurm may leave it
    assert result.returncode == 2, result.stderr
    assert "do not see each other" in result.stderr
    assert not (place / "alone").exists()


@pytest.mark.slow
@pytest.mark.parametrize("gone", ["0", "1"])
def test_a_process_that_is_left_alone_says_so(place: Path, gone: str) -> None:
    flags = ["--model=bert", "--dataset=texts", "--method=mine.py:gone", f"--output_dir=gone-{gone}"]
    recipe = str(ROOT / "recipes" / "text_classification.py")
    left = run_ranks([recipe, *flags], place, CHOSEN_RANK=gone)[1 - int(gone)]
    assert left.returncode == 1
    assert "Another process of this run has ended" in left.stderr
    assert "Traceback" not in left.stderr


@pytest.mark.slow
@pytest.mark.parametrize("late", ["0", "1"])
def test_a_signal_that_comes_when_the_processes_have_agreed(place: Path, late: str) -> None:
    """A launcher tells one process after the other, and the end of a step may lie between."""
    flags = [*COMMON, "--model=bert", "--dataset=texts", "--method=mine.py:late", "--per_device_train_batch_size=4"]
    recipe = str(ROOT / "recipes" / "text_classification.py")
    ranks = run_ranks([recipe, *flags, f"--output_dir=late-{late}"], place, CHOSEN_RANK=late)
    assert [done.returncode for done in ranks] == [143, 143], [done.stderr for done in ranks]
    assert sum(done.stderr.count("Stopped by SIGTERM. Go on") for done in ranks) == 1
    assert list(place.glob(f"late-{late}/checkpoints/1-all/checkpoint-3/trainer_state.json"))


@pytest.mark.slow
def test_two_processes_stop_and_go_on(place: Path) -> None:
    flags = [*COMMON, "--model=bert", "--dataset=texts", "--method=mine.py:stopping"]
    flags += ["--per_device_train_batch_size=4", "--output_dir=stopped-2"]
    stopped = launch(place, "text_classification.py", *flags, CHOSEN_RANK="1")
    assert stopped.returncode != 0  # the launcher's own code
    assert "SIGTERM" in stopped.stderr
    assert list(place.glob("stopped-2/checkpoints/1-all/checkpoint-3/trainer_state.json"))
    recipe = str(ROOT / "recipes" / "text_classification.py")
    for words in ([*flags, "--resume"], [flag.replace("stopped-2", "whole-2") for flag in flags]):
        for done in run_ranks([recipe, *words], place):
            printed(done)
    resumed = load_file(place / "stopped-2" / "model.safetensors")
    undisturbed = load_file(place / "whole-2" / "model.safetensors")
    assert [name for name in undisturbed if not undisturbed[name].equal(resumed[name])] == []
