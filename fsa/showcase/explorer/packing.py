"""Arrays and label maps as short texts that the page's script unpacks."""

from __future__ import annotations

import base64
from typing import Any

import numpy as np


def encoded(values: np.ndarray) -> str:
    """The values' bytes, little-endian, in base64."""
    little = values.astype(values.dtype.newbyteorder("<"), copy=False)
    return base64.b64encode(np.ascontiguousarray(little).tobytes()).decode("ascii")


def packed_cosines(cosines: np.ndarray, exact: bool) -> dict[str, Any]:
    """Cosines (rows,C): float32 where `exact`, else in 65536 equal steps from least to largest."""
    if exact:
        values = encoded(cosines.astype(np.float32))
        return {"type": "float32", "rows": len(cosines), "values": values}
    low, high = float(cosines.min()), float(cosines.max())
    step = (high - low) / 65535 or 1.0
    levels = np.rint((cosines.astype(np.float64) - low) / step).astype(np.uint16)
    return {
        "type": "uint16",
        "rows": len(cosines),
        "low": low,
        "step": step,
        "values": encoded(levels),
    }


def packed_rows(matrix: np.ndarray, exact: bool) -> dict[str, Any]:
    """A matrix (N,M) whose rows have few large entries: 16 bits an entry where `exact`, else 8.

    An entry is the row's largest magnitude times the square of its level, with its sign. The square
    spends the levels where most of the entries lie: near 0.
    """
    kind = np.int16 if exact else np.int8
    highest = np.iinfo(kind).max
    largest = np.abs(matrix).max(axis=1, keepdims=True)
    share = matrix / np.where(largest > 0, largest, 1)
    levels = np.rint(np.sign(share) * np.sqrt(np.abs(share)) * highest).astype(kind)
    return {
        "type": np.dtype(kind).name,
        "largest": encoded(largest.astype(np.float32)),
        "levels": encoded(levels),
    }


def run_lengths(labels: np.ndarray) -> str:
    """Labels (H,W) >= 0, row by row, as pairs of a label and how often it follows itself.

    Both numbers are written 7 bits a byte, the lowest first; a set eighth bit says that more
    follow. In base64.
    """
    flat = labels.ravel()
    starts = np.flatnonzero(np.r_[True, flat[1:] != flat[:-1]])
    lengths = np.diff(np.r_[starts, flat.size])
    out = bytearray()
    for pair in zip(flat[starts].tolist(), lengths.tolist(), strict=True):
        for number in pair:
            while number > 127:
                out.append(number & 127 | 128)
                number >>= 7
            out.append(number)
    return base64.b64encode(bytes(out)).decode("ascii")
