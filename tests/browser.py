"""The system's Chromium, for tests of what a person sees."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest


@contextmanager
def chromium() -> Iterator[Any]:
    """A running browser; where there is none the test is left out, but never where CI is set."""
    path = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if path is None:
        # A browser is a program of the system, not a package: scripts/test.sh installs it where it may (as root, with
        # apt). Who may not still runs every other test.
        assert not os.environ.get("CI"), "scripts/test.sh installs Chromium where CI is set"
        pytest.skip("needs Chromium, which is not installed here: scripts/test.sh installs it for root on Debian")
    from playwright.sync_api import sync_playwright

    flags = ["--no-sandbox", "--disable-background-networking", "--disable-quic"]
    with sync_playwright() as driver, driver.chromium.launch(executable_path=path, args=flags) as browser:
        yield browser
