"""Functions run on several ranks, each a process of its own on this machine."""

import os
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

TIMEOUT = 20.0


def run_ranks(count: int, folder: Path, function: Callable[[int], Any]) -> list[Any]:
    """What a function of the rank returns on each of them: the exception where it raises one, the
    exit code where it ends the process.
    """
    processes = [_start(rank, count, folder, function) for rank in range(count)]
    codes = [os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) for process in processes]
    files = [folder / f"{rank}.pt" for rank in range(count)]
    return [
        torch.load(file, weights_only=False) if file.is_file() else code
        for file, code in zip(files, codes, strict=True)
    ]


def _start(rank: int, count: int, folder: Path, function: Callable[[int], Any]) -> int:
    process = os.fork()
    if process:
        return process
    try:
        dist.init_process_group(
            "gloo",
            init_method=f"file://{folder}/init",
            rank=rank,
            world_size=count,
            timeout=timedelta(seconds=TIMEOUT),
        )
        try:
            found = function(rank)
        except Exception as error:
            found = error
        torch.save(found, folder / f"{rank}.pt")
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(0)
