"""Whether the Hub answers, asked once and quickly."""

from __future__ import annotations

import functools

_SECONDS = 5.0


@functools.cache
def check_hub() -> None:
    """Work from the cache alone when the Hub does not answer.

    Its client would try six times over half a minute for each file, with a line about each.
    """
    import datasets
    from huggingface_hub import constants
    from huggingface_hub.errors import HTTPError, OfflineModeIsEnabled
    from huggingface_hub.utils import get_session

    try:
        get_session().head(constants.ENDPOINT, timeout=_SECONDS)
    except (HTTPError, OfflineModeIsEnabled):
        constants.HF_HUB_OFFLINE = True
        datasets.config.HF_HUB_OFFLINE = True
