"""What hosts are called in figures."""

from __future__ import annotations

from fsa.hosts import host_class
from fsa.hosts import names as host_names

_OF_ATTENTION = {"clip": "CLIP", "qk": "qk, CLIP's own"}


def title(host: str) -> str:
    """A host's name as its paper writes it, such as "MaskCLIP" for "maskclip"."""
    if host in _OF_ATTENTION:
        return _OF_ATTENTION[host]
    name = host_class(host).__name__ if host in host_names() else host
    return name if name.lower() == host else host
