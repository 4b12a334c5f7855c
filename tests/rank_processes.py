"""Functions run on several ranks, each a process of its own on this machine."""

import os
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from command_line import run

TIMEOUT = 20.0


class Result(NamedTuple):
    """What a command printed, and its exit code."""

    exit_code: int
    stdout: str
    stderr: str


def run_ranks(
    count: int, folder: Path, function: Callable[[int], Any], meet: bool = True
) -> list[Any]:
    """What a function of the rank returns on each of them: the exception where it raises one, the
    exit code where it ends the process. meet: let them find each other first.
    """
    processes = [_start(rank, count, folder, function, meet) for rank in range(count)]
    codes = [os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) for process in processes]
    files = [folder / f"{rank}.pt" for rank in range(count)]
    return [
        torch.load(file, weights_only=False) if file.is_file() else code
        for file, code in zip(files, codes, strict=True)
    ]


def run_command(count: int, folder: Path, *arguments: object) -> list[Result]:
    """What `homer` does on each of several ranks, which need not import everything again."""

    def command(rank: int) -> tuple[int, str, str]:
        ranks = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count)}
        os.environ.update(ranks, HOMER_RANKS_MEET_AT=f"file://{folder}/meeting")
        torch.set_num_threads(1)  # the threads of the parent are not there
        found = run(*arguments)
        return found.exit_code, found.stdout, found.stderr

    return [Result(*found) for found in run_ranks(count, folder, command, meet=False)]


def _start(rank: int, count: int, folder: Path, function: Callable[[int], Any], meet: bool) -> int:
    process = os.fork()
    if process:
        return process
    try:
        if meet:
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
