"""Tests keep what they make out of the person's own cache; the built-in weights and data there are only read."""

from __future__ import annotations

import gc
import os
import shutil
from collections import Counter
from collections.abc import Iterator
from unittest import mock

import pytest

from hftl.builtin import cache_folder

#: what trainings write there
WRITTEN = {"features", "images", "tokens", "precision.json"}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Long files first, so that the processes that share the files out end at about the same time."""
    slow = Counter(item.path for item in items if item.get_closest_marker("slow"))
    every = Counter(item.path for item in items)
    items.sort(key=lambda item: (-slow[item.path], -every[item.path]))


@pytest.fixture(autouse=True)
def _collector() -> None:
    """Take what the libraries and earlier tests left out of the collections that every training begins with.

    Each would walk over it for half a second.
    """
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _own_environment() -> Iterator[None]:
    """Take back what `TrainingArguments` say to Accelerate: a test of `--fsdp` is none of the next one's."""
    with mock.patch.dict(os.environ):
        yield


@pytest.fixture
def two_threads() -> Iterator[None]:
    """Where tests compute with one."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    own, before = tmp_path_factory.mktemp("cache"), os.environ.get("HFTL_HOME")
    for entry in sorted(cache_folder().glob("*")) if cache_folder().is_dir() else ():
        if entry.name not in WRITTEN:
            (own / entry.name).symlink_to(entry.resolve())
    os.environ["HFTL_HOME"] = str(own)
    yield
    if before is None:
        del os.environ["HFTL_HOME"]
    else:
        os.environ["HFTL_HOME"] = before
    shutil.rmtree(own, ignore_errors=True)
