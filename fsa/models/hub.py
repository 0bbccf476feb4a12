"""Whether a hub of weights can be reached, and the words for when it cannot."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from huggingface_hub import constants as hub
from huggingface_hub.utils import get_session

from fsa.errors import ModelUnavailableError

# Of the first answer, from a hub that is slow but there. Downloads themselves may take any time.
_HUB_ANSWERS_WITHIN_S = 10.0

_hub_mode = threading.Lock()


def unavailable(what: str, source: str, how: str) -> ModelUnavailableError:
    """The one wording for weights that cannot be fetched."""
    return ModelUnavailableError(
        f"the weights of {what} are not on this machine and {source} cannot be reached. Fetch them "
        f"where there is access, and {how}"
    )


@contextmanager
def hub_if_reachable() -> Iterator[None]:
    """Around whatever may download: asks once whether the hub answers, else uses the cache alone.

    The hub's client tries every file again and again, close to a minute, before it gives up.
    """
    if hub.HF_HUB_OFFLINE or _hub_answers():
        yield
        return
    with _hub_mode:
        hub.HF_HUB_OFFLINE = True
        try:
            yield
        finally:
            hub.HF_HUB_OFFLINE = False


def _hub_answers() -> bool:
    """Whether the hub, or the mirror in its place, answers at all, be it with an error."""
    # The client knows of proxies and certificates.
    try:
        get_session().head(hub.ENDPOINT, timeout=_HUB_ANSWERS_WITHIN_S)
    # Its HTTP library has many kinds of errors, and changed from one version to the next.
    except Exception:
        return False
    return True
