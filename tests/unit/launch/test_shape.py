"""How many Slurm jobs, nodes, ranks and steps a start takes."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hpcinfer.config.parallel import ParallelConfig
from hpcinfer.config.site import SlurmSection
from hpcinfer.errors import ConfigError
from hpcinfer.launch.shape import Shape, plan_shape

GPU_NODE = SlurmSection(gpus_per_node=8)


def numbers(shape: Shape) -> tuple[int, ...]:
    """tasks, nodes, ranks, ranks and GPUs a node, steps."""
    return shape.tasks, shape.nodes, shape.ranks, shape.ranks_per_node, shape.gpus_per_node, shape.steps


@pytest.mark.parametrize(
    ("parallel", "slurm", "arguments", "expected"),
    [
        ({"tp": 2, "dp": 2}, SlurmSection(ranks_per_node=2), {}, (1, 2, 4, 2, 0, 1)),
        ({"tp": 2}, SlurmSection(ranks_per_node=2), {"nodes": 2}, (1, 2, 4, 2, 0, 1)),
        ({"tp": 2}, SlurmSection(ranks_per_node=2), {"tasks": 3}, (3, 1, 2, 2, 0, 1)),
        # Nodes that say nothing: one replica a node.
        ({"tp": 2}, SlurmSection(), {}, (1, 1, 2, 2, 0, 1)),
        ({"tp": 2}, SlurmSection(), {"nodes": 3}, (1, 3, 6, 2, 0, 1)),
        ({"tp": 2, "dp": 3}, SlurmSection(), {"nodes": 2}, (1, 2, 6, 3, 0, 1)),
        # A node is filled with replicas, or as far as whole ones go.
        ({}, GPU_NODE, {}, (1, 1, 8, 8, 8, 1)),
        ({"tp": 3}, GPU_NODE, {}, (1, 1, 6, 6, 6, 1)),
        ({"tp": 3, "pp": 2}, SlurmSection(gpus_per_node=4), {}, (1, 2, 6, 3, 3, 1)),
        # Nodes that are not filled: no replica is divided, or else no group of tp, where there is room.
        ({"tp": 4, "dp": 3}, GPU_NODE, {}, (1, 2, 12, 8, 8, 1)),
        ({"tp": 2, "dp": 5}, GPU_NODE, {}, (1, 2, 10, 6, 6, 1)),
        ({"tp": 2, "dp": 3}, SlurmSection(gpus_per_node=4), {}, (1, 2, 6, 4, 4, 1)),
        ({"tp": 4, "pp": 3}, GPU_NODE, {}, (1, 2, 12, 8, 8, 1)),
        ({"tp": 4, "dp": 3}, GPU_NODE, {"nodes": 3}, (1, 3, 12, 4, 4, 1)),
        ({"tp": 2, "pp": 2, "dp": 3}, GPU_NODE, {"nodes": 4}, (1, 4, 12, 3, 3, 1)),
        # Only the GPUs that are used; several ranks a GPU.
        ({"tp": 2, "dp": 1}, GPU_NODE, {}, (1, 1, 2, 2, 2, 1)),
        ({"tp": 2}, SlurmSection(gpus_per_node=2, ranks_per_node=4), {}, (1, 1, 4, 4, 2, 1)),
        # The rule: more than four nodes that hold independent replicas.
        ({"tp": 8}, GPU_NODE, {"nodes": 4}, (1, 4, 32, 8, 8, 1)),
        ({"tp": 8}, GPU_NODE, {"nodes": 5}, (5, 1, 8, 8, 8, 1)),
        ({"tp": 8, "pp": 2}, GPU_NODE, {"nodes": 16}, (8, 2, 16, 8, 8, 1)),
        ({"tp": 8, "pp": 2}, GPU_NODE, {"nodes": 16, "tasks": 1}, (1, 16, 128, 8, 8, 1)),
        ({"tp": 8, "pp": 2}, GPU_NODE, {"nodes": 16, "tasks": 2}, (2, 8, 64, 8, 8, 1)),
        ({"tp": 8, "pp": 8}, GPU_NODE, {"nodes": 8}, (1, 8, 64, 8, 8, 1)),
        ({"tp": 8, "dp": 16}, GPU_NODE, {}, (1, 16, 128, 8, 8, 1)),
        ({"tp": 8}, SlurmSection(gpus_per_node=8, array_nodes=8), {"nodes": 8}, (1, 8, 64, 8, 8, 1)),
        # Steps.
        ({"tp": 2}, GPU_NODE, {"steps": True}, (1, 1, 8, 8, 8, 4)),
        ({"tp": 8, "pp": 2}, GPU_NODE, {"steps": True, "nodes": 6}, (1, 6, 48, 8, 8, 3)),
    ],
)
def test_shapes(parallel, slurm, arguments, expected):
    assert numbers(plan_shape(ParallelConfig(**parallel), slurm, **arguments)) == expected


@pytest.mark.parametrize(
    ("parallel", "slurm", "arguments", "words"),
    [
        ({"tp": 8, "pp": 2}, GPU_NODE, {"nodes": 1}, "give --nodes 2 or more"),
        ({"tp": 8, "dp": 4}, GPU_NODE, {"nodes": 3}, "give --nodes 4 or more"),
        ({"tp": 2, "dp": 1}, GPU_NODE, {"nodes": 3}, "give --nodes 2 or less"),
        ({"tp": 8, "pp": 2}, GPU_NODE, {"nodes": 4, "tasks": 4}, "give --nodes 8 or more"),
        ({"dp": 2}, GPU_NODE, {"nodes": 12, "tasks": 4}, "give --nodes 8 or less"),
        ({}, GPU_NODE, {"nodes": 4, "tasks": 3}, "give --nodes 6"),
        ({}, GPU_NODE, {"nodes": 0}, "1 or more"),
        ({}, GPU_NODE, {"tasks": 0}, "1 or more"),
        ({}, GPU_NODE, {"tasks": 2, "steps": True}, "choose one"),
        ({"tp": 4}, SlurmSection(ranks_per_node=6), {"nodes": 2, "steps": True}, "4 ranks a replica, 6 ranks on a node"),
    ],
)
def test_numbers_that_do_not_fit(parallel, slurm, arguments, words):
    with pytest.raises(ConfigError) as caught:
        plan_shape(ParallelConfig(**parallel), slurm, **arguments)
    assert words in str(caught.value)


@given(
    tp=st.integers(1, 16), pp=st.integers(1, 4), dp=st.integers(0, 9), gpus=st.integers(0, 9), ranks=st.integers(0, 9),
    nodes=st.none() | st.integers(1, 40), tasks=st.none() | st.integers(1, 8), steps=st.booleans(),
)  # fmt: skip
def test_what_is_planned_fits(tp, pp, dp, gpus, ranks, nodes, tasks, steps):
    parallel, slurm = ParallelConfig(tp=tp, pp=pp, dp=dp), SlurmSection(gpus_per_node=gpus, ranks_per_node=ranks)
    try:
        shape = plan_shape(parallel, slurm, nodes=nodes, tasks=tasks, steps=steps)
    except ConfigError as error:
        assert error.fix
        return
    assert shape.ranks % parallel.replica_size == 0 and shape.ranks > 0
    assert shape.nodes <= shape.ranks <= shape.nodes * shape.ranks_per_node
    assert shape.total_nodes == nodes or nodes is None
    assert shape.tasks == tasks or tasks is None
    assert shape.gpus_per_node <= gpus and (shape.gpus_per_node > 0) == (gpus > 0)
    if ranks or gpus:
        assert shape.ranks_per_node <= (ranks or gpus)
    if dp:
        assert shape.ranks == dp * parallel.replica_size
    if shape.steps > 1:
        assert shape.steps * parallel.replica_size == shape.ranks
