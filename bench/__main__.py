"""The benchmarks.

python -m bench cpu         the rows for the CPU -> bench/results/cpu.json
python -m bench gpu         the rows for a GPU, those that matter first, in under 8 minutes
                            -> bench/results/gpu.json; --rehearse does a session without a GPU
python -m bench memory      peak extra memory of the PyTorch path at the promised size
python -m bench launches    what a forward launches, without and with feedback; needs no GPU
python -m bench overhead    what calls cost in Python before a GPU has anything to do; needs none
python -m bench driver      real calls of every kernel over a CUDA driver that does nothing
python -m bench resources   what the kernels take of a chip, from the code that real calls launch;
                            needs no GPU -> bench/results/resources-triton-X.Y.txt
python -m bench quality     the embedded model with every host, without and with feedback
                            -> bench/results/quality.json
python -m bench guards      the margins of tests/bench/test_quality.py from the present weights
python -m bench tables      README, results page, model card and plots from the results

python -m bench COMMAND --help says more.
"""

from __future__ import annotations

import importlib
import sys

# Each module's `main` is given the command line from the command's own name on.
COMMANDS = {
    "cpu": "bench.measure.runner",
    "gpu": "bench.measure.runner",
    "memory": "bench.measure.memory",
    "launches": "bench.measure.launches",
    "overhead": "bench.measure.overhead",
    "driver": "bench.measure.driver",
    "resources": "bench.measure.resources",
    "quality": "bench.quality.run",
    "guards": "bench.quality.guards",
    "tables": "bench.report.tables",
}


def main() -> int:
    """Runs one command."""
    arguments = sys.argv[1:]
    if not arguments or arguments[0] not in COMMANDS:
        asked_for_help = arguments in (["-h"], ["--help"])
        print(__doc__.strip(), file=sys.stdout if asked_for_help else sys.stderr)
        return 0 if asked_for_help else 2
    return importlib.import_module(COMMANDS[arguments[0]]).main(arguments)


if __name__ == "__main__":
    sys.exit(main())
