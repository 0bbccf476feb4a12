"""What tests need that call a compiler."""

from __future__ import annotations

import os
import shutil

import pytest

# What `torch.compile` calls by default: C++ is written and compiled, which takes a while.
needs_cpp = pytest.mark.skipif(
    shutil.which(os.environ.get("CXX", "g++")) is None,
    reason="Inductor compiles C++, and there is no g++ here",
)
