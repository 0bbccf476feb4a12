"""What an H200 does at most: the assumptions behind marks and predictions."""

from __future__ import annotations

# Measured elsewhere, of large copies and products: bytes a second copied, operations a second of
# half-precision products and of float32.
BYTES_A_SECOND, HALF_FLOPS, FLOPS = 4.3e12, 790e12, 67e12

# What a launch costs where nothing hides it: a few microseconds.
LAUNCH_SECONDS = 3e-6


def floor_seconds(bytes: float, products: float, operations: float = 0) -> float:
    """The larger of the time for bytes and the time for arithmetic.

    Args:
        bytes: read and written.
        products: operations of matrix products in half precision.
        operations: others, in float32.
    """
    return max(bytes / BYTES_A_SECOND, products / HALF_FLOPS + operations / FLOPS)
