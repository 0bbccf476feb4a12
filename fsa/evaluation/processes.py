"""The processes of a run under torchrun, or this one alone."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from torch import distributed

from fsa.errors import InputError


@dataclass(frozen=True)
class Group:
    """The processes that share the work.

    Attributes:
        rank: of this one, from 0.
        size: how many there are.
    """

    rank: int = 0
    size: int = 1

    def barrier(self) -> None:
        """Waits for all."""
        if self.size > 1:
            distributed.barrier()

    def gather(self, value: Any) -> list[Any]:
        """The value of every process, in their order, in each of them."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        distributed.all_gather_object(values, value)
        return values

    def sum(self, counts: np.ndarray) -> np.ndarray:
        """The sum of int64 arrays over all processes, in each of them."""
        if self.size == 1:
            return counts
        total = torch.from_numpy(counts.copy())
        distributed.all_reduce(total)
        return total.numpy()


def start() -> Group:
    """Joins the processes that torchrun started; alone if it did not.

    gloo also where there are GPUs: a few megabytes are exchanged at the start and at the end, and
    it works across machines and for several processes on one GPU alike.
    """
    size = os.environ.get("WORLD_SIZE", "1")
    if size == "1" and "RANK" not in os.environ:
        return Group()
    missing = [name for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR") if name not in os.environ]
    if missing:
        raise InputError(f"{', '.join(missing)} is not set: start several processes with torchrun")
    if not distributed.is_initialized():
        distributed.init_process_group("gloo")
    return current()


def stop() -> None:
    """Leaves the group, if there is one."""
    if distributed.is_available() and distributed.is_initialized():
        # Ending a group waits for gloo's threads, and these may wait for Python's lock to let go
        # of a tensor. Before torch 2.8 a group keeps the lock while it ends, for ever then; its
        # backend gives the lock up, so there the backend has to be what ends last.
        backend = None
        if torch.__version__ < "2.8":
            # Not by a name of its own, which would keep the group.
            backend = cast(Any, distributed.group.WORLD)._get_backend(torch.device("cpu"))
        distributed.destroy_process_group()
        del backend


def current() -> Group:
    """The group that this process is in."""
    if distributed.is_available() and distributed.is_initialized():
        return Group(distributed.get_rank(), distributed.get_world_size())
    return Group()


def own_device(device: str | None) -> str | None:
    """The device of this process: of several GPUs each process of a machine takes its own."""
    local = os.environ.get("LOCAL_RANK")
    if device in (None, "cuda") and local is not None and torch.cuda.is_available():
        return f"cuda:{int(local) % torch.cuda.device_count()}"
    return device
