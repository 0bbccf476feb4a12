"""How it is measured: processes, clocks, memory, errors, launches, machine code."""
