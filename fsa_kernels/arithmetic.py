"""Exponentials and reciprocals at the rate of the hardware's approximations.

What `tl.exp2` and `/` compile to also handles subnormal numbers, with a comparison and two
multiplications around each instruction; the arguments here have none that matter. Triton's
interpreter runs no inline assembly and takes NumPy's functions in its place.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fsa_kernels import runtime

LOG2E: tl.constexpr = tl.constexpr(1.4426950408889634)

if runtime.interpreting():

    @triton.jit
    def fast_exp2(x):
        """2^x."""
        return tl.exp2(x)

    @triton.jit
    def fast_reciprocal(x):
        """1 / x for finite x >= 1."""
        return 1.0 / x

else:

    @triton.jit
    def fast_exp2(x):
        """2^x, off by at most 2^-22 of it; 0 where it would be subnormal."""
        return tl.inline_asm_elementwise(
            "ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )

    @triton.jit
    def fast_reciprocal(x):
        """1 / x for finite x >= 1, off by at most 1 unit in the last place; 1 for 1."""
        y = tl.inline_asm_elementwise(
            "rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )
        # One step of Newton's method, two fused operations.
        return y - y * (x * y - 1.0)
