"""What each kernel takes of a chip: compiled ahead of time, no GPU needed.

    python -m bench resources

prints registers, spills and shared memory of every launch of the table for sm_80, sm_90 and
sm_100, with the machine instructions of its hot loop, and exits with 1 where something spills or
does not fit. The hot loop is the innermost loop with the most tensor-core instructions, or the most
instructions where there are none; of a kernel without loops, the whole kernel.
"""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fsa_kernels import launch

# Counted in the hot loop: tensor cores; loads and stores of shared and of global memory;
# asynchronous copies; barriers; exchanges within a warp; exponentials and reciprocals.
_COUNTED = {
    "MMA": r"HGMMA|HMMA|QGMMA|UTC\w*MMA",
    "LDS": r"LDS|LDSM",
    "STS": r"STS|STSM",
    "LDG": r"LDG",
    "STG": r"STG",
    "LDGSTS": r"LDGSTS|UBLKCP|UTMALDG",
    "BAR": r"BAR|SYNCS",
    "SHFL": r"SHFL|REDUX",
    "MUFU": r"MUFU",
}

# Shared memory that one program may take, in bytes.
CHIPS = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}

_POINTERS = {
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.float32: "*fp32",
}
# What the launcher finds about its arguments in the usual case: contiguous classes, features and
# columns; allocations, padded sizes and the widths of models are multiples of 16.
_ONES = (
    *("stride_zc", "stride_uc", "stride_xf", "stride_vd", "stride_ad"),
    *("stride_xe", "stride_ue", "stride_te"),
)
_MULTIPLES_OF_16 = (
    "D",
    "E",
    "d",
    "padded_C",
    "padded_F",
    "padded_N",
    "stride_ab",
    "stride_ah",
    "stride_an",
    "stride_operand",
    "stride_row",
    "stride_tc",
    "stride_ub",
    "stride_un",
    "stride_vb",
    "stride_vh",
    "stride_vn",
    "stride_xb",
    "stride_xn",
)
_FLOATS = ("beta", "share", "limit", "shift", "gain", "scale", "uniform_scale")


@dataclass(frozen=True)
class Variant:
    """One compiled kernel of the launch table."""

    name: str
    kernel: Any
    pointers: dict[str, str]
    constants: dict[str, Any]
    num_warps: int
    num_stages: int


@dataclass(frozen=True)
class Resources:
    """What one program of a variant takes on one chip."""

    variant: Variant
    chip: int
    registers: int
    spilled: int
    shared: int
    tensor_cores: str
    hot_loop: dict[str, int]

    @property
    def fits(self) -> bool:
        return self.spilled == 0 and self.shared <= CHIPS[self.chip]


