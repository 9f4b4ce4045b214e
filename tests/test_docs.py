"""The documentation: it builds, knows every error and every paper, and shows nothing that hftl would refuse."""

from __future__ import annotations

import argparse
import ast
import os
import re
import shlex
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from test_recipes import ROOT, recipe_and_flags

import hftl
from hftl import cli, folder, push
from hftl.arguments import flag_names
from hftl.loading import load_file
from hftl.losses import check_loss
from hftl.methods import check_method
from hftl.tasks import TASKS, find_task

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
#: a comment that says why what follows cannot be checked
_NOT_RUN = re.compile(r"<!-- not run: \S.* -->\s*$")
_CITED = re.compile(
    r"\b([A-Z][\w-]+(?: [A-Z][\w-]+)?(?: and [A-Z]\w+)?(?: et al\.)?|McNemar's test) \(?((?:19|20)\d\d)\b"
)


class Block(NamedTuple):
    """A fenced block: where it is, what it holds, and whether a comment stands before it."""

    place: str
    code: str
    excused: bool


def blocks(language: str) -> list[Block]:
    found = []
    for path in PAGES:
        text = path.read_text(encoding="utf-8")
        for match in re.finditer(rf"^( *)```{language}\n(.*?)^\1```$", text, flags=re.MULTILINE | re.DOTALL):
            line = text.count("\n", 0, match.start()) + 1
            before = text[: match.start()].rstrip("\n")
            place = f"{path.relative_to(ROOT)}:{line}"
            found.append(Block(place, textwrap.dedent(match[2]), bool(_NOT_RUN.search(before))))
    return found


def checked_blocks() -> list[Block]:
    return [block for block in blocks("bash") if not block.excused]


def lines_of(code: str) -> list[list[str]]:
    """The commands of a block as words, without comments and settings of the environment before them."""
    words = [shlex.split(line, comments=True) for line in re.sub(r"\\\n\s*", "", code).splitlines()]
    bare = [line[next((i for i, word in enumerate(line) if not re.match(r"\w+=", word)), 0) :] for line in words]
    return [line for line in bare if line]


class _Parsed(Exception):
    """What a parser of a command made of its words: it stops the command before it does anything."""


def check_flags(arguments_class: Any, flags: list[str]) -> None:
    arguments = hftl.parse(arguments_class, flags)
    check_method(arguments)
    check_loss(arguments)


def check_recipe(path: Path, flags: list[str]) -> None:
    assert path.is_file(), path
    named = re.search(r"hftl\.(\w+Arguments), argv", path.read_text(encoding="utf-8"))
    ordinary = getattr(hftl, named[1]) if named else None
    check_flags(getattr(load_file(path, "Recipe"), "Arguments", ordinary), flags)


def check_hftl(words: list[str]) -> None:
    command, rest = words[1], words[2:]
    if command == "train" and rest[0] == "--config":
        check_recipe(cli.find_recipe(cli._task_of_config(rest)), rest)
    elif command == "train":
        check_recipe(*recipe_and_flags(words))
    elif command == "advise":
        check_flags(find_task(rest[0]).arguments_class, rest[1:])
    elif command != "--version":
        with pytest.raises(_Parsed) as parsed:
            cli._run(words[1:])
        options, unknown = parsed.value.args
        if command in ("rank", "check-labels", "lr-find", "tune"):  # the other flags are those of a training
            task = options.task or "image-classification" if command == "rank" else rest[0]
            check_flags(find_task(task).arguments_class, unknown)
        else:
            assert not unknown


def check_launch(words: list[str]) -> None:
    from accelerate.commands.launch import launch_command_parser

    launch = launch_command_parser().parse_args(words[2:])
    assert launch.config_file is None or (ROOT / launch.config_file).is_file()
    if launch.module:
        assert launch.training_script == "hftl"
        check_hftl(["hftl", *launch.training_script_args])
    else:
        check_recipe(ROOT / launch.training_script, launch.training_script_args)


def check_script(words: list[str]) -> None:
    path = ROOT / words[1]
    if words[1].startswith("recipes/"):
        check_recipe(path, words[2:])
    else:
        text = path.read_text(encoding="utf-8")
        assert all(f'"{word.partition("=")[0]}"' in text for word in words[2:] if word.startswith("--"))


def check_pip(words: list[str]) -> None:
    assert words[1] == "install"
    extras = re.findall(r"(?:\.|hftl)\[([\w,]+)\]", " ".join(words))
    known = re.search(
        r"\[project\.optional-dependencies\]\n(.*?)\n\[", (ROOT / "pyproject.toml").read_text(), re.DOTALL
    )
    assert known is not None
    assert set(",".join(extras).split(",")) - {""} <= set(re.findall(r"^(\w+) = ", known[1], re.MULTILINE))


