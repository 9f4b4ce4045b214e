"""A person's own functions, from their files and modules."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import inspect
import sys
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hftl.errors import UsageError, did_you_mean


def import_function(name: str, flag: str) -> Callable[..., Any]:
    """The function named by `package.module:function` or `path/file.py:function`.

    Raises:
        UsageError: no such file, module or function.
    """
    where, _, attribute = name.rpartition(":")
    module = load_file(Path(where), flag) if where.endswith(".py") else _load_module(where, flag)
    function = getattr(module, attribute, None)
    if not callable(function):
        own = [key for key, value in vars(module).items() if inspect.isroutine(value)]
        raise UsageError(f"{flag} {name}: {where} has no function {attribute!r}.{did_you_mean(attribute, own)}")
    return function


def import_scalar_function(name: str, flag: str) -> Callable[..., Any]:
    """The same, of a loss or penalty: what it gives is checked.

    Raises:
        UsageError: as above; and when it is called and gives something else than a scalar tensor.
    """
    function = import_function(name, flag)

    import torch

    @functools.wraps(function)
    def checked(*arguments: Any, **settings: Any) -> Any:
        value = function(*arguments, **settings)
        if not isinstance(value, torch.Tensor) or value.ndim:
            given = f"a tensor of shape {tuple(value.shape)}" if hasattr(value, "shape") else type(value).__name__
            raise UsageError(f"{flag} {name}: the function must return a scalar tensor, a mean over rows, not {given}.")
        return value

    return checked


def load_file(path: Path, what: str) -> Any:
    """The module in a Python file.

    Raises:
        UsageError: there is no such file, or it is not Python.
    """
    if path.is_dir():
        raise UsageError(f"{what}: {str(path)!r} is a folder, not a file of Python code.")
    if not path.is_file():
        siblings = [str(sibling) for sibling in path.parent.glob("*.py")] if path.parent.is_dir() else []
        raise UsageError(f"{what}: there is no file {str(path)!r}.{did_you_mean(str(path), siblings)}")
    path = path.resolve()
    name = path.stem
    loaded = sys.modules.get(name)
    if loaded is not None and getattr(loaded, "__file__", None) == str(path):
        return loaded  # a recipe whose method stands in the same file: one module, or its classes would exist twice
    if loaded is not None:  # my datasets.py must not take the place of the package
        name = f"{name}_{zlib.crc32(str(path).encode())}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look up the types of their fields there
    try:
        spec.loader.exec_module(module)
    except BaseException as error:
        del sys.modules[name]
        if isinstance(error, SyntaxError):
            raise UsageError(f"{what}: {error.filename}, line {error.lineno}: {error.msg}.") from error
        if isinstance(error, ImportError):
            raise UsageError(f"{what}: {path} cannot be imported: {error}.") from error
        raise
    return module


def _load_module(name: str, flag: str) -> Any:
    if not name or name.startswith("."):
        raise UsageError(f"{flag}: name the function as package.module:function or file.py:function.")
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name and not name.startswith(error.name):
            raise
        raise UsageError(f"{flag}: there is no module {name!r} on the Python path.") from error
