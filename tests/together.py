"""Runs a function in two processes that can meet, without the seconds that starting Python and importing take."""

from __future__ import annotations

import multiprocessing
import os
import socket
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

# Forks from a server that has imported everything and trained nothing: autograd does not survive a fork.
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["lightning_dfd.testing.tiny", "tests.processes"])
LIMIT = 600  # seconds


def in_two_processes(function: Callable[..., None], *arguments: Any) -> None:
    """Call a function of a module in two processes whose environment is that of ranks 0 and 1, as torchrun's is.

    Raises:
        AssertionError: one failed or took longer than LIMIT, with what it said.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ranks, ends = [], []
    for rank in range(2):
        end, other = CONTEXT.Pipe(duplex=False)
        variables = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "NODE_RANK": "0", "WORLD_SIZE": "2"}
        variables |= {"LOCAL_RANK": str(rank), "OMP_NUM_THREADS": "1"}
        process = CONTEXT.Process(target=as_rank, args=(variables, other, function, *arguments))
        process.start()
        other.close()
        ranks.append(process)
        ends.append(end)
    said = []
    for end, process in zip(ends, ranks, strict=True):
        try:
            said.append(end.recv() if end.poll(LIMIT) else f"still running after {LIMIT} s")
        except EOFError:
            process.join()
            said.append(f"ended without a word, exit code {process.exitcode}")
        if said[-1] is not None:
            break  # the other may wait for this one for ever
    for process in ranks:
        if any(said):
            process.kill()
        process.join()
    assert not any(said), "\n".join(filter(None, said))


def as_rank(variables: dict[str, str], end: Connection, function: Callable[..., None], *arguments: Any) -> None:
    """What each process does; sends None or the traceback."""
    import torch

    os.environ |= variables
    torch.set_num_threads(1)
    try:
        function(*arguments)
    except BaseException:
        end.send(traceback.format_exc())
        raise
    end.send(None)
