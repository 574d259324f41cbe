"""Files that outlive a call, and the processes that share them."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist


def rank_and_world() -> tuple[int, int]:
    """This process's number, and how many there are."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def wait() -> None:
    """Until all processes are here."""
    if dist.is_initialized():
        dist.barrier()


def write(what: object, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(f".{os.getpid()}.partial")  # a run that is stopped leaves no half file
    torch.save(what, part)
    part.replace(path)


def kept(path: Path, make: Callable[[], Any], device: torch.device) -> Any:
    """What is in the file, made first if it is missing. On a CPU the file stays on disk and is mapped."""
    missing = not path.exists()
    wait()  # every process has looked before one of them writes
    if missing:
        made = make()
        if rank_and_world()[0] == 0:
            write(made, path)
        wait()
    return torch.load(path, map_location=device, weights_only=True, mmap=device.type == "cpu")