def variants() -> Iterator[Variant]:
    """Every kernel in every bucket of the launch table that users meet."""
    from fsa_kernels import columns, isolate, predict, proxy, select, similarity

    def variant(name, kernel, pointers, plan, **constants) -> Variant:
        return Variant(
            name,
            kernel,
            pointers,
            {**constants, **plan.constants},
            plan.num_warps,
            plan.num_stages,
        )

    for dtype, pointer in _POINTERS.items():
        label = str(dtype).removeprefix("torch.")
        for plan in _distinct(launch.isolate(C) for C in (21, 60, 171, 847)):
            pointers = {
                "z_ptr": pointer,
                "u_ptr": pointer,
                "operands_ptr": "*fp16",
                "h_ptr": "*fp32",
            }
            bound = "<=" if plan.constants["WHOLE"] else ">"
            yield variant(
                f"isolate C{bound}{plan.constants['BLOCK_C']} {label}",
                isolate._isolate_kernel,
                pointers,
                plan,
                HAS_UNIFORM=True,
                COSINE=False,
            )
        for form, uniform_row in (("predict", True), ("predict, each", False)):
            yield variant(
                f"{form} {label}",
                predict._predict_kernel,
                {"x_ptr": pointer, "u_ptr": pointer, "text_ptr": "*fp32"}
                | {"logits_ptr": "*fp32", "operands_ptr": "*fp16", "h_ptr": "*fp32"},
                launch.predict(171, uniform_row, dtype),
                UNIFORM_ROW=uniform_row,
                UNIFORM_TILE=not uniform_row,
                COSINE=False,
            )
    for N, sizes in ((512, "N<=512"), (1024, "N<=1024"), (4096, "N>1024")):
        for exact in (True, False):
            yield variant(
                f"similarity {sizes} {'exact' if exact else 'fast'}",
                similarity._similarity_kernel,
                {"operands_ptr": "*fp16", "h_ptr": "*fp32", "s_ptr": "*fp32"},
                launch.similarity(N),
                COSINE=False,
                EXACT=exact,
                BLOCK_K=launch.CLASS_STEP,
            )
    for N in (196, 441, 784, 1764, 4096, 8192, 16384):
        plan = launch.select(N)
        yield variant(
            f"select N<={plan.constants['BLOCK_N']}",
            select._select_kernel,
            {"s_ptr": "*fp32", "h_ptr": "*fp32", "out_ptr": "*fp16"},
            plan,
            PRUNING=0,
            SCALING=True,
        )
    yield variant(
        "select, longer rows",
        select._select_long_kernel,
        {"s_ptr": "*fp32", "h_ptr": "*fp32", "out_ptr": "*fp16"},
        launch.select_long(),
        PRUNING=0,
        SCALING=True,
    )
    for dtype, pointer in _POINTERS.items():
        yield variant(
            f"gather heads {str(dtype).removeprefix('torch.')}",
            columns._gather_kernel,
            dict.fromkeys(("v_ptr", "attended_ptr", "gathered_ptr", "columns_ptr"), pointer),
            launch.gather(),
            **dict.fromkeys(("AFTER", "BEFORE", "ONLY"), True),
        )
    for dtype, pointer in _POINTERS.items():
        label = str(dtype).removeprefix("torch.")
        unit = "*fp32" if dtype == torch.float32 else "*fp16"
        yield variant(
            f"proxy normalise {label}",
            proxy._normalise_kernel,
            {"x_ptr": pointer, "unit_ptr": unit, "sums_ptr": "*fp32"},
            launch.normalise(768),
        )
        precision = proxy._dot_precision(dtype)
        for plan in _distinct(launch.affinity(N, dtype) for N in (512, 4096)):
            yield variant(
                f"proxy affinity {plan.constants['BLOCK_M']} rows {label}",
                proxy._affinity_kernel,
                {"unit_ptr": unit, "level_ptr": "*fp32", "weights_ptr": pointer}
                | {"masses_ptr": "*fp32"},
                plan,
                DOT_PRECISION=precision,
            )
        names = ("ADD", "GATHER", "AFTER", "BEFORE", "ONLY")
        forms = {"apply": (), "apply, add": names[:1], "gather": names[1:]}
        pointers = dict.fromkeys(
            ("weights_ptr", "v_ptr", "add_ptr", "out_ptr", "columns_ptr"), pointer
        )
        for form, set_flags in forms.items():
            for plan in _distinct(
                launch.apply_affinity(rows, 768, dtype, form == "gather") for rows in (196, 4096)
            ):
                yield variant(
                    f"proxy {form} {plan.constants['BLOCK_M']} rows {label}",
                    proxy._apply_kernel,
                    pointers | {"masses_ptr": "*fp32"},
                    plan,
                    **{name: name in set_flags for name in names},
                    DOT_PRECISION=precision,
                    WEIGHTS_TILE=launch.WEIGHTS_TILE,
                )
    yield variant(
        "proxy level",
        proxy._level_kernel,
        {"sums_ptr": "*fp32", "level_ptr": "*fp32"},
        launch.level(768),
    )


def _distinct(plans: Iterable[launch.Launch]) -> list[launch.Launch]:
    """Each bucket of the table once."""
    return list({repr(plan): plan for plan in plans}.values())


