"""What each kernel takes of a chip, from the machine code that real calls would launch.

    python -m bench resources [--chips 80,90,100] [--out FOLDER]

makes the calls of `bench.measure.calls` over a driver that does nothing, reads the machine code of
every launch, and writes one table a version of Triton, `resources-triton-X.Y.txt`. Exits with 1
where a kernel spills or a chip could not hold it. Needs no GPU, but a C compiler.

    programs      of the launch
    warps         of a program
    regs          registers a thread
    spilled       bytes of the stack, or loads and stores of it
    shared        bytes of a program
    instr         instructions of the kernel, each counted once, however often it runs
    straight      those of them outside of every loop
    loops         instructions of each innermost loop: how often one runs is decided by sizes and
                  data, so nothing is multiplied out here
    blocks        programs that a multiprocessor holds at once: by registers, shared memory, warps
    waves         the launch's programs over what the whole chip holds at once
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from bench import RESULTS, ROOT
from bench.measure import driver
from bench.measure.driver import CHIPS, Chip, Launched

# Of every chip here: registers, warps and programs of a multiprocessor; registers are given out by
# 256 to a warp, warps by 4, and each program takes 1 KiB of shared memory more than it asks for.
_REGISTERS, _WARPS, _PROGRAMS = 65536, 64, 32
_REGISTERS_AT_ONCE, _WARPS_AT_ONCE, _SHARED_EACH = 256, 4, 1 << 10

_TENSOR_CORES = r"HGMMA|HMMA|QGMMA|UTC\w*MMA"
_PADDING = ("NOP",)


@dataclass(frozen=True)
class Code:
    """What is read from a kernel's machine code.

    Attributes:
        registers: a thread.
        spilled: bytes of the stack, or if more, instructions that load from or store to it.
        tensor_cores: the kinds of instructions for them, or "-".
        instructions: all of them, but what only pads.
        straight: those outside of loops.
        loops: instructions of each innermost loop, in order.
    """

    registers: int
    spilled: int
    tensor_cores: str
    instructions: int
    straight: int
    loops: tuple[int, ...]


@dataclass(frozen=True)
class Taken:
    """What one launch takes of a chip."""

    call: str
    launched: Launched
    code: Code
    chip: Chip

    @property
    def blocks(self) -> int:
        """Programs that a multiprocessor holds at once."""
        return resident(self.code.registers, self.launched.warps, self.launched.shared, self.chip)

    @property
    def waves(self) -> float:
        """Programs of the launch over those that the chip holds at once."""
        x, y, z = self.launched.grid
        return x * y * z / max(1, self.blocks * self.chip.multiprocessors)

    @property
    def fits(self) -> bool:
        """Whether nothing spills and a multiprocessor holds at least one program."""
        return self.code.spilled == 0 and self.blocks > 0


def resident(registers: int, warps: int, shared: int, chip: Chip) -> int:
    """Programs that a multiprocessor holds at once, as CUDA's occupancy calculator counts them."""
    a_warp = -(-registers * 32 // _REGISTERS_AT_ONCE) * _REGISTERS_AT_ONCE
    warps_by_registers = _REGISTERS // a_warp // _WARPS_AT_ONCE * _WARPS_AT_ONCE
    by_shared = chip.shared // (shared + _SHARED_EACH) if shared <= chip.shared_a_block else 0
    return min(warps_by_registers // warps, _WARPS // warps, _PROGRAMS, by_shared)


@cache
def read(cubin: bytes) -> Code:
    """Reads a kernel's machine code."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "kernel.cubin"
        file.write_bytes(cubin)
        usage = _cuobjdump("--dump-resource-usage", file)
        assembly = _cuobjdump("--dump-sass", file)
    registers, stack = (int(re.search(rf"{key}:(\d+)", usage)[1]) for key in ("REG", "STACK"))
    spills = len(re.findall(r"\b(?:STL|LDL)\b", assembly))
    cores = sorted(set(re.findall(rf"\b({_TENSOR_CORES})\b", assembly)))
    everything, straight, loops = instructions(assembly)
    return Code(registers, max(stack, spills), "+".join(cores) or "-", everything, straight, loops)


def instructions(assembly: str) -> tuple[int, int, tuple[int, ...]]:
    """Of a kernel's assembly: instructions, those outside of loops, and those of innermost loops.

    A jump backwards closes a loop.
    """
    code = [
        (int(address, 16), name, rest)
        for address, name, rest in re.findall(
            r"^\s*/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9]*)(.*?);",
            assembly,
            re.MULTILINE,
        )
        if name not in _PADDING
    ]
    loops = []
    kept = []
    for address, name, rest in code:
        target = re.search(r"0x([0-9a-f]+)", rest) if name == "BRA" else None
        start = int(target[1], 16) if target else None
        if start == address:
            # A jump to itself only marks the end.
            continue
        kept.append(address)
        if start is not None and start < address:
            loops.append((start, address))
    innermost = [
        loop
        for loop in loops
        if not any(o != loop and loop[0] <= o[0] and o[1] <= loop[1] for o in loops)
    ]
    straight = sum(not any(a <= address <= b for a, b in loops) for address in kept)
    sizes = tuple(sum(a <= address <= b for address in kept) for a, b in innermost)
    return len(kept), straight, sizes


def _cuobjdump(option: str, cubin: Path) -> str:
    import triton

    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    result = subprocess.run([tool, option, cubin], capture_output=True, text=True, check=True)
    return result.stdout


def measure(calls: Iterable, on: driver.DoNothingDriver) -> list[Taken]:
    """What the launches of some calls take of the driver's chip.

    Args:
        calls: of `bench.measure.calls`.
        on: the installed driver.
    """
    launched = [(call.name, launch) for call in calls for launch in on.of_call(call.run)]
    with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
        found = {one.cubin for _, one in launched}
        codes = dict(zip(found, pool.map(read, found), strict=True))
    return [Taken(name, one, codes[one.cubin], on.chip) for name, one in launched]


def table(taken: Sequence[Taken]) -> str:
    """One line a launch; launches of a call that are the same in everything are one line."""
    chip = taken[0].chip
    lines = [
        f"sm_{chip.capability}, {chip.name}: {chip.multiprocessors} multiprocessors",
        f"{'kernel':<20} {'programs':>8} {'warps':>5} {'regs':>4} {'spilled':>7} {'shared':>6} "
        f"{'instr':>6} {'straight':>8} {'blocks':>6} {'waves':>6}  {'tensor cores':<12} loops",
    ]
    call, seen = None, set()
    for one in taken:
        if one.call != call:
            call, seen = one.call, set()
            lines.append(f"{call}")
        code, launched = one.code, one.launched
        x, y, z = launched.grid
        line = (
            f"  {launched.kernel.strip('_').removesuffix('_kernel'):<18} {x * y * z:>8} "
            f"{launched.warps:>5} {code.registers:>4} {code.spilled:>7} {launched.shared:>6} "
            f"{code.instructions:>6} {code.straight:>8} {one.blocks:>6} {one.waves:>6.2f}  "
            f"{code.tensor_cores:<12} {' '.join(map(str, code.loops)) or '-'}"
            f"{'' if one.fits else '  DOES NOT FIT'}"
        )
        if line not in seen:
            seen.add(line)
            lines.append(line)
    return "\n".join(lines)


def main(arguments: Sequence[str]) -> int:
    """Writes the table; 0 if everything fits."""
    parser = argparse.ArgumentParser(
        prog="python -m bench resources",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--chips", default="80,90,100", help="default 80,90,100")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder; default bench/results")
    parser.add_argument("--chip", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments[1:])
    if options.chip is not None:
        return _one_chip(options.chip)
    if reason := driver.obstacle():
        raise SystemExit(f"resources cannot be read here: {reason}")
    import triton

    from bench.environment import origin, require_publishable

    found = origin(["resources"])
    require_publishable(found, options.out)
    # A process a chip: a process has one driver, and compiles for one chip.
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    tables, fits = [], True
    for chip in options.chips.split(","):
        if int(chip) not in CHIPS:
            raise SystemExit(f"--chips {chip}: must be of {', '.join(map(str, CHIPS))}")
        result = subprocess.run(
            [sys.executable, "-m", "bench", "resources", "--chip", chip],
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            env=environment,
        )
        if result.returncode not in (0, 1):
            return result.returncode
        fits &= result.returncode == 0
        tables.append(result.stdout)
        print(result.stdout, flush=True)
    version = ".".join(triton.__version__.split(".")[:2])
    head = (
        f"Counted in machine code, not timed. Triton {triton.__version__}, torch {found['torch']}, "
        f"commit {found['commit']}, {found['date'][:10]}, `{found['command']}`.\n"
        "What the columns mean: python -m bench resources --help\n"
    )
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / f"resources-triton-{version}.txt").write_text("\n".join([head, *tables]))
    return 0 if fits else 1


def _one_chip(capability: int) -> int:
    try:
        on = driver.install(capability)
    except driver.Unavailable as reason:
        raise SystemExit(f"resources cannot be read here: {reason}") from None
    from bench.measure import calls

    taken = measure(calls.of_marks(), on)
    print(table(taken))
    return 0 if all(one.fits for one in taken) else 1
