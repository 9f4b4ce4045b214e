"""Scripts by which a shell completes `hftl …`: commands, tasks, flags, and the values of those that have a few."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

from hftl.arguments import AudioArguments, ImageArguments, TextArguments, flag_names
from hftl.methods import METHODS
from hftl.methods.adapters import SHORT_NAMES
from hftl.tasks import TASKS

_BASH = """_hftl() {{
    local words current=${{COMP_WORDS[COMP_CWORD]}}
    case ${{COMP_WORDS[COMP_CWORD-1]}} in
{values}
    esac
    if [ -z "$words" ]; then
        case $COMP_CWORD,${{COMP_WORDS[1]}} in
            1,*) words="{commands}" ;;
            2,train|2,advise|2,check-labels|2,lr-find|2,tune) words="{tasks}" ;;
            2,completion) words="bash zsh fish" ;;
            *,train|*,advise|*,check-labels|*,lr-find|*,tune|*,rank) words="{flags}" ;;
        esac
    fi
    COMPREPLY=($(compgen -W "$words" -- "$current"))
}}
complete -o default -F _hftl hftl
"""


def script(shell: str, commands: Sequence[str]) -> str:
    """The script of a shell.

    Args:
        shell: bash, zsh or fish.
        commands: of hftl.
    """
    names, values = _flags()
    if shell == "fish":
        training = "'__fish_seen_subcommand_from train advise check-labels lr-find tune rank'"
        lines = [f"complete -c hftl -n __fish_use_subcommand -a '{' '.join(commands)}'"]
        lines.append(f"complete -c hftl -n {training} -a '{' '.join(TASKS)}'")
        for name in names:
            choices = f" -x -a '{' '.join(values[name])}'" if name in values else " -r"
            lines.append(f"complete -c hftl -n {training} -l {name}{choices}")
        return "\n".join(lines) + "\n"
    text = _BASH.format(
        values="\n".join(f'        --{name}) words="{" ".join(choices)}" ;;' for name, choices in values.items()),
        commands=" ".join(commands),
        tasks=" ".join(TASKS),
        flags=" ".join(f"--{name}" for name in names),
    )
    return f"autoload -U +X bashcompinit && bashcompinit\n{text}" if shell == "zsh" else text


def _flags() -> tuple[list[str], Mapping[str, Sequence[str]]]:
    """The flags of all tasks, and the values of those that have a few."""
    classes = (AudioArguments, ImageArguments, TextArguments)
    names = sorted({name for one in classes for name in flag_names(one)} | {"config"})
    values: dict[str, Sequence[str]] = {"method": [*METHODS, *SHORT_NAMES]}
    for item in (item for one in classes for item in dataclasses.fields(one)):
        if "choices" in item.metadata:
            values[item.name] = item.metadata["choices"]
    return names, values
