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
        contents: number of each chunk -> hashes of its pictures and of its masks as they were.
        pictures: how many pictures were counted.
        skipped: name of each picture that could not be -> why.
        seconds: time spent.
    """

    counts: np.ndarray
    contents: dict[int, tuple[str, str]] = field(default_factory=dict)
    pictures: int = 0
    skipped: dict[str, str] = field(default_factory=dict)
    seconds: float = 0.0

    @classmethod
    def empty(cls, classes: int) -> State:
        return cls(np.zeros((classes, classes), dtype=np.int64))

    @property
    def chunks(self) -> set[int]:
        """The numbers of the chunks that are counted."""
        return set(self.contents)

    def merge(self, other: State) -> None:
        """Adds what another process has counted; no chunk may be in both."""
        twice = self.chunks & other.chunks
        if twice:
            raise InputError(f"chunk {min(twice)} was counted by two processes: use --restart")
        self.counts = self.counts + other.counts
        self.contents |= other.contents
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
        "chunks": sorted(state.contents),
        "contents": [state.contents[number] for number in sorted(state.contents)],
        "pictures": state.pictures,
        "skipped": state.skipped,
        "seconds": state.seconds,
    }
    buffer = io.BytesIO()
    np.savez_compressed(buffer, counts=state.counts, record=np.array(json.dumps(record)))
    write_whole(file, lambda out: out.write(buffer.getvalue()))


def load(file: Path, protocol: dict[str, Any]) -> State:
    """What a file holds.

    A file in which nothing is counted is as good as none, whatever its protocol.

    Raises:
        InputError: a file that is not a state, or of another protocol; the message says in what
            they differ.
    """
    try:
        with np.load(file, allow_pickle=False) as stored:
            counts, record = stored["counts"].astype(np.int64), json.loads(str(stored["record"]))
        contents = zip(record["chunks"], map(tuple, record["contents"]), strict=True)
        state = State(
            counts, dict(contents), record["pictures"], record["skipped"], record["seconds"]
        )
        before = record["protocol"]
        if not isinstance(before, dict) or counts.shape != (len(before["classes"]),) * 2:
            raise ValueError("its parts do not belong together")
    # A file that was cut off or altered makes numpy and zlib raise almost anything.
    except Exception as error:
        raise InputError(
            f"{file}: not the state of an evaluation ({_first_line(error)}); use --restart"
        ) from None
    if not state.contents:
        return State.empty(len(protocol["classes"]))
    changed = differences(before, protocol)
    if changed:
        raise InputError(
            f"{file.parent} holds an evaluation under another protocol:\n  "
            + "\n  ".join(changed)
            + "\nPass another --out, the settings of before, or --restart to throw it away."
        )
    return state


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]
