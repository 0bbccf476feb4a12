"""Real calls through Triton's own binder, specialisation, compiler and launcher, without a GPU.

`install` puts a CUDA driver that does nothing in the place of the real one, for this process and
for good. From then on the launchers of `fsa_kernels` take tensors of the CPU, compile what a GPU of
the pretended kind would be given, and launch it into nothing: results are whatever memory held.
What was launched - the machine code, the grid, the block - is kept and can be asked for.

What Triton compiles depends on the values of the call: an integer that is 1, one that is a multiple
of 16 and an aligned address each give another kernel. So what a real call takes of a chip can only
be read from a real call.
"""

from __future__ import annotations

import argparse
import atexit
import ctypes
import importlib
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_SOURCE = Path(__file__).with_name("do_nothing_cuda.c")
_COMPILERS = ("cc", "gcc", "clang")


class Unavailable(Exception):
    """The driver that does nothing cannot be had here; says why."""


@dataclass(frozen=True)
class Chip:
    """What a multiprocessor offers, by NVIDIA's tables of compute capabilities.

    Attributes:
        capability: 90 for sm_90.
        name: of the GPU whose number of multiprocessors is taken.
        multiprocessors: of that GPU.
        shared_a_block: the most shared memory of a program, in bytes.
        shared: of a multiprocessor, in bytes.
    """

    capability: int
    name: str
    multiprocessors: int
    shared_a_block: int
    shared: int


CHIPS = {
    80: Chip(80, "A100", 108, 163 << 10, 164 << 10),
    90: Chip(90, "H200", 132, 227 << 10, 228 << 10),
    100: Chip(100, "B200", 148, 227 << 10, 228 << 10),
}


@dataclass(frozen=True)
class Launched:
    """One launch.

    Attributes:
        kernel: its name.
        cubin: the machine code that it was taken from.
        grid: programs.
        warps: of a program.
        shared: memory of a program, in bytes.
    """

    kernel: str
    cubin: bytes
    grid: tuple[int, int, int]
    warps: int
    shared: int


class DoNothingDriver:
    """The driver that does nothing; made by `install`.

    Attributes:
        chip: the pretended one.
    """

    def __init__(self, library: ctypes.CDLL, chip: Chip) -> None:
        self.chip = chip
        self._library = library
        for name in ("launch_count", "refused_count"):
            getattr(library, name).restype = ctypes.c_long
        library.launch_name.restype = ctypes.c_char_p
        library.launch_image.restype = ctypes.c_void_p
        library.launch_image_size.restype = ctypes.c_size_t

    def count(self) -> int:
        """Launches since `forget`."""
        return self._library.launch_count()

    def forget(self) -> None:
        """Starts counting and keeping anew."""
        self._library.forget_launches()

    def launches(self) -> list[Launched]:
        """The launches since `forget`, in order; at most 65,536 are kept."""
        return [self._launched(ctypes.c_long(number)) for number in range(self.count())]

    def of_call(self, call: Callable[[], Any]) -> list[Launched]:
        """What one call launches."""
        self.forget()
        call()
        return self.launches()

    def _launched(self, number: ctypes.c_long) -> Launched:
        library = self._library
        sizes = (ctypes.c_uint * 7)()
        library.launch_sizes(number, sizes)
        image, size = library.launch_image(number), library.launch_image_size(number)
        threads = sizes[3] * sizes[4] * sizes[5]
        return Launched(
            kernel=library.launch_name(number).decode(),
            cubin=ctypes.string_at(image, size),
            grid=(sizes[0], sizes[1], sizes[2]),
            warps=threads // 32,
            shared=sizes[6],
        )


def obstacle() -> str | None:
    """Why the driver that does nothing cannot be had here, in words, or None."""
    if not sys.platform.startswith("linux"):
        return "Triton's launcher for CUDA runs on Linux"
    if _compiler() is None:
        return f"there is no C compiler ({', '.join(_COMPILERS)}) to build a driver with"
    try:
        import triton
    except ModuleNotFoundError:
        return "triton is not installed"
    if tuple(int(part) for part in triton.__version__.split(".")[:2]) < (3, 6):
        return f"it is made for Triton 3.6 and newer, and this is {triton.__version__}"
    return None


def _compiler() -> str | None:
    return next((found for name in _COMPILERS if (found := shutil.which(name))), None)


