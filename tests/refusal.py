"""What a person sees of a command that cannot be done."""

from __future__ import annotations

import pytest

from hftl import cli


def refused(words: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The one line with which it ends, with exit code 2."""
    with pytest.raises(SystemExit) as ended:
        cli.main(words)
    error = capsys.readouterr().err
    assert (ended.value.code, error.count("\n")) == (2, 1), error
    return error
