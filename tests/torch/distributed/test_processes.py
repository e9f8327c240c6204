"""The pool of processes itself: results, errors and hangs of single ranks reach the test."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")

from torch import distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from .processes import Processes


def total(rows):
    """Rank, number of ranks, threads, and the sum of a tensor whose rows they share."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    x = distribute_tensor(torch.arange(rows * 3.0).view(rows, 3), mesh, [Shard(0)])
    return dist.get_rank(), dist.get_world_size(), torch.get_num_threads(), x.sum().full_tensor()


def fail_on(rank):
    """The others wait for it."""
    if dist.get_rank() == rank:
        raise ValueError("no such layer")
    dist.barrier()


def leave_out(rank):
    if dist.get_rank() != rank:
        dist.barrier()


def test_pool_reports_results_errors_and_hangs(processes):
    for size in (4, 2, 4):
        results = processes.run(total, 5, size=size)
        assert [result[:3] for result in results] == [(rank, size, 1) for rank in range(size)]
        assert all(result[3].item() == 105 for result in results)

    few = Processes(3, seconds=60)
    for rank in range(2):
        with pytest.raises(RuntimeError, match=rf"fail_on: rank {rank} of 3 failed: (?s:.)*ValueError: no such layer"):
            few.run(fail_on, rank)
        assert not few.processes
    assert len(few.run(total, 3)) == 3
    few.seconds = 3
    with pytest.raises(TimeoutError, match=r"leave_out: no answer in 3 s from rank 0:\n(?s:.)*barrier") as error:
        few.run(leave_out, 1)
    assert "rank 1:" not in str(error.value)
    assert "rank 2:" in str(error.value)
    assert not few.processes
