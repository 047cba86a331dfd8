"""What the environment variables of a process say about how it was started. Nothing here imports MPI or torch.

Only facts that hold for every process of a launch are taken from variables. Ranks come from MPI itself: under mpiexec
inside an allocation SLURM_PROCID and SLURM_LOCALID describe the launcher's proxy, not the rank.
"""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Mapping

FIRST_SPECIAL_STEP = 0xFFFFFFF0
"""Slurm's step ids from here on are the batch, extern and interactive steps, which srun did not start as tasks."""

END_VARIABLE = "HPCINFER_END_TIME"
"""When this start must be over, in seconds since the epoch: for batch systems that do not say it, and before what Slurm says."""

MPIEXEC_MARKS = ("OMPI_COMM_WORLD_SIZE", "PRTE_LAUNCHED", "MPI_LOCALNRANKS", "HYDI_CONTROL_FD")
"""Variables that PRTE or Hydra set for their ranks, and srun does not."""


@dataclasses.dataclass(frozen=True)
class LaunchEnvironment:
    """How this process was started, read from a mapping of environment variables."""

    variables: Mapping[str, str]

    @classmethod
    def from_environ(cls) -> LaunchEnvironment:
        """The environment of this process, as it is now."""
        return cls(dict(os.environ))

    @property
    def launcher(self) -> str:
        """What started this process as a rank: "mpiexec" (Hydra, PRTE or the like), "srun", or "none"."""
        variables = self.variables
        if any(name in variables for name in MPIEXEC_MARKS):
            # Also inside an srun step: mpiexec is then the inner of the two.
            return "mpiexec"
        if self.in_step:
            return "srun"
        # Another launcher of MPI ranks (PALS, Flux, prun): what its ranks see is PMI or PMIx.
        return "mpiexec" if "PMI_RANK" in variables or "PMIX_RANK" in variables else "none"

    @property
    def expected_ranks(self) -> int:
        """Ranks that the launcher started; 1 without a launcher."""
        if self.launcher == "srun":
            return self._number("SLURM_STEP_NUM_TASKS", "SLURM_NTASKS", "SLURM_NPROCS") or 1
        if self.launcher == "mpiexec":
            return self._number("OMPI_COMM_WORLD_SIZE", "PMI_SIZE") or 1
        return 1

    @property
    def launcher_rank(self) -> int:
        """The rank that the launcher gave this process. Only for choosing who prints before MPI is up."""
        if self.launcher == "srun":
            return self._number("SLURM_PROCID") or 0
        if self.launcher == "mpiexec":
            return self._number("OMPI_COMM_WORLD_RANK", "PMI_RANK") or 0
        return 0

    @property
    def job_id(self) -> int | None:
        """Slurm's job id; of an array task, its own."""
        return self._number("SLURM_JOB_ID", "SLURM_JOBID")

    @property
    def array_id(self) -> int | None:
        """Slurm's id of the job array that this job is a task of; None outside arrays."""
        return self._number("SLURM_ARRAY_JOB_ID")

    @property
    def job_reference(self) -> str:
        """How Slurm's commands know this job. The number of an array's last task also stands for the whole array."""
        array, task = self.array_id, self._number("SLURM_ARRAY_TASK_ID")
        return f"{array}_{task}" if array is not None and task is not None else str(self.job_id or "")

    @property
    def cluster(self) -> str:
        """Slurm's name of the cluster, inside which job ids are unique; "" outside a job."""
        return self.variables.get("SLURM_CLUSTER_NAME", "")

    @property
    def step_id(self) -> int | None:
        """Slurm's step id, None outside a step that srun started."""
        step = self._number("SLURM_STEP_ID", "SLURM_STEPID")
        return step if step is not None and step < FIRST_SPECIAL_STEP else None

    @property
    def in_step(self) -> bool:
        """A step that srun started is around this process."""
        return self.job_id is not None and self.step_id is not None

    @property
    def in_batch_shell(self) -> bool:
        """Inside a job, but not yet under srun or mpiexec: the sbatch script or the shell of salloc."""
        return self.job_id is not None and not self.in_step and self.launcher == "none"

    @property
    def restart_count(self) -> int:
        """How often Slurm has started this job again. The variable is unset in the first life."""
        return self._number("SLURM_RESTART_COUNT") or 0

    @property
    def node_list(self) -> str:
        """Slurm's compressed list of the job's nodes ("n[1-3,7]"); empty outside a job."""
        return self.variables.get("SLURM_JOB_NODELIST") or self.variables.get("SLURM_NODELIST") or ""

    @property
    def nodes(self) -> tuple[str, ...]:
        """The job's nodes, one name each."""
        return expand_node_list(self.node_list)

    @property
    def walltime_end_s(self) -> float | None:
        """When the job ends, in seconds since the epoch (HPCINFER_END_TIME, SLURM_JOB_END_TIME); None if no variable says it."""
        return self._number(END_VARIABLE, "SLURM_JOB_END_TIME")

    @property
    def visible_devices(self) -> tuple[str, ...] | None:
        """Entries of CUDA_VISIBLE_DEVICES; None where it is unset."""
        value = self.variables.get("CUDA_VISIBLE_DEVICES")
        return None if value is None else tuple(part for part in value.split(",") if part)

    def _number(self, *names: str) -> int | None:
        """The first of the variables that is set to a whole number."""
        for name in names:
            value = self.variables.get(name, "").strip()
            if value.isdigit():
                return int(value)
        return None


def expand_node_list(compressed: str) -> tuple[str, ...]:
    """Names in a Slurm node list: "n[1-2,07],gpu3" gives n1, n2, n07, gpu3."""
    names: list[str] = []
    for part in re.findall(r"(?:[^,\[]|\[[^\]]*\])+", compressed):
        names += _expand(part.strip())
    return tuple(names)


def _expand(part: str) -> list[str]:
    match = re.match(r"([^\[]*)\[([^\]]*)\](.*)", part)
    if match is None:
        return [part] if part else []
    head, ranges, tail = match.groups()
    numbers: list[str] = []
    for piece in ranges.split(","):
        first, _, last = piece.partition("-")
        last = last or first
        numbers += [str(number).zfill(len(first)) for number in range(int(first), int(last) + 1)]
    return [head + number + rest for number in numbers for rest in (_expand(tail) or [""])]
