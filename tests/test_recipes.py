"""The recipes and configurations that people start from: each runs, and so does every command shown."""

from __future__ import annotations

import ast
import functools
import re
import shlex
from pathlib import Path

import pytest
import tiny_models
import yaml

import hftl
from hftl import auto, builtin, cli, lr_find, training

ROOT = Path(__file__).resolve().parent.parent
RECIPES = sorted((ROOT / "recipes").glob("*.py"))
CONFIGS = sorted((ROOT / "recipes" / "configs").glob("*.yaml"))
#: the built-in data and weights, but little of them and small
SMALL = ["--max_train_samples=24", "--max_eval_samples=20", "--num_train_epochs=1", "--dataloader_num_workers=0"]
SMALL += ["--per_device_train_batch_size=8", "--report_to=none", "--save_only_model"]


@pytest.fixture(autouse=True)
def _short_ladder(monkeypatch: pytest.MonkeyPatch) -> None:
    """`--method auto` climbs to its last rung, without the trials before it and the epochs that time would allow.

    A range test of the rate has few steps.
    """
    monkeypatch.setattr(training, "sweep", functools.partial(lr_find.sweep, steps=20))
    monkeypatch.setattr(auto, "_EPOCHS_FOR_TRIALS", 1e9)
    monkeypatch.setattr(auto, "_EPOCHS_OF_RUN", (auto._EPOCHS_OF_RUN[0], 1.0))


#: configurations that train the real weights; to load, train and save its 24 million a hundred times takes minutes
REAL_MINILM = ("text_classification_full", "text_classification_frozen", "text_classification_lora")


@pytest.fixture(scope="module")
def tiny_minilm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_models.write_tiny_text_model(tmp_path_factory.mktemp("models") / "minilm")


@pytest.fixture
def with_tiny_minilm(tiny_minilm: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A small BERT in MiniLM's place."""
    monkeypatch.setitem(builtin.BUILTIN_MODELS, "minilm", lambda: tiny_minilm)


def small_flags(task: str, method: str) -> list[str]:
    sizes = {"image": ["--image_size=64"], "video": ["--image_size=32", "--frames=4"]}
    flags = [*SMALL, *sizes.get(task.partition("-")[0], [])]
    return [flag for flag in flags if method != "auto" or "num_train_epochs" not in flag]


@pytest.mark.slow
@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_configuration_runs(
    path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], request: pytest.FixtureRequest
) -> None:
    if path.stem not in REAL_MINILM:
        request.getfixturevalue("with_tiny_minilm")
    settings = yaml.safe_load(path.read_text())
    flags = [*small_flags(settings["task"], settings["method"]), f"--output_dir={tmp_path / 'run'}"]
    flags = [flag for flag in flags if "shots" not in settings or "max_train_samples" not in flag]
    flags += ["--head_epochs=1"] if settings["method"] == "lp_ft" else []
    cli._run(["train", "--config", str(path), *flags])
    printed = capsys.readouterr().out
    assert (
        len(printed[: re.search("epoch 1|solved in", printed).start()].splitlines()) <= 16
    )  # one screen before training starts
    run = hftl.load_run(tmp_path / "run")
    assert 0 <= run.metrics["test"][run.task.problem.headline[0][0]] <= 1
    assert run.task.name == settings["task"]
    assert settings["method"] in ("auto", run.task.arguments.method)


def test_there_is_a_configuration_for_every_task_and_every_method() -> None:
    from hftl.methods import METHODS
    from hftl.tasks import TASKS

    there = {path.stem for path in CONFIGS}
    recipes = [recipe for _, _, recipe in TASKS.values()]
    of_texts = {f"text_classification_{method}" for method in METHODS if method != "zero_shot"}  # which is for images
    assert {f"{recipe}_frozen" for recipe in recipes} | of_texts <= there
    assert there <= {f"{recipe}_{method}" for recipe in recipes for method in METHODS}


