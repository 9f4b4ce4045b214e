"""Weights of another library in an architecture that hftl knows: `--model random:ARCH --weights FILE`.

Files of torchvision, of timm, of self-supervised trainings (MoCo's `module.encoder_q.`, DINO's `teacher` and
`backbone.`), and those whose tensors are in the same order under names of their own, as lukemelas' EfficientNets are.
"""

from __future__ import annotations

import itertools
import pickle
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from hftl import backbones
from hftl.errors import UsageError, did_you_mean, load_reason
from hftl.folder import say

#: the least part of the backbone's tensors that a checkpoint must fill
LEAST_LOADED = 0.95
#: where trainings keep the weights among other things, the likeliest first
_INSIDE = ("state_dict", "model_state_dict", "model_state", "model_ema", "teacher", "model", "net", "student")
_PICKLED = (".pth", ".pt", ".bin", ".tar", ".ckpt", ".th")
#: segments that may stand before the names that two libraries share
_MOST_SEGMENTS = 3
#: a head has two tensors, one more block of a deeper model has more
_LEAST_OF_A_BLOCK = 3

_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")

State = dict[str, torch.Tensor]


def check_file(name: str, allow_pickle: bool) -> None:
    """Refuse a file that cannot be read, before any data is.

    Raises:
        UsageError: it is not there, of another kind, or pickled and that was not allowed.
    """
    path = Path(name)
    if not path.is_file():
        siblings = [str(path.parent / entry.name) for entry in path.parent.glob("*")]
        raise UsageError(f"--weights {name!r}: there is no such file.{did_you_mean(name, siblings)}")
    suffix = path.suffix.lower()
    if suffix in _PICKLED and not allow_pickle:
        raise UsageError(
            f"--weights {name!r} is pickled, and could run code when it is read: if you trust where it comes from, "
            "--allow_pickle reads it, as tensors alone."
        )
    if suffix not in (".safetensors", *_PICKLED):
        raise UsageError(f"--weights {name!r}: files of weights end in .safetensors, {', '.join(_PICKLED)}.")


def fill(model: nn.Module, name: str) -> None:
    """Fill the backbone of a model from a file; the head stays as it is.

    Raises:
        UsageError: the file cannot be read, or as `fill_from`.
    """
    count, total = fill_from(model, _read(name), f"--weights {name!r}")
    say(f"weights: {count} of the {total} tensors of the backbone are those of {Path(name).name}")


def fill_from(model: nn.Module, state: Mapping[str, object], name: str) -> tuple[int, int]:
    """Fill the backbone of a model from tensors by name; how many of how many were found.

    Args:
        model: filled in place; its head stays as it is.
        state: tensors by the names that another library gives them.
        name: what messages call them.

    Raises:
        UsageError: they fill less than `LEAST_LOADED` of the backbone's tensors, or hold more blocks than it has.
    """
    head = backbones.structure(model).trained_head
    target = {
        key: value for key, value in _tensors(model.state_dict()).items() if not backbones.is_below_any(key, head)
    }
    source = _tensors(state)
    found = _by_name(source, target)
    if len(found) < LEAST_LOADED * len(target):
        found = _by_order(source, target) or found
    if len(found) < LEAST_LOADED * len(target):
        first = next(key for key in target if key not in found)
        raise UsageError(
            f"{name} fills {len(found)} of the {len(target)} tensors of the backbone (first missing: {first}): it is "
            "of another architecture."
        )
    block, count = _further_block(source, set(found.values()))
    if count >= _LEAST_OF_A_BLOCK:
        raise UsageError(
            f"{name}: {count} tensors of {block} are left over, and more like them: it is of a larger model."
        )
    model.load_state_dict({key: source[own] for key, own in found.items()}, strict=False)
    return len(found), len(target)


def _read(name: str) -> State:
    """The tensors in a file by name."""
    try:
        if name.lower().endswith(".safetensors"):
            return _tensors(load_file(name))
        content = torch.load(name, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, ValueError, EOFError, SafetensorError, pickle.UnpicklingError) as error:
        reason = load_reason(error)[:200]
        raise UsageError(f"--weights {name!r} cannot be read as tensors: {reason}") from error
    while isinstance(content, Mapping):
        inside = next((key for key in _INSIDE if isinstance(content.get(key), Mapping)), None)
        if inside is None:
            return _tensors(content)
        content = content[inside]
    raise UsageError(f"--weights {name!r} holds {type(content).__name__}, and not tensors by name.")


def _tensors(state: Mapping[str, object]) -> State:
    """Without counters of batches, which nothing is computed with, and what is no tensor."""
    return {
        key: value
        for key, value in state.items()
        if isinstance(value, torch.Tensor) and (value.ndim or value.is_floating_point())
    }


def _by_name(source: State, target: State) -> dict[str, str]:
    """Tensors of the same name and shape, once what stands before the names on both sides is exchanged.

    Returns:
        For each name in the target the one in the source.
    """
    best: dict[str, str] = {}
    for strip in _prefixes(source):
        named = [key for key in source if key.startswith(strip)]
        for add in _prefixes(target):
            pairs = ((f"{add}{key[len(strip) :]}", key) for key in named)
            found = {key: own for key, own in pairs if key in target and target[key].shape == source[own].shape}
            best = found if len(found) > len(best) else best
    return best


def _prefixes(names: Iterable[str]) -> list[str]:
    """What names begin with, up to some segments; nothing first."""
    found = {"": None}
    for name in names:
        for dot in list(re.finditer(r"\.", name))[:_MOST_SEGMENTS]:
            found[name[: dot.end()]] = None
    return list(found)


def _by_order(source: State, target: State) -> dict[str, str]:
    """The names one after the other, where all shapes agree; what is left in the file is its head."""
    pairs = list(zip(target, source, strict=False))
    agree = len(source) >= len(target) and all(source[own].shape == target[key].shape for key, own in pairs)
    return dict(pairs) if agree else {}


def _further_block(names: Iterable[str], used: set[str]) -> tuple[str, int]:
    """The block, named as one in use but for its number, of which most tensors are not in use, and how many."""
    shapes = {_NUMBER.sub("*", name) for name in used}
    columns = zip(*(name.split(".") for name in used), strict=False)
    segments = itertools.takewhile(lambda column: len(set(column)) == 1, columns)
    inside = "".join(f"{first}." for first, *_ in segments)
    names = [name for name in names if name.startswith(inside)]  # copies of the model, or its head, may lie outside
    left = (name for name in names if name not in used and _NUMBER.sub("*", name) in shapes)
    blocks = Counter(name[: number.end()] for name in left if (number := _NUMBER.search(name)))
    return max(blocks.items(), key=lambda item: item[1], default=("", 0))
