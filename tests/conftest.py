"""Triton's kernels run on the GPU where there is one, and in Triton's interpreter elsewhere."""

from __future__ import annotations

import os

import torch

if not torch.cuda.is_available():
    # Read when the kernels are first imported, so it must be set before any test is.
    os.environ.setdefault("TRITON_INTERPRET", "1")
