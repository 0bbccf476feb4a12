"""What is counted so far, kept so that a killed run goes on where it was."""

from __future__ import annotations

import io
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from fsa.errors import InputError
from fsa.evaluation.protocol import differences
from fsa.files import write_whole


@dataclass
class State:
    """What one process has counted.

    Attributes:
        counts: (C,C) int64, of whole chunks only.
        chunks: their numbers.
        pictures: how many pictures were counted.
        skipped: name of each picture that could not be -> why.
        seconds: time spent.
    """

    counts: np.ndarray
    chunks: set[int] = field(default_factory=set)
    pictures: int = 0
    skipped: dict[str, str] = field(default_factory=dict)
    seconds: float = 0.0

    @classmethod
    def empty(cls, classes: int) -> State:
        return cls(np.zeros((classes, classes), dtype=np.int64))

    def merge(self, other: State) -> None:
        """Adds what another process has counted; no chunk may be in both."""
        twice = self.chunks & other.chunks
        if twice:
            raise InputError(f"chunk {min(twice)} was counted by two processes: use --restart")
        self.counts = self.counts + other.counts
        self.chunks |= other.chunks
        self.pictures += other.pictures
        self.skipped |= other.skipped
        # They ran side by side.
        self.seconds = max(self.seconds, other.seconds)


def state_file(folder: Path, rank: int) -> Path:
    return folder / f"state-{rank}.npz"


def state_files(folder: Path) -> list[Path]:
    """The files of every process of this and of earlier runs."""
    return sorted(folder.glob("state-*.npz"))


def save(file: Path, state: State, protocol: dict[str, Any]) -> None:
    """Writes the file whole, or leaves the one that is there."""
    record = {
        "protocol": protocol,
        "chunks": sorted(state.chunks),
        "pictures": state.pictures,
        "skipped": state.skipped,
        "seconds": state.seconds,
    }
    buffer = io.BytesIO()
    np.savez_compressed(buffer, counts=state.counts, record=np.array(json.dumps(record)))
    write_whole(file, lambda out: out.write(buffer.getvalue()))


def load(file: Path, protocol: dict[str, Any]) -> State:
    """What a file holds.

    Raises:
        InputError: a file that is not a state, or of another protocol; the message says in what
            they differ.
    """
    try:
        with np.load(file, allow_pickle=False) as stored:
            counts, record = stored["counts"], json.loads(str(stored["record"]))
        state = State(
            counts.astype(np.int64),
            set(record["chunks"]),
            record["pictures"],
            record["skipped"],
            record["seconds"],
        )
        before = record["protocol"]
    except (OSError, ValueError, KeyError, EOFError, TypeError) as error:
        raise InputError(
            f"{file}: not the state of an evaluation ({error}); use --restart"
        ) from None
    changed = differences(before, protocol)
    if changed:
        raise InputError(
            f"{file.parent} holds an evaluation under another protocol:\n  "
            + "\n  ".join(changed)
            + "\nPass another --out, the settings of before, or --restart to throw it away."
        )
    return state
