"""A pool of processes that are connected by gloo: it calls a function of a test module in all of them at once.

The fixture ``processes`` has a pool of four for all tests of a session, because a process takes seconds to start. In
each call the processes form a new world, of all of them or of the first ``size``. One thread computes in each::

    def sum_of_ranks(factor):
        total = torch.tensor(factor * dist.get_rank())
        dist.all_reduce(total)
        return total.item()

    def test_sum(processes):
        assert processes.run(sum_of_ranks, 2) == [12, 12, 12, 12]
        assert processes.run(sum_of_ranks, 2, size=2) == [2, 2]
"""

from __future__ import annotations

import faulthandler
import multiprocessing
import multiprocessing.connection
import os
import pickle
import signal
import tempfile
import time
import traceback
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

# A server imports these once, and each process is a fork of it.
PRELOADED = ["torch", "torch.distributed.pipelining", "torch.distributed.tensor.parallel", "fastdrop.torch", "pytest"]
GRACE = 5  # seconds for the other processes to notice that one has failed


class Processes:
    """At most ``count`` ranks. A call that takes longer than so many seconds hangs."""

    def __init__(self, count: int, seconds: float) -> None:
        self.count, self.seconds = count, seconds
        self.calls = 0
        self.processes: list[Any] = []
        self.connections: list[Connection] = []
        self.folder = tempfile.TemporaryDirectory()  # where processes meet, and where they write their stacks

    def run(self, function: Any, *arguments: Any, size: int | None = None) -> list[Any]:
        """What the function returns in each process, by rank.

        Function, arguments and results are pickled. The error of the first process that fails is raised here, with its
        traceback. So is a hang, with the stacks of the processes that hang. Both end all processes; the next call
        starts new ones.
        """
        if not self.processes:
            self._start()
        size = self.count if size is None else size
        self.calls += 1
        task = pickle.dumps((function, arguments, size, f"file://{self.folder.name}/rendezvous-{self.calls}"))
        try:
            for connection in self.connections[:size]:
                connection.send_bytes(task)
            return self._collect(function.__name__, size)
        except BaseException:
            self.stop()
            raise

    def stop(self) -> None:
        """Ends all processes at once."""
        for process in self.processes:
            process.kill()
            process.join()
        self.processes, self.connections = [], []

    def _start(self) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(PRELOADED)
        for rank in range(self.count):
            connection, theirs = context.Pipe()
            process = context.Process(target=serve, args=(rank, theirs, self._stack_file(rank)), daemon=True)
            process.start()
            theirs.close()
            self.processes.append(process)
            self.connections.append(connection)

    def _collect(self, name: str, size: int) -> list[Any]:
        waiting = dict(zip(self.connections[:size], range(size), strict=True))
        results: dict[int, Any] = {}
        errors: list[tuple[float, int, str]] = []
        end = time.monotonic() + self.seconds
        while waiting:
            ready = multiprocessing.connection.wait(list(waiting), max(0, end - time.monotonic()))
            if not ready:
                break
            for connection in ready:
                rank = waiting.pop(connection)
                try:
                    when, error, result = pickle.loads(connection.recv_bytes())
                except EOFError:
                    when, error, result = time.monotonic(), "the process has died", None
                results[rank] = result
                if error:
                    errors.append((when, rank, error))
                    end = min(end, time.monotonic() + GRACE)
        if errors:
            _, rank, error = min(errors)
            raise RuntimeError(f"{name}: rank {rank} of {size} failed: {error}")
        if waiting:
            raise TimeoutError(f"{name}: no answer in {self.seconds} s from {self._stacks(list(waiting.values()))}")
        return [results[rank] for rank in range(size)]

    def _stacks(self, ranks: list[int]) -> str:
        """Where these processes are."""
        for rank in ranks:
            os.kill(self.processes[rank].pid, signal.SIGUSR1)
        time.sleep(0.5)  # they write at once
        stacks = (f"rank {rank}:\n{Path(self._stack_file(rank)).read_text()}" for rank in ranks)
        return "\n".join(stacks)

    def _stack_file(self, rank: int) -> str:
        return os.path.join(self.folder.name, f"stack-{rank}")


def serve(rank: int, connection: Connection, stack_file: str) -> None:
    """What a process does: it answers each task with the time, a traceback or None, and the result."""
    import torch

    torch.set_num_threads(1)
    with open(stack_file, "w") as stacks:
        faulthandler.register(signal.SIGUSR1, stacks)
        while True:
            try:
                task = connection.recv_bytes()
            except EOFError:  # the parent is gone
                return
            try:
                answer = pickle.dumps((0.0, None, perform(task, rank)))
            except BaseException:
                connection.send_bytes(pickle.dumps((time.monotonic(), traceback.format_exc(), None)))
                os._exit(1)  # closes its sockets, so that the others don't wait for it
            connection.send_bytes(answer)


def perform(task: bytes, rank: int) -> Any:
    """Calls the function within a world of processes, with torch as it is in a fresh interpreter."""
    import torch
    from torch import distributed as dist
    from torch.distributed.tensor import debug

    import fastdrop.torch as fdt

    function, arguments, size, rendezvous = pickle.loads(task)
    if dist.is_initialized():  # not at the end of a task, because others may still need the connections then
        dist.destroy_process_group()
        debug._clear_sharding_prop_cache()  # has meshes of the old world, which are equal to those of the new one
    fdt.disable()
    limit = timedelta(minutes=10)  # the parent sees a hang earlier
    dist.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=size, timeout=limit)
    torch.manual_seed(0)
    return function(*arguments)
