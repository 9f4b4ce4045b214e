"""What is known of the Hub beforehand: whether it answers, asked once and quickly, and which names it takes."""

from __future__ import annotations

import functools

from hftl.errors import UsageError

_SECONDS = 5.0
#: whether the person wants no connection; None until the Hub was asked
_wanted_offline: bool | None = None


@functools.cache
def check_hub() -> None:
    """Work from the cache alone when the Hub does not answer.

    Its client would try six times over half a minute for each file, with a line about each.
    """
    global _wanted_offline
    import datasets
    from huggingface_hub import constants
    from huggingface_hub.errors import HTTPError, OfflineModeIsEnabled
    from huggingface_hub.utils import get_session

    _wanted_offline = constants.HF_HUB_OFFLINE
    try:
        get_session().head(constants.ENDPOINT, timeout=_SECONDS)
    except (HTTPError, OfflineModeIsEnabled):
        constants.HF_HUB_OFFLINE = True
        datasets.config.HF_HUB_OFFLINE = True


def ask_again() -> None:
    """Forget that the Hub did not answer: hours may lie between reading a model and pushing another."""
    import datasets
    from huggingface_hub import constants

    if _wanted_offline is not None:
        constants.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = _wanted_offline
        check_hub.cache_clear()


def check_name(repository: str) -> None:
    """Refuse a name that no repository can have.

    Raises:
        UsageError: as said.
    """
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repository)
    except HFValidationError as error:
        shown = "hf_…" if repository.startswith("hf_") else repository  # a token, perhaps, in the wrong place
        raise UsageError(
            f"Pushing to {shown!r}: that is no name of a repository. It is NAME or USER/NAME, of letters, digits, "
            "'-', '_' and '.', with no '-' or '.' at its beginning or end, and 96 long at most."
        ) from error
