"""How many Slurm jobs, nodes, ranks and srun steps a start takes. Plain arithmetic over the job's layout and the site's nodes."""

from __future__ import annotations

import dataclasses

from hpcinfer.config.parallel import ParallelConfig
from hpcinfer.config.site import SlurmSection
from hpcinfer.errors import ConfigError


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Shape:
    """A start, as Slurm sees it."""

    nodes: int
    """Nodes of one Slurm job (of one array task)."""
    ranks: int
    """Ranks of one Slurm job, all its steps together."""
    ranks_per_node: int
    """Most ranks on one node."""
    gpus_per_node: int = 0
    tasks: int = 1
    """Slurm jobs that share the run directory: the tasks of an array."""
    steps: int = 1
    """Steps of one Slurm job that run at the same time, each a start of its own."""

    @property
    def total_nodes(self) -> int:
        """Nodes of all tasks."""
        return self.nodes * self.tasks


def plan_shape(
    parallel: ParallelConfig, slurm: SlurmSection, *, nodes: int | None = None, tasks: int | None = None, steps: bool = False
) -> Shape:
    """The shape of a start.

    A node has `ranks_per_node` ranks, by default one a GPU, without GPUs one replica. With parallel.dp = 0 the ranks that the nodes
    have are filled with whole replicas; otherwise there are exactly dp replicas. Where they do not fill the nodes, the last ones have
    fewer ranks, rather than that a replica (or one that is larger than a node: a group of tp) is divided.

    The rule for arrays: with parallel.dp = 0, on more than `slurm.array_nodes` nodes, where equal parts of the nodes hold
    whole replicas, the start becomes an array of such parts, as small as they can be. Replicas share nothing but the run
    directory, and an array task that fails is started again by itself, anywhere.

    Args:
        nodes: nodes in all, over all tasks; by default as few as hold the replicas.
        tasks: array tasks; by default what the rule says. 1 keeps everything in one job.
        steps: one step for each replica instead of one for all.

    Raises:
        ConfigError: the numbers do not fit together.
    """
    for name, number in (("--nodes", nodes), ("--array", tasks)):
        if number is not None and number < 1:
            raise ConfigError(f"{name} {number}", fix="give 1 or more")
    if steps and (tasks or 1) > 1:
        raise ConfigError(f"--steps with --array {tasks}", fix="replicas are either steps of one job or tasks of an array: choose one")
    if tasks is None:
        tasks = 1 if steps else _tasks_by_rule(parallel, slurm, nodes)
    if nodes is not None and nodes % tasks:
        raise ConfigError(
            f"--nodes {nodes} cannot be divided over --array {tasks}", found="--nodes counts all array tasks together",
            fix=f"give --nodes {-(-nodes // tasks) * tasks}, or leave it out",
        )
    shape = _job_shape(parallel, slurm, nodes // tasks if nodes else None, tasks)
    replica = parallel.replica_size
    if steps and shape.ranks_per_node % replica and replica % shape.ranks_per_node:
        raise ConfigError(
            "--steps needs nodes that hold whole replicas, or replicas that fill whole nodes",
            found=f"{replica} ranks a replica, {shape.ranks_per_node} ranks on a node", fix="leave --steps out, or change the layout",
        )
    return dataclasses.replace(shape, tasks=tasks, steps=shape.ranks // replica if steps else 1)


def _job_shape(parallel: ParallelConfig, slurm: SlurmSection, nodes: int | None, tasks: int) -> Shape:
    replica = parallel.replica_size
    room = slurm.ranks_per_node or slurm.gpus_per_node
    if not room:  # nodes say nothing: as many ranks as the job has, one replica a node where it does not say either
        ranks = replica * (parallel.dp or nodes or 1)
        room = -(-ranks // (nodes or parallel.dp or 1))
    elif parallel.dp:
        ranks = replica * parallel.dp
    else:
        ranks = (nodes or -(-replica // room)) * room // replica * replica
    nodes = nodes or -(-ranks // room)
    if not 1 <= ranks <= nodes * room:
        raise ConfigError(
            f"{nodes} nodes for {parallel.dp or 1} replicas of {replica} ranks", found=f"{room} ranks on a node",
            fix=f"give --nodes {-(-replica * (parallel.dp or 1) // room) * tasks} or more, or change parallel.dp, pp, sp or tp",
        )
    if nodes > ranks:
        raise ConfigError(f"{nodes} nodes for {ranks} ranks", fix=f"give --nodes {ranks * tasks} or less, or raise parallel.dp")
    ranks_per_node = _ranks_per_node(parallel, ranks, nodes, room)
    return Shape(
        nodes=nodes, ranks=ranks, ranks_per_node=ranks_per_node,
        # Only the GPUs that the ranks use: with several ranks a GPU, or GPUs a rank, in the proportion of the full node.
        gpus_per_node=-(-slurm.gpus_per_node * ranks_per_node // room),
    )


def _ranks_per_node(parallel: ParallelConfig, ranks: int, nodes: int, room: int) -> int:
    """Most ranks on one node: even, as far as that divides no replica, or no group of tp, of those that a node has room for."""
    even = -(-ranks // nodes)
    for whole in (parallel.replica_size, parallel.sp * parallel.tp, parallel.tp):
        rounded = -(-even // whole) * whole
        if rounded <= room and (nodes - 1) * rounded < ranks:  # Slurm fills one node after the other; none is to be empty
            return rounded
    return even


def _tasks_by_rule(parallel: ParallelConfig, slurm: SlurmSection, nodes: int | None) -> int:
    if nodes is None or nodes <= slurm.array_nodes or parallel.dp:
        return 1
    smallest = _job_shape(parallel, slurm, None, 1)
    return nodes // smallest.nodes if nodes % smallest.nodes == 0 else 1
