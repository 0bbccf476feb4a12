"""Peak extra memory of a contender: by the allocator's count on a GPU, by the operating system's
count of a process of its own on the CPU.

python -m bench memory    the PyTorch path's peak at the promised size
"""

from __future__ import annotations

import os
import pickle
import resource
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from bench import ROOT
from bench.rows.contenders import Call, DoesNotFit, Row, release, synchronise
from bench.rows.op import OpRow

# Every larger block is mapped by itself and given back at once, so that what the warm-up left
# behind does not hide what the call takes.
_MALLOC = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}


def peak_extra_bytes_cuda(call: Call, device: torch.device) -> int:
    """Bytes that a warmed call takes at most, its result included."""
    release(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    result = call()
    synchronise(device)
    peak = torch.cuda.max_memory_allocated(device)
    del result
    return peak - before


def peak_extra_bytes_cpu(row: Row, contender: str, dtype: torch.dtype = torch.float32) -> int:
    """The same on the CPU, in a process of its own with warmed libraries.

    Raises:
        DoesNotFit: the contender says so.
        RuntimeError: the process failed.
    """
    task = pickle.dumps((row, contender, dtype)).hex()
    command = [sys.executable, "-m", "bench.measure.memory", task]
    result = subprocess.run(
        command, capture_output=True, text=True, cwd=ROOT, env={**os.environ, **_MALLOC}
    )
    if result.returncode != 0:
        last = (result.stderr.strip().splitlines() or [f"exit status {result.returncode}"])[-1]
        raise (DoesNotFit if "DoesNotFit" in last else RuntimeError)(
            last.partition(": ")[2] or last
        )
    return int(result.stdout.split()[-1])


@torch.no_grad()
def _probe(row: Row, contender: str, dtype: torch.dtype) -> int:
    """Runs in the process of its own."""
    device = torch.device("cpu")
    # Libraries load their buffers.
    row.small().contenders(device, dtype)[contender]()()
    call = row.contenders(device, dtype)[contender]()
    release(device)
    before = _resident()
    peak, running = [before], [True]

    def watch() -> None:
        while running[0]:
            peak[0] = max(peak[0], _resident())
            time.sleep(0.001)

    thread = threading.Thread(target=watch)
    thread.start()
    result = call()
    running[0] = False
    thread.join()
    taken = max(peak[0], _resident()) - before
    del result
    return taken


def _resident() -> int:
    """Bytes of this process in main memory."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    except OSError:
        # Where there is no /proc: the highest so far, in KiB, or bytes on macOS.
        highest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return highest * (1 if sys.platform == "darwin" else 1024)


def main(arguments: Sequence[str] = ()) -> int:
    """Prints the peak at the promised size; 0 if it stays below the promise."""
    N, C = 4096, 171
    promised = 4 * N * N * 4
    taken = peak_extra_bytes_cpu(OpRow("op", 1, N, C), "fsa torch")
    print(
        f"feedback_attention(backend='torch'), N={N}, C={C}, float32: peak extra "
        f"{taken / 2**20:.0f} MiB, result included; promised below {promised / 2**20:.0f} MiB "
        "(4 N^2 float32)"
    )
    return 0 if taken < promised else 1


if __name__ == "__main__":
    # Unpickles only what `peak_extra_bytes_cpu` wrote.
    print(_probe(*pickle.loads(bytes.fromhex(sys.argv[1]))))
