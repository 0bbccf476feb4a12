"""From the second call on, a kernel is launched without Triton's binder: to the same arguments."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from bench import ROOT
from bench.measure import driver

# Not in this process: a process has one driver, for good.
SAME_LAUNCHES = """
import torch
import triton
from bench.measure import calls, driver
from fsa_kernels import runtime
from triton.backends.nvidia.driver import CudaLauncher

on = driver.install(90)
assert runtime._launches_directly()
real_launch, real_run = CudaLauncher.__call__, triton.JITFunction.run
given, bound = [], []

def launch(self, *arguments):
    # Three dimensions, stream, function, two of metadata, two hooks; then what the kernel takes.
    given.append((*arguments[:6], *map(plain, arguments[9:])))
    return real_launch(self, *arguments)

def plain(value):
    if isinstance(value, torch.Tensor):
        return value.dtype, value.shape, value.stride()
    return type(value), value

def run(self, *arguments, **options):
    bound.append(self)
    return real_run(self, *arguments, **options)

CudaLauncher.__call__ = launch
triton.JITFunction.run = run
kernels = set()
with torch.inference_mode():
    for call in calls.quick():
        call.run()
        given.clear(), bound.clear()
        runtime._compiled.clear()
        call.run()
        first, by_binder = list(given), list(bound)
        given.clear(), bound.clear()
        call.run()
        assert by_binder and not bound, call.name
        assert given == first, call.name
        kernels |= set(by_binder)
assert kernels == set(driver.kernels().values())

# A profiler's hook is called, by way of the binder.
seen = []
triton.knobs.runtime.launch_enter_hook.add(lambda metadata: seen.append(metadata))
given.clear()
call.run()
assert len(seen) == len(given) > 0
"""


@pytest.mark.skipif(driver.obstacle() is not None, reason=f"no driver: {driver.obstacle()}")
def test_a_launch_without_the_binder_passes_what_the_binder_passes():
    result = subprocess.run(
        [sys.executable, "-c", SAME_LAUNCHES],
        env={k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"},
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout + result.stderr[-2000:]
