"""Peak extra memory of the PyTorch path, in a process of its own."""

from __future__ import annotations

import subprocess
import sys

_PROBE = """
import sys, threading, time
import torch
import fsa
from fsa.config import FSAConfig

N, C = int(sys.argv[1]), int(sys.argv[2])
page = 4096

def resident():
    return int(open("/proc/self/statm").read().split()[1]) * page

logits = torch.randn(1, N, C)
fsa.feedback_attention(logits[:, :64], backend="torch")  # libraries load their buffers
before = resident()
peak, running = [before], [True]

def watch():
    while running[0]:
        peak[0] = max(peak[0], resident())
        time.sleep(0.001)

thread = threading.Thread(target=watch)
thread.start()
result = fsa.feedback_attention(logits, backend="torch")
running[0] = False
thread.join()
print(max(peak[0], resident()) - before)
"""


def peak_extra_bytes(N: int, C: int) -> int:
    """Bytes that `feedback_attention(backend="torch")` takes at most, its result included."""
    result = subprocess.run(
        [sys.executable, "-c", _PROBE, str(N), str(C)], capture_output=True, text=True, check=True
    )
    return int(result.stdout)


def main() -> int:
    """Prints the peak at the promised size; 0 if it stays below the promise."""
    N, C = 4096, 171
    promised = 4 * N * N * 4
    taken = peak_extra_bytes(N, C)
    print(
        f"feedback_attention(backend='torch'), N={N}, C={C}, float32: peak extra "
        f"{taken / 2**20:.0f} MiB, result included; promised below {promised / 2**20:.0f} MiB "
        "(4 N^2 float32)"
    )
    return 0 if taken < promised else 1
