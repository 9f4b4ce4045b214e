"""Scripts by which a shell completes `hftl …`: commands, tasks, flags, and the values of those that have a few."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import re
from collections.abc import Callable, Mapping, Sequence

from hftl.arguments import AudioArguments, ImageTextArguments, VideoArguments, flag_names
from hftl.methods import METHODS
from hftl.methods.adapters import SHORT_NAMES
from hftl.tasks import TASKS

_BASH = """_hftl() {{
    local words current=${{COMP_WORDS[COMP_CWORD]}} training="{flags}"
    case ${{COMP_WORDS[COMP_CWORD-1]}} in
{values}
    esac
    if [ -z "$words" ]; then
        case $COMP_CWORD,${{COMP_WORDS[1]}} in
            1,*) words="{commands}" ;;
            2,train|2,advise|2,check-labels|2,lr-find|2,tune) words="{tasks}" ;;
            2,completion) words="bash zsh fish" ;;
{own}
        esac
    fi
    COMPREPLY=($(compgen -W "$words" -- "$current"))
}}
complete -o default -F _hftl hftl
"""


#: commands that take the flags of a task
_TRAINING = ("train", "advise", "check-labels", "lr-find", "tune", "rank")


def script(shell: str, commands: Mapping[str, Callable[[list[str]], object]]) -> str:
    """The script of a shell.

    Args:
        shell: bash, zsh or fish.
        commands: of hftl, by name.
    """
    names, values = _flags()
    own = {name: _flags_of(command) for name, command in commands.items() if name not in ("train", "advise")}
    own |= {"train": [], "advise": []}
    if shell == "fish":
        training = f"'__fish_seen_subcommand_from {' '.join(_TRAINING)}'"
        lines = [f"complete -c hftl -n __fish_use_subcommand -a '{' '.join(commands)}'"]
        lines.append(f"complete -c hftl -n {training} -a '{' '.join(TASKS)}'")
        for name in names:
            choices = f" -x -a '{' '.join(values[name])}'" if name in values else " -r"
            lines.append(f"complete -c hftl -n {training} -l {name}{choices}")
        for command, flags in own.items():
            seen = f"'__fish_seen_subcommand_from {command}'"
            lines += [f"complete -c hftl -n {seen} -l {name}" for name in flags]
        return "\n".join(lines) + "\n"
    text = _BASH.format(
        values="\n".join(f'        --{name}) words="{" ".join(choices)}" ;;' for name, choices in values.items()),
        commands=" ".join(commands),
        tasks=" ".join(TASKS),
        flags=" ".join(f"--{name}" for name in names),
        own="\n".join(
            f'            *,{command}) words="{"$training " * (command in _TRAINING)}'
            f'{" ".join(f"--{name}" for name in flags)}" ;;'
            for command, flags in own.items()
            if flags or command in _TRAINING
        ),
    )
    return f"autoload -U +X bashcompinit && bashcompinit\n{text}" if shell == "zsh" else text


def _flags_of(command: Callable[[list[str]], object]) -> list[str]:
    """The flags in the help of a command."""
    with contextlib.redirect_stdout(io.StringIO()) as text, contextlib.suppress(SystemExit):
        command(["--help"])
    return sorted(set(re.findall(r"^  (?:-\w, )?--([a-z_]+)", text.getvalue(), re.MULTILINE)))


def _flags() -> tuple[list[str], Mapping[str, Sequence[str]]]:
    """The flags of all tasks, and the values of those that have a few."""
    classes = (AudioArguments, VideoArguments, ImageTextArguments)  # which has those of images and texts
    names = sorted({name for one in classes for name in flag_names(one)} | {"config"})
    values: dict[str, Sequence[str]] = {"method": [*METHODS, *SHORT_NAMES]}
    for item in (item for one in classes for item in dataclasses.fields(one)):
        if "choices" in item.metadata:
            values[item.name] = item.metadata["choices"]
    return names, values
