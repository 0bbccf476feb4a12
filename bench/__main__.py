"""The benchmarks.

python -m bench cpu         the rows for the CPU -> bench/results/cpu.json
python -m bench gpu         parity, then every row that fits, in under 8 minutes
                            -> bench/results/gpu.json
python -m bench memory      peak extra memory of the PyTorch path
python -m bench resources   registers, spills and shared memory of the kernels; needs no GPU
python -m bench quality     the embedded model with every host, without and with feedback; needs
                            --pictographs DIR -> bench/results/quality.json
python -m bench guards      the margins of tests/test_quality.py from the present weights
python -m bench tables      the tables of the README and the model card from the results
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import torch


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "what", choices=("cpu", "gpu", "memory", "resources", "quality", "guards", "tables")
    )
    parser.add_argument("--out", type=Path, help="file of the results")
    parser.add_argument("--budget", type=float, default=420, help="seconds")
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    parser.add_argument("--pictographs", type=Path, help="for quality: see fsa.tiny.pictographs")
    parser.add_argument("--pictures", type=int, default=200, help="for quality: of each split")
    arguments = parser.parse_args()
    if arguments.what == "quality":
        from bench import quality

        if arguments.pictographs is None:
            parser.error("quality needs --pictographs DIR")
        quality.run(arguments.pictographs, arguments.out or quality.FILE, arguments.pictures)
        return 0
    if arguments.what == "guards":
        from bench import guards

        return guards.main()
    if arguments.what == "resources":
        from bench import resources

        return resources.main()
    if arguments.what == "memory":
        from bench import memory

        return memory.main()
    if arguments.what == "tables":
        from bench import tables

        return tables.main()

    from bench import rows, runner, tables

    if arguments.what == "gpu":
        if not torch.cuda.is_available():
            raise SystemExit("no CUDA device: `python -m bench gpu` needs one")
        device, dtype = torch.device("cuda"), torch.float16
        wanted = (*rows.STEP_SIZES, *rows.OP_SIZES)
    else:
        device, dtype = torch.device("cpu"), torch.float32
        wanted = rows.CPU_ROWS
    file = arguments.out or runner.RESULTS / f"{arguments.what}.json"
    runner.run(
        wanted,
        file,
        device=device,
        dtype=dtype,
        budget=arguments.budget,
        compiled=not arguments.no_compile,
    )
    print(tables.speed_table(json.loads(file.read_text())))
    print(f"wrote {file}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
