"""The order of ranks: by node, then by local rank, from MPI itself. Never from SLURM_PROCID or SLURM_LOCALID."""

from __future__ import annotations

import dataclasses
import os
import socket
from typing import Any


@dataclasses.dataclass(frozen=True, kw_only=True)
class RankOrder:
    """Where this rank is, and the world with its ranks sorted by (node, local rank)."""

    mpi_comm: Any
    """New mpi4py communicator in that order."""
    rank: int
    size: int
    node_index: int
    num_nodes: int
    local_rank: int
    local_size: int
    host: str
    node_cores: int
    """Cores of this node that its ranks may use, all their affinity masks together."""


def order_ranks(comm: Any) -> RankOrder:
    """Sort the ranks of `comm` by (node, local rank). Collective over `comm`.

    A node is what shares memory (MPI_Comm_split_type). Nodes are numbered by their lowest rank in `comm`, so that the
    launcher's own order of nodes is kept.
    """
    from mpi4py import MPI

    node = comm.Split_type(MPI.COMM_TYPE_SHARED)
    local_rank, local_size = node.Get_rank(), node.Get_size()
    lowest = node.allreduce(comm.Get_rank(), op=MPI.MIN)
    cores = set().union(*node.allgather(os.sched_getaffinity(0)))
    node.Free()
    lowest_ranks = sorted(set(comm.allgather(lowest)))
    node_index = lowest_ranks.index(lowest)
    ordered = comm.Split(0, key=node_index * comm.Get_size() + local_rank)
    return RankOrder(
        mpi_comm=ordered, rank=ordered.Get_rank(), size=ordered.Get_size(), node_index=node_index,
        num_nodes=len(lowest_ranks), local_rank=local_rank, local_size=local_size, host=socket.gethostname(),
        node_cores=len(cores),
    )
