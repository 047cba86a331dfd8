"""Which device this rank computes on: bound by its number on the node before anything else touches CUDA.

Works where every rank sees all GPUs of its node and where each sees its own alone (srun --gpus-per-task, --gpu-bind): the
device is the local rank modulo the visible ones. Whether two ranks got the same GPU is then asked of the GPUs themselves.
"""

from __future__ import annotations

import collections

import torch

from hpcinfer.comm.host import HostChannel
from hpcinfer.errors import ConfigError, LaunchError

CPU = torch.device("cpu")


def bind_device(setting: str, channel: HostChannel, *, local_rank: int, host: str, share_gpu: bool = False) -> torch.device:
    """Choose this rank's device and make it the current one. Collective.

    Args:
        setting: `engine.device`: auto, cpu or cuda.
        channel: over all ranks.
        local_rank, host: of this rank.
        share_gpu: several ranks may have one GPU.

    Raises:
        ConfigError: GPUs were asked for and some rank has none, or only some ranks have one.
        LaunchError: two ranks have the same GPU.
    """
    if setting == "cpu":
        return CPU
    counts = channel.all_gather((host, torch.cuda.device_count() if torch.version.cuda else 0))
    without = sorted({each for each, count in counts if count == 0})
    if len(without) and (setting == "cuda" or any(count for _, count in counts)):
        raise _agreed(_no_gpu(without, any(count for _, count in counts)))
    if without:
        return CPU
    device = torch.device("cuda", local_rank % torch.cuda.device_count())
    torch.cuda.set_device(device)
    problem = shared_gpus(channel.all_gather((host, str(torch.cuda.get_device_properties(device).uuid))))
    if problem and not share_gpu:
        raise _agreed(problem)
    return device


def shared_gpus(places: list[tuple[str, str]]) -> LaunchError | None:
    """What is wrong where two ranks have one GPU. `places`: host and GPU of every rank, in rank order."""
    ranks_of: dict[tuple[str, str], list[int]] = collections.defaultdict(list)
    for rank, place in enumerate(places):
        ranks_of[place].append(rank)
    shared = {place: ranks for place, ranks in ranks_of.items() if len(ranks) > 1}
    if not shared:
        return None
    return LaunchError(
        "every rank needs a GPU of its own",
        found="; ".join(
            f"ranks {', '.join(map(str, ranks))} on host {host} have GPU {gpu}" for (host, gpu), ranks in shared.items()
        ),
        fix="start as many ranks a node as it has GPUs and let every rank see all of them: #SBATCH --gpus-per-node=N with "
        "srun --ntasks-per-node=N --gpus-per-node=N, without --gpus-per-task under mpiexec",
    )


def _no_gpu(hosts: list[str], elsewhere: bool) -> ConfigError:
    if torch.version.cuda is None:
        found, fix = f"torch {torch.__version__}, which is built without CUDA", "install a CUDA build: pip install '.[cuda13]'"
    else:
        found = f"torch {torch.__version__} sees no GPU on {', '.join(hosts[:8])}"
        fix = "ask Slurm for GPUs (--gpus-per-node), check CUDA_VISIBLE_DEVICES and nvidia-smi there"
    problem = "only some ranks have a GPU" if elsewhere else 'engine.device = "cuda" on a machine without a GPU'
    return ConfigError(problem, found=found, fix=f'{fix}; or set engine.device = "cpu"')


def _agreed(error: ConfigError | LaunchError) -> ConfigError | LaunchError:
    error.agreed = True
    return error
