"""Evaluation on the field's benchmarks and on any folder of pictures with masks.

`open_dataset` reads a folder layout, `protocol` holds the published settings, `evaluate` computes
one confusion matrix, and `sweep` repeats it for the paper's ablations.
"""

from __future__ import annotations

from fsa.lazy import submodules

__getattr__ = submodules(__name__)
