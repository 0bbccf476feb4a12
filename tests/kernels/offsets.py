"""Whether the compiled kernels reach memory beyond 2^31 entries.

<<<<<<<< HEAD:tests/support/offsets.py
    python -m tests.kernels.offsets
========
    python -m tests.kernels.offsets
>>>>>>>> kernels:tests/kernels/offsets.py

compiles each kernel as real calls do, prints what in its offsets is a 32-bit product with an
argument (a stride, a padded size), and exits with 1 where there is one. Triton passes an integer
below 2^31 in 32 bits, so the product of a stride and an index may wrap around. Not for a process in
which Triton interprets its kernels.
"""

from __future__ import annotations

import re
import sys

from bench.measure import driver

_SPREADING = ("tt.splat", "tt.broadcast", "tt.expand_dims", "tt.reshape")
_FOLLOWED = (*_SPREADING, "arith.extsi", "arith.addi", "arith.muli")


def compiles_ahead_of_time() -> bool:
    """Whether Triton compiles for chips that are not there, as it is asked to here."""
    return driver.obstacle() is None


def narrow_products(ir: str) -> set[str]:
    """The lines of a Triton IR in which an argument is multiplied in 32 bits, for an offset."""
    arguments = set(re.findall(r"(%\w+):", ir[ir.index("tt.func") :].splitlines()[0]))
    made: dict[str, tuple[str, list[str], str]] = {}
    for line in ir.splitlines():
        match = re.match(r"\s*(%\w+) = ([\w.]+) (.*)", line)
        if match:
            name, operation, rest = match.groups()
            made[name] = (operation, re.findall(r"%\w+", rest.split(" : ")[0]), line.strip())
    found: set[str] = set()

    def is_argument(name: str) -> bool:
        while name in made and made[name][0] in _SPREADING:
            name = made[name][1][0]
        return name in arguments

    def follow(name: str) -> None:
        if name not in made or made[name][0] not in _FOLLOWED:
            return
        operation, operands, line = made[name]
        result = line.split(" loc(")[0].split(" : ")[-1]
        if operation == "arith.muli" and "i64" not in result and any(map(is_argument, operands)):
            found.add(line.split(" loc(")[0])
        for operand in operands:
            follow(operand)

    for operation, operands, _ in made.values():
        if operation == "tt.addptr":
            follow(operands[1])
    return found


def main() -> int:
    from bench.measure import calls

    on = driver.install(90)
    if failed := driver.failures(calls.quick(), on):
        print(failed)
        return 1
    found = {
        kernel: set().union(*map(narrow_products, codes))
        for kernel, codes in driver.intermediate().items()
    }
    for kernel, lines in found.items():
        if lines:
            print(kernel, *sorted(lines), sep="\n    ")
    return int(any(found.values()))


if __name__ == "__main__":
    sys.exit(main())