def measure(variant: Variant, chip: int) -> Resources:
    """Compiles a variant for a chip and reads what it takes."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = variant.kernel.arg_names
    constants = {**{name: 1 for name in _ONES if name in names}, **variant.constants}
    signature, attributes = {}, {}
    for position, name in enumerate(names):
        if name in constants:
            signature[name] = "constexpr"
            continue
        if name in variant.pointers:
            signature[name] = variant.pointers[name]
        elif name in _FLOATS:
            signature[name] = "fp32"
        else:
            signature[name] = "i32"
        if name in variant.pointers or name in _MULTIPLES_OF_16:
            attributes[(position,)] = [["tt.divisibility", 16]]
    source = ASTSource(
        variant.kernel,
        signature=signature,
        constexprs={(names.index(n),): value for n, value in constants.items()},
        attrs=attributes,
    )
    compiled = triton.compile(
        source,
        target=GPUTarget("cuda", chip, 32),
        options={"num_warps": variant.num_warps, "num_stages": variant.num_stages},
    )
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(compiled.asm["cubin"])
        usage = _cuobjdump("--dump-resource-usage", cubin)
        machine_code = _cuobjdump("--dump-sass", cubin)
    registers, stack = (int(re.search(rf"{key}:(\d+)", usage)[1]) for key in ("REG", "STACK"))
    spills = len(re.findall(r"\b(?:STL|LDL)\b", machine_code))
    found = sorted(set(re.findall(r"\b(HGMMA|HMMA|UTC\w*MMA|QGMMA)\b", machine_code)))
    return Resources(
        variant,
        chip,
        registers,
        max(stack, spills),
        compiled.metadata.shared,
        "+".join(found) or "-",
        hot_loop(machine_code),
    )


def hot_loop(machine_code: str) -> dict[str, int]:
    """Instructions of the hot loop by what they do, those that occur, and "all" of them."""
    code = [
        (int(address, 16), name, rest)
        for address, name, rest in re.findall(
            r"^\s*/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9]*)(.*?);",
            machine_code,
            re.MULTILINE,
        )
    ]
    loops = []
    for address, name, rest in code:
        target = re.search(r"0x([0-9a-f]+)", rest) if name == "BRA" else None
        # A jump to itself only pads the end.
        if target and int(target[1], 16) < address:
            loops.append((int(target[1], 16), address))
    innermost = [
        loop
        for loop in loops
        if not any(o != loop and loop[0] <= o[0] and o[1] <= loop[1] for o in loops)
    ]
    bodies = [
        [name for address, name, _ in code if start <= address <= end] for start, end in innermost
    ]
    counts = [_counts(body) for body in bodies or [[name for _, name, _ in code]]]
    return max(counts, key=lambda found: (found.get("MMA", 0), found["all"]))


def _counts(names: list[str]) -> dict[str, int]:
    counts = {
        label: sum(bool(re.fullmatch(pattern, name)) for name in names)
        for label, pattern in _COUNTED.items()
    }
    return {label: count for label, count in counts.items() if count} | {"all": len(names)}


def _cuobjdump(option: str, cubin: Path) -> str:
    import triton

    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    result = subprocess.run([tool, option, cubin], capture_output=True, text=True, check=True)
    return result.stdout


def main(arguments: Sequence[str] = ()) -> int:
    """Prints the table; 0 if everything fits."""
    if os.environ.get("TRITON_INTERPRET") == "1":
        raise SystemExit("unset TRITON_INTERPRET: the interpreter replaces the compiler")
    print(
        f"{'kernel':<28} {'chip':<7} {'warps':>5} {'registers':>9} {'spilled':>7} "
        f"{'shared B':>9} {'limit B':>8}  {'tensor cores':<12}  hot loop"
    )
    all_fit = True
    for variant in variants():
        for chip in CHIPS:
            taken = measure(variant, chip)
            all_fit &= taken.fits
            print(
                f"{variant.name:<28} sm_{chip:<4} {variant.num_warps:>5} {taken.registers:>9} "
                f"{taken.spilled:>7} {taken.shared:>9} {CHIPS[chip]:>8}  {taken.tensor_cores:<12}  "
                + " ".join(f"{name} {count}" for name, count in taken.hot_loop.items())
                + ("" if taken.fits else "  DOES NOT FIT"),
                flush=True,
            )
    return 0 if all_fit else 1