def check(words: list[str]) -> bool:
    """Whether the command is of a kind that can be checked; it is right then."""
    if words[0] == "hftl":
        check_hftl(words)
    elif words[:2] == ["accelerate", "launch"]:
        check_launch(words)
    elif words[0] in ("python", "bash") and words[1].startswith(("scripts/", "recipes/")):
        check_script(words)
    elif words[0] == "pip":
        check_pip(words)
    else:
        return False
    return True


@pytest.fixture
def _stopped_parsers(monkeypatch: pytest.MonkeyPatch) -> None:
    original = argparse.ArgumentParser.parse_known_args

    def parse(self: Any, *args: Any, **kwargs: Any) -> Any:
        raise _Parsed(*original(self, *args, **kwargs))

    monkeypatch.setattr(cli._Parser, "parse_known_args", parse)
    monkeypatch.chdir(ROOT)


@pytest.mark.usefixtures("_stopped_parsers")
@pytest.mark.parametrize(
    "block", [block for block in blocks("bash") if not block.excused], ids=lambda block: block.place
)
def test_a_shown_command_is_known(block: Block) -> None:
    for words in lines_of(block.code):
        assert check(words), f"{block.place}: put `<!-- not run: reason -->` before it, or mend: {' '.join(words)}"


@pytest.mark.usefixtures("_stopped_parsers")
@pytest.mark.parametrize(
    "command",
    [
        "hftl train text-classification --model m --dataset d --no_such_flag",
        "hftl train text-classification --model m --dataset d --method full --lora_r 4",
        "hftl predict RUN INPUT --no_such_flag",
        "hftl no-such-command",
        "accelerate launch --no_such_flag recipes/text_classification.py",
        "python scripts/benchmark.py --no_such_flag",
        "pip install '.[no_such_extra]'",
    ],
)
def test_a_wrong_command_is_noticed(command: str) -> None:
    with pytest.raises((hftl.UsageError, AssertionError, SystemExit)):
        check(shlex.split(command))


@pytest.mark.parametrize("block", blocks("python"), ids=lambda block: block.place)
def test_shown_code_compiles(block: Block) -> None:
    compile(block.code, block.place, "exec")


def test_there_are_commands_and_code() -> None:
    assert len(checked_blocks()) > 50
    assert len(blocks("python")) > 15


def test_every_flag_of_the_pages_exists() -> None:
    from accelerate.commands.launch import launch_command_parser

    known = {name for task in TASKS for name in flag_names(find_task(task).arguments_class)} | {"config", "help"}
    known |= {text.lstrip("-") for action in launch_command_parser()._actions for text in action.option_strings}
    for path in ("hftl/cli.py", "scripts/benchmark.py"):
        known |= set(re.findall(r'"--([\w-]+)"', (ROOT / path).read_text(encoding="utf-8")))
    found = 0
    for path in PAGES:
        text = re.sub(r"```.*?```", "", path.read_text(encoding="utf-8"), flags=re.DOTALL)
        code = " ".join(re.findall(r"`([^`]+)`", text))
        shown = set(re.findall(r"(?<!\S)--([a-z][\w-]*)", code))
        assert shown <= known, (path, shown - known)
        found += len(shown)
    assert found > 200


def test_every_paper_is_listed() -> None:
    listed = (ROOT / "docs" / "papers.md").read_text(encoding="utf-8")
    sources = [path for folder in ("hftl", "recipes") for path in sorted((ROOT / folder).rglob("*.py"))]
    text = "\n".join(re.sub(r"\n\s*#?:? ?", " ", path.read_text(encoding="utf-8")) for path in sources)
    cited = {(author.replace("'s test", ""), year) for author, year in _CITED.findall(text)}
    papers = {pair for pair in cited if pair[0] not in ("November", "Copyright")}
    assert len(papers) > 50
    assert not [pair for pair in sorted(papers) if " ".join(pair) not in listed]


@pytest.mark.slow
def test_the_site_builds_and_knows_every_error(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    done = subprocess.run(command, cwd=ROOT, env=os.environ, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    page = (tmp_path / "site" / "troubleshooting.html").read_text(encoding="utf-8")
    anchors = re.findall(r'<p id="([^"]+)"><code>', page)
    calls = [
        node
        for path in (ROOT / "hftl").rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") in ("UsageError", "DiskError", "Diverged")
    ]
    assert len(anchors) == len(set(anchors)) == len(calls) + len(push._ADVICE) + len(folder._DISK_ERRORS) > 100
    assert "it wants a token: make one that may write" in page
    flags = (tmp_path / "site" / "flags.html").read_text(encoding="utf-8")
    assert 'id="lora_r"' in flags
    assert 'id="embedding_size"' in flags
    assert 'id="word_dropout"' in flags
    pages = "\n".join(path.read_text(encoding="utf-8") for path in (tmp_path / "site").rglob("*.html"))
    assert not re.findall(r'(?:<script[^>]* src|<link[^>]* rel="stylesheet"[^>]* href)="https?:[^"]*"', pages)
