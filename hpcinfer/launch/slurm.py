"""Slurm's commands: what they are called with, how long they may take, and what their errors mean."""

from __future__ import annotations

import subprocess
from collections.abc import Sequence

from hpcinfer.errors import LaunchError

_TIMEOUT_S = 120.0
"""A busy controller answers late; one that is gone lets commands hang for minutes."""

_FIXES = (
    ("invalid partition", "name one of `sinfo -o %P` as slurm.partition of the site"),
    ("invalid account", "name one of `sacctmgr show associations user=$USER format=account,qos` as slurm.account of the site"),
    ("invalid qos", "name one that your account may use as slurm.qos of the site"),
    ("accounting/qos policy", "see `sacctmgr show qos` and `sacctmgr show associations user=$USER`; fewer jobs or nodes, another qos"),
    ("time limit", "give a --time that the partition allows: `sinfo -o '%P %l'`"),
    ("invalid feature", "name features of `sinfo -o '%N %f'` as slurm.constraint of the site"),
    ("generic resource", "the nodes have no such GPUs: see `sinfo -o '%N %G'`, and slurm.gpus_per_node and gpu_type of the site"),
    ("node configuration", "no node has all of that now (CPUs, GPUs, memory, number of nodes; down nodes do not count): see `sinfo -Nl`"),
    ("node count", "give a --nodes that the partition allows: `sinfo -o '%P %s'`"),
    ("unable to contact", "the controller does not answer: try again later, or ask `scontrol ping`"),
    ("unrecognized option", "this Slurm is older than the option: take it out of the site's options"),
)


def check_script(script: str, options: Sequence[str] = ()) -> str:
    """What `sbatch --test-only` says about a script: when and where it would start.

    Raises:
        LaunchError: it would not be accepted.
    """
    result = _sbatch(["--test-only", *options], script, "sbatch --test-only refuses the job")
    return (result.stderr or result.stdout).strip().removeprefix("sbatch: ")


def submit_script(script: str, options: Sequence[str] = ()) -> int:
    """Submit a script from the working directory. Returns the job's id; that of the whole array for an array.

    Raises:
        LaunchError: Slurm refuses it.
    """
    output = _sbatch(["--parsable", *options], script, "sbatch refuses the job").stdout
    number = output.split(";")[0].strip()  # "id" or "id;cluster"
    if not number.isdigit():
        raise LaunchError("sbatch did not say which job it made", found=repr(output), fix="see `squeue --me`")
    return int(number)


def _sbatch(options: Sequence[str], script: str, problem: str) -> subprocess.CompletedProcess:
    try:
        result = subprocess.run(
            # Bytes, because a path may hold bytes that are no text.
            ["sbatch", *options], input=script.encode(errors="surrogateescape"), capture_output=True, timeout=_TIMEOUT_S, check=False,
        )
    except FileNotFoundError as error:
        raise LaunchError(
            "there is no sbatch here", found=str(error), fix="submit from a login node; `--dry-run` shows the script anywhere"
        ) from error
    except subprocess.TimeoutExpired as error:
        raise LaunchError(
            f"sbatch did not answer within {_TIMEOUT_S:.0f} s", fix="see `squeue --me` before trying again: the job may be there"
        ) from error
    result.stdout, result.stderr = (text.decode(errors="replace") for text in (result.stdout, result.stderr))
    if result.returncode != 0:
        found = (result.stderr or result.stdout).strip()
        raise LaunchError(problem, found=found, fix=_fix(found))
    return result


def _fix(message: str) -> str:
    return next((fix for words, fix in _FIXES if words in message.lower()), "see `hpcinfer submit --dry-run` for what was asked")
