"""Text features of class names on the disk, so that the next process need not encode them."""

from __future__ import annotations

import hashlib
import os
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import platformdirs

from fsa.errors import InputError
from fsa.files import write_whole

CACHE_VARIABLE = "FSA_CACHE_DIR"
"""The environment variable that names another cache folder."""

_LIMIT_BYTES = 256 << 20
_SUFFIX = ".features"
_DIGEST_BYTES = hashlib.sha256().digest_size


def cache_folder() -> Path | None:
    """Where `FSA_CACHE_DIR` says, else the user's cache folder by the rules of the platform.

    The folder may not exist yet. None where there is no home directory.
    """
    given = os.environ.get(CACHE_VARIABLE)
    folder = os.path.expanduser(given or platformdirs.user_cache_dir("fsa", appauthor=False))
    # Where there is no home directory, expanduser leaves the tilde in place.
    return None if folder.startswith("~") else Path(folder)


def user_text_cache() -> TextCache | None:
    """The cache of text features in the user's cache folder, or None where there is no such."""
    folder = cache_folder()
    return None if folder is None else TextCache(folder / "text")


@dataclass(frozen=True)
class TextCache:
    """One file for each class name and model, which several processes may read and write at once.

    A file is written whole or not at all and begins with the checksum of its content; a damaged
    one counts as missing. Nothing raises: where the folder cannot be read or written, nothing is
    remembered.

    Attributes:
        folder: made at the first write.
        limit: bytes that the files may have in all; the oldest are removed first.
    """

    folder: Path
    limit: int = _LIMIT_BYTES

    def read(self, key: str) -> np.ndarray | None:
        """The feature (E,) float32 that was written under a key, or None."""
        try:
            content = self._file(key).read_bytes()
        except OSError:
            return None
        checksum, stored = content[:_DIGEST_BYTES], content[_DIGEST_BYTES:]
        if not stored or checksum != _checksum(key, stored):
            return None
        return np.frombuffer(stored, "<f4").astype(np.float32)

    def write(self, key: str, feature: np.ndarray) -> None:
        """Keeps a feature (E,) float32 under a key, which must be safe as a file's name."""
        stored = feature.astype("<f4").tobytes()
        with suppress(OSError, InputError):
            self.folder.mkdir(parents=True, exist_ok=True)
            write_whole(self._file(key), lambda out: out.write(_checksum(key, stored) + stored))

    def trim(self) -> None:
        """Removes the oldest files until the rest is within the limit."""
        files = []
        with suppress(OSError), os.scandir(self.folder) as entries:
            for entry in entries:
                # Another process may have removed it in the meantime.
                with suppress(OSError):
                    status = entry.stat(follow_symlinks=False)
                    files.append((status.st_mtime_ns, status.st_size, entry.path))
        excess = sum(size for _, size, _ in files) - self.limit
        for _, size, path in sorted(files):
            if excess <= 0:
                break
            with suppress(OSError):
                os.unlink(path)
                excess -= size

    def _file(self, key: str) -> Path:
        return self.folder / f"{key}{_SUFFIX}"


def _checksum(key: str, stored: bytes) -> bytes:
    """Of the key as well: a file under another's name is damaged."""
    return hashlib.sha256(key.encode() + stored).digest()