def commands(text: str) -> list[list[str]]:
    """The shell commands in a text that train something, continuation lines joined."""
    joined = re.sub(r"\\\n\s*", "", text)
    lines = re.findall(r"^[ |`]*.*?((?:accelerate launch|python|hftl train) [^`|\n]+)", joined, flags=re.MULTILINE)
    found = [shlex.split(line, comments=True) for line in lines]
    return [words for words in found if any("recipes/" in word or word == "train" for word in words)]


def recipe_and_flags(words: list[str]) -> tuple[Path, list[str]]:
    """The recipe that a command runs, and the recipe's flags."""
    if words[:2] == ["hftl", "train"]:
        return cli.find_recipe(words[2]), words[3:]
    position = next(index for index, word in enumerate(words) if word.endswith(".py"))
    return ROOT / words[position], words[position + 1 :]


def with_builtins(page: Path) -> str:
    """The training commands of a page that need nothing of the reader's, or of the Hub."""
    words = [words for words in commands(page.read_text()) if "builtin:" in " ".join(words)]
    return "\n".join(shlex.join(line) for line in words if "FOLDER" not in line and not line[2].startswith("--"))


def what_it_does(words: list[str]) -> tuple[str, ...]:
    """The recipe and the flags of a command, wherever it writes: several pages show the same."""
    path, flags = recipe_and_flags(words)
    places = [number for number, flag in enumerate(flags) if flag == "--output_dir"]
    return (path.stem, *(flag for number, flag in enumerate(flags) if not {number, number - 1} & set(places)))


_EVERY = [
    words
    for text in [
        *(ast.get_docstring(ast.parse(path.read_text())) or "" for path in RECIPES),
        (ROOT / "README.md").read_text(),
        *map(with_builtins, sorted((ROOT / "docs").rglob("*.md"))),
    ]
    for words in commands(text)
    if not {"…", "NEW", "TASK", "my_recipe.py"} & set(words) and "hf://" not in " ".join(words)
]
SHOWN = {" ".join(words): words for words in {what_it_does(words): words for words in _EVERY}.values()}


def test_commands_are_found() -> None:
    assert len(SHOWN) >= 12


@pytest.mark.slow
@pytest.mark.parametrize("words", SHOWN.values(), ids=SHOWN)
def test_shown_command_works(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, with_tiny_minilm: None
) -> None:
    monkeypatch.chdir(ROOT)
    path, flags = recipe_and_flags(words)
    assert path.is_file()
    text = path.read_text()
    if flags[:1] == ["--config"]:
        assert ROOT / flags[1] in CONFIGS  # each of which `test_configuration_runs` runs
        return
    if "builtin:" not in " ".join(flags) and "--config" not in flags:
        # A model of the Hub, or data of the reader's: what can be checked here is that the flags are right.
        (name,) = set(re.findall(r"hftl\.(\w+Arguments)", text))
        hftl.parse(getattr(hftl, name), flags)
        return
    small = small_flags("image" if re.search("Image(Text)?Arguments", text) else "", "auto" if "auto" in flags else "")
    if "--shots" in flags or path.stem == "text_few_shot":
        small = [flag for flag in small if "max_train_samples" not in flag]
    if {"--head", "--feature_layers"} & set(flags):  # which is fitted
        small = [flag for flag in small if "train_epochs" not in flag and "batch_size" not in flag]
    if "--repeats" in flags:
        small.append("--repeats=2")
    if "--average" in flags:  # of several checkpoints
        small = [flag for flag in small if flag != "--save_only_model"]
    run = cli.run_recipe(path, [*flags, *small, f"--output_dir={tmp_path / 'run'}"])
    assert (run.folder / "metrics.json").is_file()


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipes_are_short(path: Path) -> None:
    lines = [line for line in path.read_text().splitlines() if line.strip() and not line.lstrip().startswith("#")]
    assert len(lines) < (120 if path.stem == "custom_modality" else 60)  # which brings data and a network of its own
