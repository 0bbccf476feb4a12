"""The latencies that FSA's authors published: Chi et al., ICCV 2025, and its supplement.

Whole forward of one picture, on their own GPU, in ms: (without, with FSA).
"""

from __future__ import annotations

LATENCY_MS: dict[tuple[str, str], tuple[float, float]] = {
    ("proxyclip", "ViT-B/16"): (12.9, 13.6),
    ("proxyclip", "ViT-L/14"): (20.1, 21.1),
    ("proxyclip", "ViT-H/14"): (28.1, 29.2),
    ("clearclip", "ViT-B/16"): (4.9, 5.4),
    ("clearclip", "ViT-L/14"): (13.1, 13.9),
    ("clearclip", "ViT-H/14"): (21.1, 22.2),
    ("maskclip", "ViT-B/16"): (5.1, 5.7),
    ("maskclip", "ViT-L/14"): (13.4, 14.1),
    ("maskclip", "ViT-H/14"): (21.9, 22.9),
    ("sclip", "ViT-B/16"): (5.2, 5.7),
    ("sclip", "ViT-L/14"): (13.4, 14.2),
    ("sclip", "ViT-H/14"): (22.0, 23.0),
}


def overhead(host: str, backbone: str) -> float | None:
    """What FSA adds by the paper, in percent of the host, or None where it says nothing."""
    pair = LATENCY_MS.get((host, backbone))
    return None if pair is None else 100 * (pair[1] / pair[0] - 1)
