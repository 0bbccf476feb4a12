"""Every launcher binds, specialises, compiles and launches, over a driver that does nothing."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from bench import ROOT
from bench.measure import driver, resources
from bench.measure.driver import CHIPS

needs_driver = pytest.mark.skipif(
    driver.obstacle() is not None, reason=f"no driver that does nothing: {driver.obstacle()}"
)


def in_its_own_process(*command: str) -> subprocess.CompletedProcess[str]:
    """A process has one driver, for good; and under the interpreter there is nothing to compile."""
    return subprocess.run(
        [sys.executable, *command],
        env={k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"},
        cwd=ROOT,
        capture_output=True,
        text=True,
    )


@needs_driver
@pytest.mark.parametrize(
    "chip",
    [90, *(pytest.param(chip, marks=pytest.mark.slow) for chip in CHIPS if chip != 90)],
)
def test_every_kernel_is_launched_by_a_real_call_and_fits_the_chip(chip):
    result = in_its_own_process("-m", "bench", "driver", "--chip", str(chip))
    assert result.returncode == 0, result.stdout + result.stderr[-2000:]


@needs_driver
@pytest.mark.slow
def test_every_type_layout_and_edge_is_launched():
    result = in_its_own_process("-m", "bench", "driver", "--exhaustive")
    assert result.returncode == 0, result.stdout + result.stderr[-2000:]


# What a real driver refuses, and what only seems to be a launch.
REFUSED = """
import torch, triton, triton.language as tl
from bench.measure import calls, driver, resources

@triton.jit
def _kernel(x_ptr, n, BLOCK: tl.constexpr):
    i = tl.program_id(1) + tl.arange(0, BLOCK)
    tl.store(x_ptr + i, i, mask=i < n)

on = driver.install(90)
x = torch.empty(16, dtype=torch.int32)
def launch(grid, **options):
    return lambda: _kernel[grid](x, 16, BLOCK=16, **options)
failed = driver.failures([
    calls.KernelCall("fine", launch((1, 65535))),
    calls.KernelCall("too many programs", launch((1, 65536))),
    calls.KernelCall("no program", launch((0, 1))),
    calls.KernelCall("no launch", lambda: None),
    calls.KernelCall("not a tensor", lambda: _kernel[(1,)]("x", 16, BLOCK=16)),
], on)
assert list(failed) == ["too many programs", "no program", "no launch", "not a tensor"], failed
launched, = on.of_call(launch((2, 3), num_warps=2))
assert (launched.kernel, launched.grid, launched.warps) == ("_kernel", (2, 3, 1), 2), launched
code = resources.read(launched.cubin)
assert code.spilled == 0 and 0 < code.straight == code.instructions and code.loops == (), code
"""


@needs_driver
def test_what_a_driver_refuses_is_refused_and_launches_are_kept(tmp_path):
    # Triton reads a kernel's source from its file.
    script = tmp_path / "refused.py"
    script.write_text(REFUSED)
    result = subprocess.run(
        [sys.executable, str(script)],
        env={k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
        | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout + result.stderr[-2000:]


def test_without_a_compiler_it_is_said_in_words(monkeypatch):
    monkeypatch.setattr(driver.shutil, "which", lambda name: None)
    with pytest.raises(driver.Unavailable, match="no C compiler"):
        driver.install(90)


@pytest.mark.parametrize(
    ("registers", "warps", "shared", "blocks"),
    [
        # By registers: 231 are 232, so 8 warps fit; 146 are 152, so 13 fit, given out by 4: 12.
        (231, 4, 4096, 2),
        (146, 8, 98304, 1),
        (64, 4, 0, 8),
        # By shared memory, by warps, by programs; and beyond what a program may have.
        (32, 4, 100 << 10, 2),
        (16, 32, 0, 2),
        (16, 1, 0, 32),
        (32, 4, 228 << 10, 0),
    ],
)
def test_how_many_programs_a_multiprocessor_holds(registers, warps, shared, blocks):
    assert resources.resident(registers, warps, shared, CHIPS[90]) == blocks


def test_instructions_are_counted_in_and_out_of_loops():
    lines = [
        "/*0000*/ LDG.E R1, [R2] ; /* 0x0 */",
        "/*0010*/ HMMA.16816.F32 R4, R8, R12, R4 ; /* 0x0 */",
        "/*0020*/ LDS R8, [R2] ; /* 0x0 */",
        "/*0030*/ @P0 BRA 0x10 ; /* 0x0 */",
        "/*0040*/ FADD R1, R2, R3 ; /* 0x0 */",
        "/*0050*/ @!P1 BRA 0x40 ; /* 0x0 */",
        "/*0060*/ @P2 BRA 0x0 ; /* 0x0 */",
        "/*0070*/ EXIT ; /* 0x0 */",
        "/*0080*/ BRA 0x80; /* 0x0 */",
        "/*0090*/ NOP ; /* 0x0 */",
    ]
    code = "\n".join(f"        {line}" for line in lines)
    # One loop around two others: only the end is outside of all.
    assert resources.instructions(code) == (8, 1, (3, 2))
    assert resources.instructions("\n".join(code.splitlines()[4:5])) == (1, 1, ())