def install(capability: int = 90) -> DoNothingDriver:
    """Replaces the CUDA driver of this process by one that does nothing, for good.

    Args:
        capability: a key of `CHIPS`.

    Raises:
        Unavailable: there is no C compiler, or another obstacle; or kernels are interpreted here.
    """
    reason = obstacle()
    if reason is None and os.environ.get("TRITON_INTERPRET") == "1":
        reason = "TRITON_INTERPRET=1 replaces the compiler; unset it"
    if reason is not None:
        raise Unavailable(reason)
    folder = Path(tempfile.mkdtemp(prefix="do-nothing-cuda-"))
    # Until then Triton links its launchers against it.
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    file = folder / "libcuda.so.1"
    # The name by which Triton's launcher looks for it, whatever the path.
    options = ["-O2", "-shared", "-fPIC", "-Wl,-soname,libcuda.so.1"]
    built = subprocess.run(
        [_compiler(), *options, "-o", file, _SOURCE], capture_output=True, text=True
    )
    if built.returncode != 0:
        raise Unavailable(f"the C compiler failed: {built.stderr.strip()[-600:]}")
    library = ctypes.CDLL(str(file), mode=ctypes.RTLD_GLOBAL)
    os.environ["TRITON_LIBCUDA_PATH"] = str(folder)
    chip = CHIPS[capability]
    of_chip = divmod(capability, 10)
    library.pretend(*of_chip, chip.multiprocessors, chip.shared_a_block, chip.shared)
    _activate(capability)
    return DoNothingDriver(library, chip)


def _activate(capability: int) -> None:
    """Makes Triton's driver for CUDA the active one, with the pretended chip."""
    import torch
    from triton.backends.compiler import GPUTarget
    from triton.backends.nvidia.driver import CudaDriver
    from triton.runtime.driver import driver

    of_chip = divmod(capability, 10)
    torch.cuda.current_device = lambda: 0
    torch.cuda.get_device_capability = lambda *_: of_chip
    cuda = CudaDriver()
    cuda.get_current_device = lambda: 0
    cuda.set_current_device = lambda device: None
    cuda.get_current_stream = lambda device: 0
    cuda.get_device_capability = lambda device: of_chip
    cuda.get_current_target = lambda: GPUTarget("cuda", capability, 32)
    driver.set_active(cuda)


def failures(calls: Iterable[Any], on: DoNothingDriver) -> dict[str, str]:
    """Calls that do not bind, specialise, compile and launch -> why.

    Args:
        calls: of `bench.measure.calls`.
        on: the installed driver.
    """
    reasons = {call.name: _failure(call, on) for call in calls}
    return {name: reason for name, reason in reasons.items() if reason is not None}


def _failure(call: Any, on: DoNothingDriver) -> str | None:
    try:
        launched = on.of_call(call.run)
    except Exception as error:
        return f"{type(error).__name__}: {str(error)[-1500:]}"
    return None if launched else "it launched nothing"


def kernels() -> dict[str, Any]:
    """name -> kernel, of every kernel in `fsa_kernels`, of which each is launched somewhere."""
    import pkgutil

    import triton

    import fsa_kernels

    modules = [
        importlib.import_module(f"fsa_kernels.{module.name}")
        for module in pkgutil.iter_modules(fsa_kernels.__path__)
    ]
    return {
        function.__name__: function
        for module in modules
        for function in vars(module).values()
        if isinstance(function, triton.JITFunction) and function.__name__.endswith("_kernel")
    }


def intermediate() -> dict[str, set[str]]:
    """name of a kernel -> Triton's own code (TTIR) of all that this process compiled of it."""
    return {
        name: {
            compiled.asm["ttir"]
            for caches in kernel.device_caches.values()
            for compiled in caches[0].values()
        }
        for name, kernel in kernels().items()
    }


def main(arguments: Sequence[str]) -> int:
    """Makes the calls; 0 if each launches, every kernel is reached, and nothing spills."""
    parser = argparse.ArgumentParser(
        prog="python -m bench driver",
        description="Makes real calls over a CUDA driver that does nothing.\n\n" + __doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--chip", type=int, choices=tuple(CHIPS), default=90, help="default 90")
    parser.add_argument("--exhaustive", action="store_true", help="every type, layout and edge")
    options = parser.parse_args(arguments[1:])
    try:
        on = install(options.chip)
    except Unavailable as reason:
        raise SystemExit(f"the driver that does nothing cannot be had here: {reason}") from None
    from bench.measure import calls, resources

    chosen = list(calls.exhaustive() if options.exhaustive else calls.quick())
    found = {}
    taken = []
    for call in chosen:
        if failed := failures([call], on):
            found |= failed
        else:
            taken += [(call.name, launched) for launched in on.launches()]
    unreached = set(kernels()) - {launched.kernel for _, launched in taken}
    spilling = {}
    for name, launched in taken:
        code = resources.read(launched.cubin)
        if not resources.Taken(name, launched, code, on.chip).fits:
            spilling[f"{name}: {launched.kernel}"] = (
                f"{code.registers} registers, {code.spilled} spilled, {launched.shared} B shared"
            )
    distinct = len({launched.cubin for _, launched in taken})
    print(
        f"sm_{options.chip}: {len(chosen)} calls, {len(taken)} launches, {distinct} kernels "
        f"compiled, {len(found)} calls failed, {len(spilling)} launches do not fit"
    )
    for name, reason in {**found, **spilling}.items():
        print(f"{name}: {reason}")
    for name in sorted(unreached):
        print(f"{name}: no call launched it")
    return int(bool(found or spilling or unreached))
