"""Arguments: a file and the command line into one dataclass, and back into a file."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

import hftl
from hftl import cli, completion
from hftl.arguments import ImageArguments, TextArguments, flag_names, parse, to_recipe


def test_command_line_wins_over_the_file(tmp_path: Path) -> None:
    path = tmp_path / "settings.yaml"
    path.write_text("learning_rate: 1e-5\nmodel: some/model\nhorizontal_flip: false\nmetrics: [a, b]\nseed: 7\n")
    arguments = hftl.parse(hftl.ImageArguments, ["--config", str(path), "--seed", "8", "--warmup-steps=5"])
    assert (arguments.learning_rate, arguments.model_name_or_path, arguments.horizontal_flip) == (
        1e-5,
        "some/model",
        False,
    )
    assert (arguments.metrics, arguments.seed, arguments.warmup_steps) == (["a", "b"], 8, 5)
    wanted = {"learning_rate", "model_name_or_path", "horizontal_flip", "metrics", "seed", "warmup_steps"}
    assert arguments.given == wanted


UNUSUAL = {
    "seed": 0,
    "max_grad_norm": 0.0,
    "weight_decay": 0.0,
    "horizontal_flip": False,
    "load_best_model_at_end": False,
    "metrics": ["one", "two"],
    "lora_target_modules": ["query", "value"],
    "lr_scheduler_kwargs": {"num_cycles": 2},
    "lr_scheduler_type": "cosine_with_restarts",
    "greater_is_better": False,
    "metric_for_best_model": "loss",
    "gradient_accumulation_steps": 3,
    "label_smoothing_factor": 0.1,
    "label_column": "null",
}


def test_recipe_gives_the_same_arguments(tmp_path: Path) -> None:
    first = tmp_path / "first.yaml"
    first.write_text(yaml.safe_dump(UNUSUAL))
    arguments = hftl.parse(hftl.ImageArguments, ["--config", str(first)])
    recipe = to_recipe(arguments)
    assert {name: recipe.get(name) for name in UNUSUAL} == UNUSUAL
    second = tmp_path / "second.yaml"
    second.write_text(yaml.safe_dump(recipe))
    assert to_recipe(hftl.parse(hftl.ImageArguments, ["--config", str(second)])) == recipe


@pytest.mark.parametrize(
    ("task", "flags", "method"),
    [
        (hftl.ImageClassification, ["--model=some/model"], "lp_ft"),
        (hftl.ImageClassification, ["--model=random:resnet18", "--weights=mine.safetensors"], "lp_ft"),
        (hftl.ImageClassification, ["--model=random:resnet18"], "full"),
        (hftl.TextClassification, ["--model=some/model", "--keep_head"], "full"),
        (hftl.TextClassification, ["--model=some/model", "--max_steps=9"], "full"),
        (hftl.TextClassification, ["--model=some/model", "--fsdp=full_shard"], "full"),
        (hftl.TextClassification, ["--model=some/model", "--problem_type=regression"], "full"),
        (hftl.TokenClassification, ["--model=some/model"], "full"),
        (hftl.ImageSimilarity, ["--model=some/model"], "full"),
        (hftl.ImageTextClassification, ["--model=some/model", "--text_model=another"], "full"),
        (hftl.VideoClassification, ["--model=some/model"], "full"),
    ],
)
def test_a_new_head_of_a_pretrained_model_is_fitted_first_by_default(task: Any, flags: list[str], method: str) -> None:
    arguments = hftl.parse(task.arguments_class, flags)
    assert arguments.method == to_recipe(arguments)["method"] == method
    assert hftl.parse(task.arguments_class, [*flags, "--method=lora"]).method == "lora"


def test_sharded_weights_train_at_once_by_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    assert hftl.parse(hftl.TextArguments, ["--model=some/model"]).method == "full"


def test_no_secret_and_no_place_in_the_recipe() -> None:
    flags = [
        "--hub_token=hf_secret",
        "--output_dir=some/where",
        "--overwrite",
        "--push_to_hub",
        "--hub_model_id=me/mine",
    ]
    text = yaml.safe_dump(to_recipe(hftl.parse(hftl.TextArguments, flags)))
    assert "hf_secret" not in text
    assert "some/where" not in text


def test_task_of_another_recipe_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "settings.yaml"
    path.write_text("task: text-classification\n")
    with pytest.raises(hftl.UsageError, match=r"text-classification.*image-classification"):
        hftl.parse(hftl.ImageArguments, ["--config", str(path)])


def test_the_home_of_the_person_in_the_output_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/somebody")
    assert hftl.parse(hftl.TextArguments, ["--output_dir=~/run"]).output_dir == "/home/somebody/run"


def test_the_home_of_the_person_is_in_no_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", "/home/somebody")
    flags = ["--dataset=/home/somebody/data", "--penalty=~/own.py:pull", "--metrics", "/home/somebody/f1", "accuracy"]
    arguments = hftl.parse(hftl.TextArguments, [*flags, "--output_dir=~/run"])
    assert arguments.penalty == "/home/somebody/own.py:pull"
    recipe = to_recipe(arguments)
    assert (recipe["dataset_name"], recipe["metrics"]) == ("~/data", ["~/f1", "accuracy"])
    assert "somebody" not in arguments.to_json_string()  # what trackers are given
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    again = hftl.parse(hftl.TextArguments, ["--config", str(tmp_path / "recipe.yaml")])
    assert (again.dataset_name, again.metrics) == ("/home/somebody/data", ["/home/somebody/f1", "accuracy"])


@pytest.mark.parametrize("arguments_class", [ImageArguments, TextArguments])
def test_help_has_every_flag_below_a_heading(arguments_class: type, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse(arguments_class, ["--help"])
    shown = capsys.readouterr().out
    headings = ["Model:", "Data:", "Method:", "Of this task:"]
    places = [shown.index(f"\n{heading}") for heading in headings]
    assert places == sorted(places)
    assert places[0] < shown.index("--model_name_or_path") < places[1] < shown.index("--dataset_name") < places[2]
    assert "a 95 % interval" in " ".join(shown.split())
    for name in flag_names(arguments_class):
        assert f"--{name}" in shown, name


def test_a_shell_completes_commands_flags_and_values(tmp_path: Path) -> None:
    path = tmp_path / "script"
    path.write_text(completion.script("bash", cli._commands()))
    lines = [
        f"source {path}",
        'ask() { COMP_WORDS=("$@"); COMP_CWORD=$((${#COMP_WORDS[@]} - 1)); _hftl; echo "${COMPREPLY[@]}"; }',
        "ask hftl comp",
        "ask hftl train text",
        "ask hftl train text-classification --feature_cache_d",
        "ask hftl train text-classification --method lp",
        "ask hftl train text-classification --sampler b",
        "ask hftl push runs/pets --pr",
        "ask hftl predict runs/pets pictures --out",
        "ask hftl rank --task image-classification --models",
        "ask hftl tune text-classification --tri",
    ]
    done = subprocess.run(["bash", "-c", "\n".join(lines)], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == [
        "compare completion",
        "text-classification",
        "--feature_cache_dtype",
        "lp_ft",
        "balanced",
        "--private",
        "--output",
        "--models",
        "--trials",
    ]
    assert done.stderr == ""


@pytest.mark.parametrize("command", ["tune", "lr-find", "check-labels"])
@pytest.mark.parametrize("task", [[], ["text-classification"]])
def test_a_command_has_help_of_its_own(command: str, task: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        cli._run([command, *task, "--help"])
    shown = capsys.readouterr().out
    assert ended.value.code == 0
    assert len(shown) < 2_000
    assert {"tune": "--trials", "lr-find": "--steps", "check-labels": "--output"}[command] in shown
    assert "hftl train TASK --help" in shown


def test_other_shells_complete_too() -> None:
    commands = {"train": print, "push": cli._push}
    assert completion.script("zsh", commands).endswith(completion.script("bash", commands))
    script = completion.script("fish", commands)
    assert "-n '__fish_seen_subcommand_from push' -l create_pr" in script
    assert "-l sampler -x -a 'random balanced'" in script
    assert "-n __fish_use_subcommand -a 'train push'" in script
