"""The one error a person sees: what is wrong, where, and what to do."""

from __future__ import annotations

import difflib
import pickle
import re
from collections.abc import Iterable


class UsageError(Exception):
    """Bad input or an environment that cannot do what was asked.

    Commands and recipes print the message as one `error:` line, without a traceback, and exit with code 2.
    """


class Diverged(UsageError):
    """A training left the finite numbers."""


class DiskError(UsageError):
    """There is no room for what is to be written."""


def without_worker(error: UsageError) -> UsageError:
    """The error that a data worker raised, out of the report with its traceback that torch makes of it."""
    _, report, message = str(error).rpartition(f"{UsageError.__module__}.{UsageError.__name__}: ")
    return UsageError(message.strip()) if report else error


def did_you_mean(name: str, choices: Iterable[str]) -> str:
    """A sentence that suggests the nearest of `choices`, with a leading space; empty when none is near."""
    near = difflib.get_close_matches(name, list(choices))
    if not near:
        return ""
    swapped = (choice for choice in near if sorted(choice) == sorted(name))  # lroa: difflib finds road as near as lora
    return f" Did you mean {next(swapped, near[0])!r}?"


def nearest_choice(message: str) -> str:
    """The same for what argparse says of a value that is none of a flag's choices; empty for other messages."""
    found = re.search(r"invalid choice: '(.*)' \(choose from (.*)\)", message)
    return did_you_mean(found[1], re.findall(r"[\w.-]+", found[2])) if found else ""


def load_reason(error: BaseException) -> str:
    """What a library said, in one line; not torch's advice on pickles, which is to let them run code."""
    said = " ".join(str(error).split())
    unsafe = isinstance(error, pickle.UnpicklingError) or "weights_only" in said
    return "its pickle holds more than tensors, and could run code" if unsafe else said
